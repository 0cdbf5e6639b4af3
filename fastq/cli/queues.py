"""``fastq queues ls|pause|resume|purge``."""

from __future__ import annotations

import click
import msgspec

from fastq.broker.pauses import Pause
from fastq.cli.root import Verbs
from fastq.cli.session import Session, confirmed, with_session
from fastq.cli.status import queue_lines
from fastq.cli.table import counted
from fastq.errors import safe_text

__all__ = ["verbs"]

NAME = click.argument("queue")
SOME = click.argument("queue", required=False)
TASK = click.option("--task", help="This task only, in QUEUE or in all queues.")
WHERE = click.option(
    "--where", multiple=True, metavar="NAME=VALUE", help="Of the task, only calls with this argument; may be repeated."
)


@click.group(cls=Verbs)
def queues() -> None:
    """List, pause, resume and purge queues."""


@queues.command("ls")
@with_session
def ls(session: Session) -> None:
    """List the queues, what there is in them, and the tasks that are paused."""
    infos = session.run(session.inspector.overview())
    session.answer(infos, queue_lines(infos, session.run(session.inspector.paused_tasks())))


@queues.command()
@SOME
@TASK
@WHERE
@with_session
def pause(session: Session, queue: str | None, task: str | None, where: tuple[str, ...]) -> None:
    """Let workers take nothing more from QUEUE, or start no more jobs of a task. What runs goes on; jobs may still be enqueued."""
    _change(session, queue, task, where, begin=True)


@queues.command()
@SOME
@TASK
@WHERE
@with_session
def resume(session: Session, queue: str | None, task: str | None, where: tuple[str, ...]) -> None:
    """Undo the same pause."""
    _change(session, queue, task, where, begin=False)


def _change(session: Session, queue: str | None, task: str | None, where: tuple[str, ...], *, begin: bool) -> None:
    inspector = session.inspector
    if queue is not None:
        session.known_queue(queue)
    if task is None:
        if queue is None or where:
            raise click.UsageError("name a QUEUE, or a --task (--where chooses calls of a task)")
        what = queue
        changed = session.run(inspector.pause(queue) if begin else inspector.resume(queue))
    else:
        pause = Pause(task, dict(map(_argument, where)))
        what = str(pause) + (f" in {queue}" if queue else "")
        queues = [queue] if queue else session.run(inspector.queues())
        if not queues:
            raise click.ClickException("there is no queue yet: nothing could be paused")
        changed = session.run((inspector.pause_task if begin else inspector.resume_task)(pause, queues))
    words = ("paused", "was paused already") if begin else ("resumed", "was not paused")
    session.answer(
        {"queue": queue, "changed": changed} | ({"task": task} if task else {}),
        [f"{what}: {words[0 if changed else 1]}"],
    )
    if task is not None and begin:
        _warn_of_unknown(session, queue, task)


def _warn_of_unknown(session: Session, queue: str | None, task: str) -> None:
    """On stderr, if the live workers do not know the task."""
    from fastq.broker.explain import unknown_everywhere

    if text := session.run(unknown_everywhere(session.run(session.inspector.parts(queue)), task)):
        click.echo(f"fastq: {safe_text(text)}", err=True)


def _argument(text: str) -> tuple[str, object]:
    """``tenant_id=42``: JSON where it is, else text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise click.UsageError(f"--where {text!r}: write NAME=VALUE")
    try:
        return name, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return name, value


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
