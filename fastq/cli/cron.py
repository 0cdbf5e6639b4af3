"""``fastq cron``: the schedules that an application declares (``ls``, ``next``; it is imported), and those in Redis."""

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
from fastq.cron import Cron, Every
from fastq.errors import UnknownTask, did_you_mean
from fastq.job import TASK_NAME
from fastq.timetable import definition
from fastq.values import check_queue_name, parse_duration

if TYPE_CHECKING:
    from fastq.broker.planner import Planner
    from fastq.registry import Periodic

__all__ = ["verbs"]


_NONE = "this application declares no schedule; 'fastq cron status' lists those in Redis"


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
    """List schedules, and change those in Redis."""


@cron.command("ls")
@APP
@with_session
def ls(session: Session, app: str) -> None:
    """List the schedules that APP declares; ``fastq cron status`` lists those in Redis."""
    now = time.time()
    found = [_info(periodic, now) for periodic in _schedules(session, app).values()]
    found.sort(key=lambda info: info.next_at)
    body = [(i.name, i.task, i.schedule, i.misfire, _wall(i.next_at, i.tz), duration(i.next_at - now)) for i in found]
    head = ("NAME", "TASK", "SCHEDULE", "MISFIRE", "NEXT", "IN")
    session.answer(found, rows(head, body) if found else [_NONE])


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
    session.answer(ticks, rows(("AT", "IN", "NAME", "TASK"), body) if ticks else [_NONE])


# -- those in Redis -------------------------------------------------------------------------------


@cron.command("status")
@with_session
def status(session: Session) -> None:
    """List the schedules in Redis, with their last and next runs."""
    found = session.run(_planner(session).list({}))
    now = time.time()
    body = [
        (
            i.name,
            i.task,
            i.queue,
            i.schedule,
            "paused" if i.paused else _ahead(i.next_run, now),
            "never" if i.last_run is None else f"{duration(now - i.last_run)} ago",
            i.last_status or "-",
            i.source or "run time",
        )
        for i in found
    ]
    head = ("NAME", "TASK", "QUEUE", "SCHEDULE", "NEXT", "LAST", "STATUS", "FROM")
    session.answer(found, rows(head, body) if found else ["there is no schedule"])


def _ahead(at: float | None, now: float) -> str:
    return "-" if at is None else f"in {duration(max(at - now, 0))}"


@cron.command("history")
@click.argument("name")
@with_session
def history(session: Session, name: str) -> None:
    """Print the last runs of the schedule NAME."""
    runs = session.run(_planner(session).history(name))
    found = [{"tick": run.tick, "job_id": run.job_id, "at": run.at, "state": run.state} for run in runs]
    body = [
        (_wall(r.at, "UTC"), "by hand" if r.tick is None else _wall(r.tick, "UTC"), r.state, r.job_id) for r in runs
    ]
    session.answer(found, rows(("FIRED", "TICK", "STATE", "JOB"), body) if found else ["it has not run yet"])


@cron.command("pause")
@click.argument("name")
@with_session
def pause(session: Session, name: str) -> None:
    """Let the schedule NAME rest until it is resumed."""
    session.run(_planner(session).pause(name, paused=True))
    session.answer({"name": name, "paused": True}, [f"{name} is paused"])


@cron.command("resume")
@click.argument("name")
@with_session
def resume(session: Session, name: str) -> None:
    """Let the schedule NAME go on with its next tick."""
    session.run(_planner(session).pause(name, paused=False))
    session.answer({"name": name, "paused": False}, [f"{name} goes on"])


@cron.command("run")
@click.argument("name")
@with_session
def run(session: Session, name: str) -> None:
    """Enqueue a job of the schedule NAME now; prints the job's id."""
    job = session.run(_planner(session).run_now(name))
    session.answer({"name": name, "id": job}, [job])


@cron.command("rm")
@click.argument("name")
@with_session
def rm(session: Session, name: str) -> None:
    """Remove the schedule NAME; one of the code comes back with the next start of a scheduler."""
    if not session.run(_planner(session).remove(name)):
        session.run(_planner(session).find(name))  # raises, with a hint
    session.answer({"name": name, "removed": True}, [f"{name} is removed"])


@cron.command("add")
@click.argument("name")
@click.argument("task")
@click.option("--cron", "expression", metavar="EXPR", help="Five fields, or @daily and the like.")
@click.option("--every", metavar="DURATION", help="An interval: 30s, 5m, 1d.")
@click.option("--tz", default="UTC", show_default=True, help="The zone of the expression.")
@click.option("--args", "arguments", metavar="JSON", default="{}", help='Arguments of the task: {"to": "…"} or […].')
@click.option("--queue", "-q", help="Default: the setting default_queue.")
@click.option("--overlap", type=click.Choice(["allow", "skip", "queue", "cancel"]), help="While its last job lives.")
@click.option("--misfire", type=click.Choice(["skip", "once", "all"]), help="Ticks that nobody fired.")
@with_session
def add(
    session: Session,
    name: str,
    task: str,
    expression: str | None,
    every: str | None,
    tz: str,
    arguments: str,
    queue: str | None,
    overlap: str | None,
    misfire: str | None,
) -> None:
    """Enqueue TASK again and again, under the name NAME; one of the same name is replaced."""
    from fastq.broker.keys import QueueKeys
    from fastq.cli.enqueue import body_of, warn_of_unknown

    if (expression is None) == (every is None):
        raise click.UsageError("give one of --cron and --every", click.get_current_context())
    if not TASK_NAME.match(task):
        raise UnknownTask(f"{task!r:.250} is not a task name: 1 to 200 characters of A-Z a-z 0-9 _ . : -")
    schedule = Cron(expression, tz) if expression is not None else Every(parse_duration(every))
    given = {"overlap": overlap, "misfire": misfire}
    options = {option: value for option, value in given.items() if value is not None}
    new = definition(name, task, body_of(task, arguments), schedule, options)
    chosen = check_queue_name(session.settings.default_queue if queue is None else queue)
    session.run(_planner(session).put(chosen, new))
    session.answer({"name": name, "schedule": new.explain()}, [f"{name}: {new.explain()}"])
    warn_of_unknown(session, QueueKeys(session.settings.prefix, chosen), task)


def _planner(session: Session) -> Planner:
    from fastq.broker.planner import Planner

    return Planner(session.settings.prefix)


# -- those of the code ----------------------------------------------------------------------------


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
        misfire=definition(periodic.name, periodic.task.name, b"", periodic.schedule, periodic.options).misfire,
        next_at=periodic.schedule.next(now),
    )


def _zone(periodic: Periodic) -> str:
    return str(getattr(periodic.schedule, "tz", "UTC"))


def _wall(at: float, tz: str) -> str:
    """An instant on the schedule's own clock."""
    from zoneinfo import ZoneInfo

    return dt.datetime.fromtimestamp(at, ZoneInfo(tz)).strftime("%Y-%m-%d %H:%M:%S %Z")


verbs = {"cron": cron}
