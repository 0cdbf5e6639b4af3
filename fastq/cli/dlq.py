"""``fastq dlq ls|show|replay|purge``: the dead-letter queues."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click
import msgspec

from fastq.cli.root import Verbs
from fastq.cli.session import NotFound, Session, confirmed, with_session
from fastq.cli.table import counted, moment, pairs, rows
from fastq.errors import ExitCode, safe_text
from fastq.job import DeadLetter

__all__ = ["verbs"]

HEAD = ("ID", "QUEUE", "TASK", "ATTEMPTS", "FAILED", "REASON", "ERROR")
BATCH = 100
"""Dead letters sent back between two looks at --rate."""


@click.group(cls=Verbs)
def dlq() -> None:
    """List, show, replay and purge dead letters."""


@dlq.command("ls")
@click.argument("queue", required=False)
@click.option("--limit", "-n", type=click.IntRange(1, 200), default=50, show_default=True, help="At most so many.")
@click.option("--offset", type=click.IntRange(0), default=0, help="Skip so many of each queue.")
@with_session
def ls(session: Session, queue: str | None, limit: int, offset: int) -> None:
    """List dead letters, the latest first."""
    names = [session.known_queue(queue)] if queue else session.run(session.inspector.queues())
    letters = [letter for name in names for letter in session.run(session.inspector.dead(name, offset, limit))]
    letters = sorted(letters, key=lambda letter: letter.failed_at, reverse=True)[:limit]
    body = [
        (x.id, x.queue, x.task, x.attempts, moment(x.failed_at), x.reason, f"{x.error_type}: {x.error_message}")
        for x in letters
    ]
    session.answer(letters, rows(HEAD, body) if letters else ["no dead letter"])


@dlq.command("groups")
@click.argument("queue")
@with_session
def groups_of(session: Session, queue: str) -> None:
    """Count the dead letters of QUEUE by what they died of, the largest group first."""
    from fastq.broker.letters import groups

    found = session.run(groups(session.inspector, session.known_queue(queue)))
    head = ("GROUP", "COUNT", "TASK", "REASON", "FIRST", "LAST", "ERROR")
    body = [
        (g.fingerprint, g.count, g.task, g.reason, moment(g.first), moment(g.last), f"{g.error_type}: {g.message}")
        for g in found
    ]
    session.answer(found, rows(head, body) if found else ["no dead letter"])


@dlq.command()
@click.argument("job_id", metavar="ID")
@click.option("--queue", "-q", metavar="QUEUE", help="Where it is; saves asking all queues.")
@with_session
def show(session: Session, job_id: str, queue: str | None) -> None:
    """Show one dead letter: why it failed, where, and with which arguments."""
    letter = session.run(session.inspector.dead_show(job_id, queue))
    if letter is None:
        raise NotFound(f"no dead letter {job_id!r} in {f'queue {queue!r}' if queue else 'any queue'}")
    session.answer(letter, _letter_lines(letter))


def _letter_lines(letter: DeadLetter) -> Iterator[str]:
    fields = msgspec.structs.asdict(letter)
    trace, body = fields.pop("traceback"), fields.pop("body")
    fields |= {"failed_at": moment(letter.failed_at), "enqueued_at": moment(letter.enqueued_at)}
    fields["started_at"] = moment(letter.started_at)
    yield from pairs({**fields, "arguments": _arguments(body)})
    if trace:
        yield "traceback"
        for line in trace.splitlines():
            yield f"  {safe_text(line)}"  # indented: no line of it can be taken for one of ours


def _arguments(body: bytes) -> str:
    """The arguments for people; the bare bytes of what cannot be decoded."""
    try:
        return repr(msgspec.msgpack.decode(body))
    except Exception:  # noqa: BLE001 - whatever stands there
        return repr(body)


@dlq.command()
@click.argument("queue")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option(
    "--limit", "-n", type=click.IntRange(1), default=100, show_default=True, help="At most so many, oldest first."
)
@click.option("--all", "everything", is_flag=True, help="All that are dead now.")
@click.option("--task", metavar="TASK", help="Only those of this task.")
@click.option("--error", metavar="TYPE", help="Only those that died of this type of error.")
@click.option("--group", metavar="GROUP", help="Only those of this group; see dlq groups.")
@click.option("--rate", type=click.FloatRange(0.1), help="At most so many a second.")
@click.option("--dry-run", is_flag=True, help="Only count.")
@with_session
def replay(
    session: Session,
    queue: str,
    ids: tuple[str, ...],
    limit: int,
    everything: bool,
    task: str | None,
    error: str | None,
    group: str | None,
    rate: float | None,
    dry_run: bool,
) -> int:
    """Send dead letters of QUEUE back, with a fresh budget of attempts: the IDs, or the oldest ones.

    May be interrupted and called again: what was sent back is not sent twice.
    """
    session.known_queue(queue)
    from fastq.broker.letters import Filter, chosen

    wanted = None if everything else limit
    which = Filter(task=task, error=error, group=group)
    if which and ids:
        raise click.UsageError("give IDs, or --task, --error and --group", click.get_current_context())
    if which:
        ids = tuple(session.run(chosen(session.inspector, queue, which, wanted)))
        if not ids:
            session.answer(
                {"queue": queue, "replayed": 0, "undecodable": [], "missing": []}, [f"{queue}: none of them"]
            )
            return ExitCode.OK
    value: dict[str, Any] = {"queue": queue, "replayed": 0, "undecodable": [], "missing": []}
    if ids:
        _replay_ids(session, queue, list(ids), None if dry_run else rate, value, dry_run=dry_run)
    else:
        paced = rate is not None and not dry_run
        for size in _batches(wanted, paced=paced):
            begun = time.monotonic()
            report = session.run(session.inspector.replay_report(queue, None, size, dry_run=dry_run))
            value["replayed"] += report.replayed
            value["undecodable"], value["missing"] = report.undecodable, report.missing
            if not report.replayed:
                break
            if paced and rate:
                time.sleep(max(0.0, report.replayed / rate - (time.monotonic() - begun)))
    session.answer(value, _report(value, dry_run=dry_run))
    return ExitCode.CRASH if value["undecodable"] or value["missing"] else ExitCode.OK


def _replay_ids(
    session: Session, queue: str, ids: list[str], rate: float | None, value: dict[str, Any], *, dry_run: bool
) -> None:
    from fastq.broker.letters import paced

    for piece, pause in paced(ids, rate):
        report = session.run(session.inspector.replay_report(queue, piece, dry_run=dry_run))
        value["replayed"] += report.replayed
        value["undecodable"] += report.undecodable
        value["missing"] += report.missing
        time.sleep(pause)


def _batches(wanted: int | None, *, paced: bool) -> Iterator[int | None]:
    """The limits of the calls that a replay is made of: one, or small ones with pauses between them."""
    if not paced:
        yield wanted
        return
    while wanted is None or wanted > 0:
        size = BATCH if wanted is None else min(BATCH, wanted)
        yield size
        wanted = None if wanted is None else wanted - size


def _report(value: dict[str, Any], *, dry_run: bool) -> Iterator[str]:
    yield f"{value['queue']}: {counted(value['replayed'], 'job')} {'would be ' if dry_run else ''}sent back"
    for name, why in (("undecodable", "cannot be read and stay"), ("missing", "are not in this dead-letter queue")):
        found = value[name]
        if found:
            yield f"{len(found)} {why}: {safe_text(', '.join(found[:10]))}{' …' if len(found) > 10 else ''}"


@dlq.command()
@click.argument("queue")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--older-than", metavar="DURATION", help="Those that died longer ago: 7d, 12h, 30m.")
@click.option("--all", "everything", is_flag=True, help="All that are dead now.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_session
def purge(
    session: Session, queue: str, ids: tuple[str, ...], older_than: str | None, everything: bool, yes: bool
) -> int:
    """Delete dead letters of QUEUE, for good: the IDs, those --older-than, or --all."""
    if bool(ids) + bool(older_than) + everything != 1:
        raise click.UsageError("give one of IDs, --older-than and --all", click.get_current_context())
    from fastq.values import parse_duration

    age = parse_duration(older_than) if older_than else None
    session.known_queue(queue)
    which = f"{len(ids)}" if ids else f"those older than {older_than}" if older_than else "all"
    confirmed(f"Delete dead letters of queue {queue!r} ({which})?", yes=yes or bool(ids))
    count = session.run(session.inspector.purge_dead(queue, ids or None, age))
    missing = len(set(ids)) - count if ids else 0
    told = [f"{queue}: {counted(count, 'dead letter')} deleted"]
    told += [f"{missing:,} are not in this dead-letter queue"] if missing else []
    session.answer({"queue": queue, "purged": count}, told)
    return ExitCode.CRASH if missing else ExitCode.OK


verbs = {"dlq": dlq}
