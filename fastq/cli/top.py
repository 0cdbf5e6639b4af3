"""``fastq top``: the status, live, with rates.

Redis counts no events for us, and need not: what came in and what was done follow from two looks. Records of finished
jobs are counted, so jobs with ``result_ttl=0`` are seen neither coming nor going.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import click
import msgspec

from fastq.broker.views import QueueInfo, WorkerInfo
from fastq.cli.session import Session, as_json, with_session
from fastq.cli.status import QUEUE_HEAD, WORKER_HEAD, look, queue_row, worker_row
from fastq.cli.table import Cell, rows
from fastq.errors import BrokerUnavailable, safe_text

__all__ = ["Rates", "rates", "verbs"]


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs a second of one queue between two looks."""

    arrived: float = 0.0
    done: float = 0.0
    died: float = 0.0


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """One look, and how it differs from the one before. ``at`` in seconds since the epoch."""

    at: float
    url: str
    queues: list[QueueInfo] = []
    rates: dict[str, Rates] = {}
    workers: list[WorkerInfo] = []
    scheduler: str | None = None
    error: str = ""


def rates(before: QueueInfo, after: QueueInfo, seconds: float) -> Rates:
    """What happened between two looks: what is neither there any more nor done has not been there.

    A purge, and a bucket of records that expires, make a number too small for once; never negative.
    """
    if seconds <= 0:
        return Rates()
    done = max(after.finished - before.finished, 0)
    died = max(after.dead - before.dead, 0)
    arrived = max(_unfinished(after) - _unfinished(before) + done + died, 0)
    return Rates(arrived=arrived / seconds, done=done / seconds, died=died / seconds)


def _unfinished(info: QueueInfo) -> int:
    return info.pending + info.scheduled + info.parked + info.running


@click.command()
@click.option(
    "--interval", "-i", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds between looks."
)
@click.option("--count", "-n", type=click.IntRange(1), help="End after so many looks.")
@with_session
def top(session: Session, interval: float, count: int | None) -> None:
    """Queues, workers and the scheduler, live. --json prints one object per look."""
    session.connection.connect()  # a wrong URL ends it here; from now on it survives an outage
    with _screen(session) as draw:
        for frame in _frames(session, interval, count):
            draw(frame)


def _frames(session: Session, interval: float, count: int | None) -> Iterator[Frame]:
    previous: dict[str, QueueInfo] = {}
    looked_at = time.monotonic()
    left = count
    while left is None or left > 0:
        begun = time.monotonic()
        frame = _look(session, previous, begun - looked_at)
        yield frame
        if not frame.error:
            previous, looked_at = {info.name: info for info in frame.queues}, begun
        left = None if left is None else left - 1
        if left != 0:
            time.sleep(max(0.0, interval - (time.monotonic() - begun)))


def _look(session: Session, previous: Mapping[str, QueueInfo], seconds: float) -> Frame:
    url = session.connection.endpoint.shown
    try:
        queues, workers, leader = session.run(look(session.inspector))
    except BrokerUnavailable as error:
        return Frame(at=time.time(), url=url, error=str(error))
    changes = {info.name: rates(previous[info.name], info, seconds) for info in queues if info.name in previous}
    return Frame(at=time.time(), url=url, queues=queues, rates=changes, workers=workers, scheduler=leader)


# -- screens --------------------------------------------------------------------------------------


Draw = Callable[[Frame], None]


def _screen(session: Session) -> AbstractContextManager[Draw]:
    if session.as_json:
        return _printed(lambda frame: as_json(frame).decode())
    if not sys.stdout.isatty():
        return _printed(lambda frame: "\n".join(_lines(frame)) + "\n")
    try:
        import rich  # noqa: F401 - the extra `cli`
    except ImportError:
        return _redrawn()
    return _rich()


@contextmanager
def _printed(shape: Callable[[Frame], str]) -> Iterator[Draw]:
    """One text after the other, for pipes and files."""
    yield lambda frame: click.echo(shape(frame))


@contextmanager
def _redrawn() -> Iterator[Draw]:
    """The same place of the terminal's second screen, drawn over."""
    click.echo("\x1b[?1049h\x1b[?25l", nl=False)
    try:
        yield lambda frame: click.echo("\x1b[H\x1b[J" + "\n".join(_fitting(_lines(frame))), nl=False)
    finally:
        click.echo("\x1b[?25h\x1b[?1049l", nl=False)


def _fitting(lines: Iterator[str]) -> Iterator[str]:
    """What fits on the screen, so that it does not scroll."""
    import shutil

    width, height = shutil.get_terminal_size()
    for _, line in zip(range(height - 1), lines, strict=False):
        yield line[: width - 1]


@contextmanager
def _rich() -> Iterator[Draw]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def table(head: Sequence[str], body: Sequence[Sequence[Cell]]) -> Table:
        made = Table(box=None, pad_edge=False, header_style="bold")
        for i, name in enumerate(head):
            numbers = any(isinstance(row[i], int) for row in body)
            made.add_column(name, justify="right" if numbers or name.endswith("/S") else "left", no_wrap=True)
        for row in body:
            made.add_row(*(_styled(name, value) for name, value in zip(head, row, strict=True)))
        return made

    def _styled(name: str, value: Cell) -> Text:
        text = "-" if value is None or value == "" else safe_text(str(value), 60)
        alarming = (name == "DEAD" and value) or value in ("lost", "paused") or (name == "WORKERS" and value == 0)
        return Text(text, style="red" if alarming else "dim" if text in ("-", "0", "0.0") else "")

    def group(frame: Frame) -> Group:
        queues, workers = _queue_rows(frame), [worker_row(worker) for worker in frame.workers]
        parts: list[Any] = [Text(_title(frame), style="bold red" if frame.error else "bold"), Text("")]
        if queues:
            parts += [table(TOP_HEAD, queues), Text("")]
        if workers:
            parts.append(table(WORKER_HEAD, workers))
        return Group(*parts)

    with Live(console=Console(), screen=True, auto_refresh=False) as live:
        yield lambda frame: live.update(group(frame), refresh=True)


TOP_HEAD = (*QUEUE_HEAD[:-1], "IN/S", "DONE/S", QUEUE_HEAD[-1])


def _queue_rows(frame: Frame) -> list[tuple[Cell, ...]]:
    found: list[tuple[Cell, ...]] = []
    for info in frame.queues:
        row, rate = queue_row(info), frame.rates.get(info.name, Rates())
        found.append((*row[:-1], f"{rate.arrived:.1f}", f"{rate.done:.1f}", row[-1]))
    return found


def _title(frame: Frame) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(frame.at))
    if frame.error:
        return f"fastq {clock}  {safe_text(frame.error)}"
    arrived = sum(rate.arrived for rate in frame.rates.values())
    done = sum(rate.done for rate in frame.rates.values())
    died = sum(rate.died for rate in frame.rates.values())
    leader = safe_text(frame.scheduler) if frame.scheduler else "none runs"
    return f"fastq {clock}  {frame.url}  in {arrived:.1f}/s  done {done:.1f}/s  dead {died:.1f}/s  scheduler: {leader}"


def _lines(frame: Frame) -> Iterator[str]:
    yield _title(frame)
    yield ""
    if frame.queues:
        yield from rows(TOP_HEAD, _queue_rows(frame))
        yield ""
    if frame.workers:
        yield from rows(WORKER_HEAD, [worker_row(worker) for worker in frame.workers])


verbs = {"top": top}
