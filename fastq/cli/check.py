"""``fastq check``: whether what lies in Redis fits together, and the repair of what does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from fastq.cli.session import Session, with_session
from fastq.cli.table import counted
from fastq.errors import BrokerError, BrokerReplyError, BrokerUnavailable, ExitCode, safe_text

if TYPE_CHECKING:
    from fastq.broker.checker import Checked

__all__ = ["verbs"]

MARKS = {"open": "  OPEN", "reparable": " FAULT", "repaired": "mended"}


@click.command()
@click.argument("queues", nargs=-1)
@click.option("--repair", is_flag=True, help="Mend what needs no guess; no job is ever deleted.")
@with_session
def check(session: Session, queues: tuple[str, ...], repair: bool) -> int:
    """Look whether every job is in exactly one place, and repair.

    Also whether what goes with a job belongs to one, and whether every key is one of ours. All queues, or those named. The workers may go on meanwhile. Exit status 5 when something is wrong and was not repaired.
    """
    from fastq.broker.checker import Checked
    from fastq.broker.checker import check as operation

    for name in queues:
        with contextlib.suppress(BrokerReplyError):  # of a key of a foreign type: the check says of which
            session.known_queue(name)
    found, refusal = Checked(), None
    try:
        session.run(operation(session.settings.prefix, queues or None, repair=repair, found=found))
    except BrokerError as error:
        if not found.at:
            raise
        refusal = _refusal(found.at, error)
        found.complete = False
        found.faults = list(dict.fromkeys(found.faults))  # a queue that was mended is looked at again
    counts = {name: getattr(found, name) for name in ("queues", "jobs", "keys", "skipped", "complete")}
    session.answer({"faults": found.faults, **counts}, _lines(found))
    if refusal is not None:
        raise refusal
    return ExitCode.UNHEALTHY if found.left else ExitCode.OK


def _refusal(queue: str, error: BrokerError) -> BrokerError:
    """Redis that answers is there, whatever it says: another exit status than when it is away."""
    text = f"queue {queue!r} was looked at in part: {error}"
    is_away = isinstance(error, BrokerUnavailable) and not error.refused
    return BrokerUnavailable(text) if is_away else BrokerError(text)


def _lines(found: Checked) -> Iterator[str]:
    for fault in found.faults:
        mark = MARKS["reparable" if fault.fix else fault.state]
        yield f"{mark}  {safe_text(fault.queue) or '-':<12} {fault.code:<11} {safe_text(str(fault))}"
        if fault.fix:
            yield f"        -> {safe_text(fault.fix)}"
    if any(fault.state == "reparable" for fault in found.faults):
        but = ", but no key of a wrong type" if any(fault.fix for fault in found.faults) else ""
        yield f"        -> fastq check --repair mends what is marked FAULT{but}"
    for queue in found.skipped:
        yield f"nothing else of {queue} was looked at: a key that this needs is of a wrong type"
    if not found.complete:
        yield "there is more than was looked at"
    mended = len(found.faults) - len(found.left)
    yield (
        f"{counted(found.queues, 'queue')}, {counted(found.jobs, 'job')}, {counted(found.keys, 'key')}: "
        f"{counted(len(found.left), 'fault')}" + (f", {mended:,} mended" if mended else "")
    )


verbs = {"check": check}
