"""``fastq jobs ls|show|cancel|retry``."""

from __future__ import annotations

import click
import msgspec

from fastq.cli.root import Verbs
from fastq.cli.session import NotFound, Session, with_session
from fastq.cli.table import Cell, moment, pairs, rows
from fastq.errors import ExitCode, safe_text
from fastq.job import JobState, JobStatus, Progress

__all__ = ["verbs"]

STATES = [state.value for state in JobState]
QUEUE = click.option("--queue", "-q", metavar="QUEUE", help="Where the job is; saves asking all queues.")

RETRIED = {
    "replayed": "sent back with a fresh budget of attempts",
    "promoted": "due now",
    "pending": "is pending already",
    "running": "is running already",
    "success": "has succeeded: enqueue it again",
    "cancelled": "was cancelled: enqueue it again",
    "undecodable": "cannot be read and stays in the dead-letter queue: see fastq dlq show",
    "unknown": "no such job",
}
CANCELLED = {
    "cancelled": "cancelled",
    "requested": "is running: its worker was asked to stop it, and it will not run again",
    "unknown": "no such job that could still be cancelled",
}


@click.group(cls=Verbs)
def jobs() -> None:
    """List, show, cancel and retry jobs."""


@jobs.command("ls")
@click.argument("queue", required=False)
@click.option("--state", "-s", type=click.Choice(STATES), default="pending", show_default=True, help="Which jobs.")
@click.option("--limit", "-n", type=click.IntRange(1, 200), default=50, show_default=True, help="At most so many.")
@click.option("--offset", type=click.IntRange(0), default=0, help="Skip so many; needs QUEUE.")
@with_session
def ls(session: Session, queue: str | None, state: str, limit: int, offset: int) -> None:
    """List the jobs of one state, in QUEUE or in all queues.

    Pending jobs come in the order in which they will run, scheduled ones by due time, failed ones latest first.
    """
    if offset and not queue:
        raise click.UsageError("--offset needs a QUEUE", click.get_current_context())
    names = [session.known_queue(queue)] if queue else session.run(session.inspector.queues())
    found: list[JobStatus] = []
    for name in names:
        if len(found) < limit:
            found += session.run(session.inspector.jobs(name, state, offset, limit - len(found)))
    head, body = _columns(found)
    session.answer(found, rows(head, body) if found else [f"no {state} job"])


def _columns(found: list[JobStatus]) -> tuple[list[str], list[list[Cell]]]:
    """The columns that say something for these jobs."""
    head = ["ID", "QUEUE", "TASK", "PRIORITY", "ATTEMPTS", "ENQUEUED", "DUE", "FINISHED", "WORKER", "LAST ERROR"]
    body: list[list[Cell]] = [
        [
            job.id,
            job.queue,
            job.task,
            job.priority,
            job.attempts,
            moment(job.enqueued_at),
            moment(job.due_at),
            moment(job.finished_at),
            job.worker,
            job.last_error,
        ]
        for job in found
    ]
    kept = [i for i in range(len(head)) if i < 2 or any(row[i] not in (None, "") for row in body)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in body]


@jobs.command()
@click.argument("job_id", metavar="ID")
@QUEUE
@with_session
def show(session: Session, job_id: str, queue: str | None) -> None:
    """Show one job: state, attempts, times, result, last error."""
    status = session.run(session.inspector.status(job_id, queue))
    if status is None:
        raise NotFound(
            f"no job {job_id!r} in {f'queue {queue!r}' if queue else 'any queue'}, or its record has expired"
        )
    fields = msgspec.structs.asdict(status)
    for name in fields:
        if name.endswith("_at"):
            fields[name] = moment(fields[name])
    if status.result is not None:
        fields["result"] = repr(status.result)
    fields["progress"] = _how_far(status.progress)
    session.answer(status, pairs(fields))


def _how_far(progress: Progress | None) -> str:
    """What the handler said last, for people."""
    if progress is None:
        return ""
    total = "" if progress.total is None else f" of {progress.total:g}"
    done = "" if progress.current is None else f"{progress.current:g}{total}"
    word = "" if progress.state == "PROGRESS" else progress.state
    return ": ".join(part for part in (word, done, progress.message) if part)


def _each(
    session: Session, ids: tuple[str, ...], answers: dict[str, str], words: dict[str, str], good: set[str]
) -> int:
    """Say what became of each id; the exit status is 1 unless all went well."""
    session.answer(answers, [f"{safe_text(job_id)}: {words.get(answer, answer)}" for job_id, answer in answers.items()])
    return ExitCode.OK if set(answers.values()) <= good and len(answers) == len(set(ids)) else ExitCode.CRASH


@jobs.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@QUEUE
@click.option("--terminate", is_flag=True, help="Interrupt a running handler, too.")
@with_session
def cancel(session: Session, ids: tuple[str, ...], queue: str | None, terminate: bool) -> int:
    """Take scheduled, parked or pending jobs out, and ask the workers of running ones to stop them.

    A running job is told (`job.cancelled`) and will not run again; --terminate interrupts it.
    """
    answers = {job_id: session.run(session.inspector.cancel(job_id, queue, terminate=terminate)) for job_id in ids}
    return _each(session, ids, answers, CANCELLED, {"cancelled", "requested"})


@jobs.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@QUEUE
@with_session
def retry(session: Session, ids: tuple[str, ...], queue: str | None) -> int:
    """Run jobs now: a failed one is replayed, a scheduled one is made due."""
    answers = {job_id: session.run(session.inspector.retry(job_id, queue)) for job_id in ids}
    return _each(session, ids, answers, RETRIED, {"replayed", "promoted", "pending", "running"})


@click.command()
@click.argument("job_id", metavar="ID")
@QUEUE
@with_session
def explain(session: Session, job_id: str, queue: str | None) -> int:
    """Say why a job does not run.

    Its queue is paused, it is due later, parked under a limit, behind others, nobody serves it or knows its task.
    """
    from fastq.broker.explain import explain as asked

    found = session.run(asked(session.inspector, job_id, queue))
    head = f"{job_id}: {found.state.value if found.state else 'unknown'}" + (
        f" in queue {found.queue}" if found.queue else ""
    )
    session.answer(found, [head, *(f"  {safe_text(cause.text)}" for cause in found.causes)])
    return ExitCode.OK if found.state else ExitCode.CRASH


verbs = {"jobs": jobs, "explain": explain}
