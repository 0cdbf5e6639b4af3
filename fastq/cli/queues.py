"""``fastq queues ls|pause|resume|purge``."""

from __future__ import annotations

import click

from fastq.cli.root import Verbs
from fastq.cli.session import Session, confirmed, with_session
from fastq.cli.status import QUEUE_HEAD, queue_row
from fastq.cli.table import counted, rows

__all__ = ["verbs"]

NAME = click.argument("queue")


@click.group(cls=Verbs)
def queues() -> None:
    """List, pause, resume and purge queues."""


@queues.command("ls")
@with_session
def ls(session: Session) -> None:
    """List the queues and what there is in them."""
    infos = session.run(session.inspector.overview())
    session.answer(infos, rows(QUEUE_HEAD, [queue_row(info) for info in infos]) if infos else ["no queue yet"])


@queues.command()
@NAME
@with_session
def pause(session: Session, queue: str) -> None:
    """Let workers take nothing more from QUEUE. What runs goes on; jobs may still be enqueued."""
    changed = session.run(session.inspector.pause(session.known_queue(queue)))
    session.answer({"queue": queue, "changed": changed}, [f"{queue}: {'paused' if changed else 'was paused already'}"])


@queues.command()
@NAME
@with_session
def resume(session: Session, queue: str) -> None:
    """Undo pause."""
    changed = session.run(session.inspector.resume(session.known_queue(queue)))
    session.answer({"queue": queue, "changed": changed}, [f"{queue}: {'resumed' if changed else 'was not paused'}"])


@queues.command()
@NAME
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_session
def purge(session: Session, queue: str, yes: bool) -> None:
    """Delete the pending, scheduled and parked jobs of QUEUE, for good. Running jobs and dead letters stay."""
    session.known_queue(queue)
    confirmed(f"Delete every pending, scheduled and parked job of queue {queue!r}?", yes=yes)
    count = session.run(session.inspector.purge(queue))
    session.answer({"queue": queue, "purged": count}, [f"{queue}: {counted(count, 'job')} deleted"])


verbs = {"queues": queues}
