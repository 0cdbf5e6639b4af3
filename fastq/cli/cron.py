"""``fastq cron ls|next``: the schedules that an application declares. They stand in code, so it is imported."""

from __future__ import annotations

import datetime as dt
import heapq
import time
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import click
import msgspec

from fastq.cli.root import Verbs
from fastq.cli.serve import APP, application
from fastq.cli.session import NotFound, Session, with_session
from fastq.cli.table import duration, rows
from fastq.errors import did_you_mean

if TYPE_CHECKING:
    from fastq.registry import Periodic

__all__ = ["verbs"]


class ScheduleInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One schedule; ``next_at`` in seconds since the epoch."""

    name: str
    task: str
    schedule: str
    tz: str
    misfire: str
    next_at: float


class Tick(msgspec.Struct, frozen=True, kw_only=True):
    """One instant of one schedule."""

    at: float
    name: str
    task: str


@click.group(cls=Verbs)
def cron() -> None:
    """List schedules and their next ticks."""


@cron.command("ls")
@APP
@with_session
def ls(session: Session, app: str) -> None:
    """List the schedules of APP."""
    now = time.time()
    found = [_info(periodic, now) for periodic in _schedules(session, app).values()]
    found.sort(key=lambda info: info.next_at)
    body = [(i.name, i.task, i.schedule, i.misfire, _wall(i.next_at, i.tz), duration(i.next_at - now)) for i in found]
    head = ("NAME", "TASK", "SCHEDULE", "MISFIRE", "NEXT", "IN")
    session.answer(found, rows(head, body) if found else ["this application has no schedule"])


@cron.command("next")
@click.argument("name", required=False)
@click.option("--app", metavar="APP", envvar="FASTQ_APP", default="", help="package.module:app (FASTQ_APP).")
@click.option("--count", "-n", type=click.IntRange(1, 200), default=10, show_default=True, help="So many ticks.")
@with_session
def upcoming(session: Session, name: str | None, app: str, count: int) -> None:
    """Print the next ticks, of the schedule NAME or of all."""
    schedules = _schedules(session, app)
    if name is not None and name not in schedules:
        raise NotFound(f"no schedule {name!r}{did_you_mean(name, schedules)}")
    now = time.time()
    chosen = [schedules[name]] if name else list(schedules.values())
    streams = [_ticks(periodic, now) for periodic in chosen]
    ticks = list(islice(heapq.merge(*streams, key=lambda tick: tick.at), count))
    zones = {periodic.name: _zone(periodic) for periodic in chosen}
    body = [(_wall(tick.at, zones[tick.name]), duration(tick.at - now), tick.name, tick.task) for tick in ticks]
    session.answer(ticks, rows(("AT", "IN", "NAME", "TASK"), body) if ticks else ["this application has no schedule"])


def _schedules(session: Session, app: str) -> dict[str, Periodic]:
    return dict(application(session.settings, app).periodic)


def _ticks(periodic: Periodic, now: float) -> Iterator[Tick]:
    at = now
    while True:
        at = periodic.schedule.next(at)
        yield Tick(at=at, name=periodic.name, task=periodic.task.name)


def _info(periodic: Periodic, now: float) -> ScheduleInfo:
    return ScheduleInfo(
        name=periodic.name,
        task=periodic.task.name,
        schedule=periodic.schedule.explain(),
        tz=_zone(periodic),
        misfire=periodic.misfire,
        next_at=periodic.schedule.next(now),
    )


def _zone(periodic: Periodic) -> str:
    return str(getattr(periodic.schedule, "tz", "UTC"))


def _wall(at: float, tz: str) -> str:
    """An instant on the schedule's own clock."""
    from zoneinfo import ZoneInfo

    return dt.datetime.fromtimestamp(at, ZoneInfo(tz)).strftime("%Y-%m-%d %H:%M:%S %Z")


verbs = {"cron": cron}
