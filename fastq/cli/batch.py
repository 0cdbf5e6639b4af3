"""``fastq batch``: how far a batch is, with a bar that moves; cancel it, close it for a producer that died."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

import click

from fastq.batch_handle import BatchStatus, status_of
from fastq.broker import batches
from fastq.broker.command import Operation
from fastq.broker.flows import ended_record
from fastq.broker.keys import QueueKeys
from fastq.cli.session import NotFound, Session, with_session
from fastq.cli.table import counted, duration, moment, rows
from fastq.errors import ExitCode, safe_text

__all__ = ["bar", "line", "verbs"]

WIDTH = 30
"""Characters of the bar."""

EVERY = 0.5
"""Seconds between two looks of --watch: the counts of a batch are one command."""

QUIET_AFTER = 60.0
"""Seconds without a new job after which a batch that is being filled is said to have lost its producer."""

HEAD = ("BATCH", "QUEUE", "TASK", "STATE", "TOTAL", "PENDING", "RUNNING", "SUCCESS", "FAILED", "CANCELLED", "SINCE")


def bar(status: BatchStatus) -> str:
    """What has ended of a batch, as a bar.

    >>> bar(BatchStatus(id="", queue="", task="", state="running", total=4, success=1, failed=1))
    '[###############...............]  50%'
    """
    filled = int(WIDTH * status.percent / 100)
    return f"[{'#' * filled}{'.' * (WIDTH - filled)}] {int(status.percent):3d}%"


def line(status: BatchStatus, rate: float | None = None) -> str:
    """One line on how far a batch is; ``rate``: jobs that end in a second."""
    counts = f"{status.done:,} of {status.total:,}{'+' if status.state == 'filling' else ''}"
    told = [counts, *(f"{n:,} {word}" for word, n in (("failed", status.failed), ("cancelled", status.cancelled)) if n)]
    if rate is not None and not status.final:
        told.append(f"{rate:,.0f}/s")
        if rate > 0 and status.state != "filling":
            told.append(f"{duration((status.total - status.done) / rate)} left")
    return f"{bar(status)}  {status.state}  {', '.join(told)}"


@click.command()
@click.argument("batch_id", required=False)
@click.option("--queue", "-q", help="Its queue; default: every one is asked.")
@click.option("--watch", "-w", is_flag=True, help="Go on until it has ended.")
@click.option(
    "--cancel", "action", flag_value="cancel", help="Take no more jobs, and cancel those that have not ended."
)
@click.option("--close", "action", flag_value="close", help="Its producer died: let it end, as incomplete.")
@with_session
def batch(session: Session, batch_id: str | None, queue: str | None, watch: bool, action: str | None) -> int:
    """Say how far a batch is, with a bar that moves; list those under way.

    Without an id they are listed. The id of its n-th job, from 0, is BATCH_ID-n. Exit status 1 when it has ended, and not as success.
    """
    inspector = session.inspector
    queues = session.run(inspector.parts(session.known_queue(queue) if queue else None))
    if batch_id is None:
        if watch or action:
            raise click.UsageError("--watch, --cancel and --close need the id of a batch", click.get_current_context())
        return _list(session, queues)
    q = session.run(_find(queues, batch_id))
    if q is None:
        raise NotFound(f"no batch {safe_text(batch_id)!r}: there was none of this id, or its result_ttl is over")
    before = _look(session, q, batch_id)
    if action == "cancel":
        record = ended_record("cancelled", "", 0)
        session.run(batches.cancel(q, batch_id, record, round(session.settings.result_ttl * 1_000)))
    elif action == "close":
        session.run(batches.close(q, batch_id, "torn"))
    status = _watch(session, q, batch_id) if watch else _look(session, q, batch_id)
    session.answer(status, _lines(status))
    if action and before.final:
        click.echo(f"fastq: nothing to {action}: it has ended as {before.state}", err=True)
        return ExitCode.CRASH
    return ExitCode.CRASH if status.final and status.state != "success" and not action else ExitCode.OK


def _lines(status: BatchStatus) -> Iterator[str]:
    yield f"{safe_text(status.task)} {status.id}  queue {status.queue}  since {moment(status.started_at)}"
    yield line(status)
    if not status.final:
        yield f"{counted(status.pending, 'job')} pending, {status.running:,} running"
    if status.incomplete:
        yield "incomplete: its producer gave up"
    quiet = time.time() - (status.filled_at or status.started_at)
    if status.state == "filling" and quiet > QUIET_AFTER:
        yield f"no job has come for {duration(quiet)}: if its producer died, end it with --close or --cancel"


def _list(session: Session, queues: Sequence[QueueKeys]) -> int:
    found = [status_of(batch_id, q.queue, seen) for q in queues for batch_id, seen in session.run(batches.listing(q))]
    table = [
        (s.id, s.queue, s.task, s.state, s.total, s.pending, s.running, s.success, s.failed, s.cancelled, moment(s.started_at))
        for s in found
    ]  # fmt: skip
    session.answer(found, rows(HEAD, table) if table else ["no batch is under way"])
    return ExitCode.OK


def _find(queues: Sequence[QueueKeys], batch_id: str) -> Operation[QueueKeys | None]:
    for q in queues:
        if (yield from batches.view(q, batch_id)) is not None:
            return q
    return None


def _look(session: Session, q: QueueKeys, batch_id: str) -> BatchStatus:
    found = session.run(batches.view(q, batch_id))
    if found is None:
        raise NotFound(f"batch {safe_text(batch_id)!r} has ended, and its result_ttl is over")
    return status_of(batch_id, q.queue, found)


def _watch(session: Session, q: QueueKeys, batch_id: str) -> BatchStatus:
    """Look until it has ended; on a terminal, in one line that changes."""
    live = not session.as_json and sys.stdout.isatty()
    status, before, rate = _look(session, q, batch_id), time.monotonic(), None
    while not status.final:
        if live:
            click.echo(f"\r\x1b[K{line(status, rate)}", nl=False)
        time.sleep(EVERY)
        done, now = status.done, time.monotonic()
        status = _look(session, q, batch_id)
        latest = (status.done - done) / (now - before)
        rate, before = latest if rate is None else rate + (latest - rate) * 0.2, now
    if live:
        click.echo("\r\x1b[K", nl=False)
    return status


verbs = {"batch": batch}
