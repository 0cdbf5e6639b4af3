"""``fastq check``: whether what lies in Redis fits together, and the repair of what does not."""

from __future__ import annotations

from collections.abc import Iterator

import click

from fastq.cli.session import Session, with_session
from fastq.cli.table import counted
from fastq.errors import ExitCode, safe_text

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
    from fastq.broker.checker import check as operation

    for name in queues:
        session.known_queue(name)
    found = session.run(operation(session.settings.prefix, queues or None, repair=repair))

    def lines() -> Iterator[str]:
        for fault in found.faults:
            yield f"{MARKS[fault.state]}  {safe_text(fault.queue) or '-':<12} {fault.code:<11} {safe_text(str(fault))}"
        if any(fault.state == "reparable" for fault in found.faults):
            yield "        -> fastq check --repair mends what is marked FAULT"
        if not found.complete:
            yield "there is more than was looked at"
        mended = len(found.faults) - len(found.left)
        yield (
            f"{counted(found.queues, 'queue')}, {counted(found.jobs, 'job')}, {counted(found.keys, 'key')}: "
            f"{counted(len(found.left), 'fault')}" + (f", {mended:,} mended" if mended else "")
        )

    session.answer({"faults": found.faults, **_counts(found)}, lines())
    return ExitCode.UNHEALTHY if found.left else ExitCode.OK


def _counts(found: object) -> dict[str, object]:
    return {name: getattr(found, name) for name in ("queues", "jobs", "keys", "complete")}


verbs = {"check": check}
