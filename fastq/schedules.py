"""Schedules of an application: those of its code, declared to Redis; and ``app.schedules``, to change them at run time."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar, Unpack, cast

import msgspec

from fastq.arguments import check_size, encode_untyped
from fastq.broker.command import Operation
from fastq.broker.planner import Declared, Planner
from fastq.config import Settings
from fastq.cron import Cron, Every, Schedule
from fastq.errors import ConfigError, TaskDefinitionError, UnknownTask, did_you_mean
from fastq.job import TASK_NAME, Seconds
from fastq.registry import Periodic
from fastq.task import Task, TaskOptions
from fastq.timetable import (
    Definition,
    ScheduleInfo,
    ScheduleOptions,
    ScheduleRun,
    Written,
    as_schedule,
    definition,
    read_table,
)

__all__ = ["Schedules", "Scheduling", "declared_by"]

T = TypeVar("T")

_NO_DEFAULTS = TaskOptions()


class Home(Protocol):
    """Whose schedules they are: the application."""

    tasks: dict[str, Task[..., Any]]
    periodic: dict[str, Periodic]
    written: dict[str, Written]

    @property
    def settings(self) -> Settings:
        """As they are now."""
        ...

    def queue_of(self, task: str, declared: str | None) -> str:
        """Where the jobs of a task go."""
        ...

    def max_body(self) -> int:
        """Most bytes of a body."""
        ...

    def run(self, operation: Operation[T]) -> Coroutine[Any, Any, T]:
        """Run an operation on this event loop's connection."""
        ...

    def run_sync(self, operation: Operation[T]) -> T:
        """Run one from blocking code."""
        ...


# -- those of the code -----------------------------------------------------------------------------


def declared_by(app: Home, source: str) -> list[Declared]:
    """The schedules of an application's code, of its ``beat_schedule`` and of its settings.

    Raises:
        InvalidArguments, BodyTooLarge: the arguments of one do not fit its task.
        UnknownTask, ConfigError, TaskDefinitionError: one names no task of this application, cannot be read, or is
            there twice.
    """
    source = source or "entry points"
    found = [_declared(app, entry, entry.task, source) for entry in app.periodic.values()]
    others = (*app.written.values(), *_of_settings(app))
    found += [_declared(app, written, _task_of(app, written), source) for written in others]
    for name, count in Counter(entry.definition.name for entry in found).items():
        if count > 1:
            raise TaskDefinitionError(
                f"the schedule {name!r} is defined twice, in code and settings: give one another name"
            )
    return found


def _of_settings(app: Home) -> Sequence[Written]:
    try:
        table = msgspec.json.decode(app.settings.schedules or "[]")
    except msgspec.DecodeError as error:
        raise ConfigError(f"the setting schedules is no JSON: {error}") from None
    return list(read_table(table, "schedules"))


def _declared(app: Home, entry: Periodic | Written, task: Task[..., Any], source: str) -> Declared:
    body = task.arguments.encode(entry.args, entry.kwargs)
    made = _definition(app, entry.name, task.name, body, entry.schedule, entry.options, task.defaults, source)
    own = None if isinstance(entry.schedule, Cron | Every) else entry.schedule
    return Declared(_queue(app, task.name, entry.options, task.defaults), made, own)


def _task_of(app: Home, entry: Written) -> Task[..., Any]:
    """The registered task that is meant: by its name, by ``module:function`` or ``module.function``, by the last part."""
    if entry.task in app.tasks:
        return app.tasks[entry.task]
    path = entry.task.replace(":", ".")
    for task in app.tasks.values():
        if path == f"{getattr(task.fn, '__module__', '')}.{getattr(task.fn, '__qualname__', '')}":
            return task
    short = path.rpartition(".")[2]
    if short in app.tasks:
        return app.tasks[short]
    raise UnknownTask(f"schedule {entry.name!r}: no task is named {entry.task!r:.250}{did_you_mean(short, app.tasks)}")


def _queue(app: Home, task: str, options: Mapping[str, Any], defaults: TaskOptions) -> str:
    return str(options.get("queue") or app.queue_of(task, defaults.queue))


def _definition(
    app: Home,
    name: str,
    task: str,
    body: bytes,
    schedule: Schedule,
    options: Mapping[str, Any],
    defaults: TaskOptions,
    source: str,
) -> Definition:
    return definition(
        name,
        task,
        check_size(task, body, app.max_body()),
        schedule,
        options,
        priority=defaults.priority,
        expires=defaults.expires,
        source=source,
    )


# -- those made at run time -------------------------------------------------------------------------


class Schedules:
    """The schedules in Redis, from wherever they come. Every method has a ``_sync`` twin; an id is a schedule's name."""

    def __init__(self, app: Home) -> None:
        self._app = app

    @property
    def _planner(self) -> Planner:
        return Planner(self._app.settings.prefix)

    def _add(
        self,
        task: str | Task[..., Any],
        when: str | Seconds | Schedule,
        name: str | None,
        tz: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> Operation[str]:
        app, schedule = self._app, as_schedule(when, tz)
        if not isinstance(schedule, Cron | Every):
            raise TaskDefinitionError(
                f"a schedule made at run time is a cron expression or an interval, not {schedule!r:.100}: "
                "the scheduler process does not have this object"
            )
        known = task if isinstance(task, Task) else app.tasks.get(task)
        task_name = known.name if known is not None else str(task)
        if known is not None:
            body = known.arguments.encode(tuple(args), dict(kwargs or {}))
        elif TASK_NAME.match(task_name):
            body = encode_untyped(task_name, tuple(args), dict(kwargs or {}))
        else:
            raise UnknownTask(f"{task_name!r:.250} is not a task name: 1 to 200 characters of A-Z a-z 0-9 _ . : -")
        label = schedule.expression if isinstance(schedule, Cron) else f"every {schedule.seconds:g} s"
        defaults = known.defaults if known is not None else _NO_DEFAULTS
        new = _definition(app, name or f"{task_name} {label}", task_name, body, schedule, options, defaults, "")
        return self._planner.put(_queue(app, task_name, options, defaults), new)

    async def add(
        self,
        task: str | Task[..., Any],
        when: str | Seconds | Schedule,
        *,
        name: str | None = None,
        tz: str = "UTC",
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ScheduleOptions],
    ) -> str:
        """As :meth:`fastq.FastQ.schedule`; ``when`` is a cron expression, an interval, or an object of either."""
        return await self._app.run(self._add(task, when, name, tz, args, kwargs, options))

    def add_sync(
        self,
        task: str | Task[..., Any],
        when: str | Seconds | Schedule,
        *,
        name: str | None = None,
        tz: str = "UTC",
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ScheduleOptions],
    ) -> str:
        """:meth:`add` from blocking code."""
        return self._app.run_sync(self._add(task, when, name, tz, args, kwargs, options))

    def _own(self) -> dict[str, Schedule]:
        return {name: entry.schedule for name, entry in self._app.periodic.items()}

    async def list(self) -> Sequence[ScheduleInfo]:
        """Every schedule, the next one first."""
        return await self._app.run(self._planner.list(self._own()))

    def list_sync(self) -> Sequence[ScheduleInfo]:
        """:meth:`list` from blocking code."""
        return self._app.run_sync(self._planner.list(self._own()))

    async def history(self, schedule_id: str) -> Sequence[ScheduleRun]:
        """The last runs (20 at most), the newest first. Raises UnknownSchedule."""
        return await self._app.run(self._planner.history(schedule_id))

    def history_sync(self, schedule_id: str) -> Sequence[ScheduleRun]:
        """:meth:`history` from blocking code."""
        return self._app.run_sync(self._planner.history(schedule_id))

    async def pause(self, schedule_id: str) -> None:
        """Fire no tick from now on, until :meth:`resume`; also one of the code. Raises UnknownSchedule."""
        await self._app.run(self._planner.pause(schedule_id, paused=True))

    def pause_sync(self, schedule_id: str) -> None:
        """:meth:`pause` from blocking code."""
        self._app.run_sync(self._planner.pause(schedule_id, paused=True))

    async def resume(self, schedule_id: str) -> None:
        """Go on with the next tick; those of the pause are dropped. Raises UnknownSchedule."""
        await self._app.run(self._planner.pause(schedule_id, paused=False))

    def resume_sync(self, schedule_id: str) -> None:
        """:meth:`resume` from blocking code."""
        self._app.run_sync(self._planner.pause(schedule_id, paused=False))

    async def run_now(self, schedule_id: str) -> str:
        """Enqueue one of its jobs at once, paused or not; returns the job's id. Raises UnknownSchedule."""
        return await self._app.run(self._planner.run_now(schedule_id))

    def run_now_sync(self, schedule_id: str) -> str:
        """:meth:`run_now` from blocking code."""
        return self._app.run_sync(self._planner.run_now(schedule_id))

    async def remove(self, schedule_id: str) -> bool:
        """As :meth:`fastq.FastQ.unschedule`."""
        return await self._app.run(self._planner.remove(schedule_id))

    def remove_sync(self, schedule_id: str) -> bool:
        """:meth:`remove` from blocking code."""
        return self._app.run_sync(self._planner.remove(schedule_id))


class Scheduling:
    """The part of :class:`fastq.FastQ` that makes schedules at run time."""

    @functools.cached_property
    def schedules(self) -> Schedules:
        """The schedules in Redis: add, list, pause, resume, run now, remove."""
        return Schedules(cast(Home, self))

    async def schedule(
        self,
        task: str | Task[..., Any],
        *,
        cron: str | Schedule,
        name: str | None = None,
        tz: str = "UTC",
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ScheduleOptions],
    ) -> str:
        """Enqueue a task again and again from now on; it survives restarts of everything. Returns the schedule's id.

        The id is its name: the same name again replaces it, so a service may call this each time it starts.

        Args:
            task: the task or its name.
            cron: five fields, ``@daily`` and the like, or an object (``fastq.crontab(…)``).
            name: default: the task's name and the expression.
            tz: the zone of the expression.
            args, kwargs: of the jobs; checked when the task is registered here.
            options: misfire, overlap, jitter and others; see :class:`fastq.ScheduleOptions`.

        Raises:
            TaskDefinitionError: the expression or zone is wrong. InvalidOption: an option is, or the name belongs to a
                schedule of the application's code. InvalidArguments, BodyTooLarge, BrokerUnavailable: as ``enqueue``.

        Example::

            await app.schedule("generate_report", cron="0 9 * * *", name="daily-report", tz="Europe/Berlin")
        """
        return await self.schedules.add(task, cron, name=name, tz=tz, args=args, kwargs=kwargs, **options)

    def schedule_sync(
        self,
        task: str | Task[..., Any],
        *,
        cron: str | Schedule,
        name: str | None = None,
        tz: str = "UTC",
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ScheduleOptions],
    ) -> str:
        """:meth:`schedule` from blocking code."""
        return self.schedules.add_sync(task, cron, name=name, tz=tz, args=args, kwargs=kwargs, **options)

    async def schedule_interval(
        self,
        task: str | Task[..., Any],
        interval: Seconds,
        *,
        name: str | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ScheduleOptions],
    ) -> str:
        """:meth:`schedule` with an interval: seconds (0.1 to 366 days) or a ``timedelta``."""
        return await self.schedules.add(task, interval, name=name, args=args, kwargs=kwargs, **options)

    def schedule_interval_sync(
        self,
        task: str | Task[..., Any],
        interval: Seconds,
        *,
        name: str | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ScheduleOptions],
    ) -> str:
        """:meth:`schedule_interval` from blocking code."""
        return self.schedules.add_sync(task, interval, name=name, args=args, kwargs=kwargs, **options)

    async def list_scheduled(self) -> Sequence[ScheduleInfo]:
        """Every schedule, those of the code included, the next one first."""
        return await self.schedules.list()

    def list_scheduled_sync(self) -> Sequence[ScheduleInfo]:
        """:meth:`list_scheduled` from blocking code."""
        return self.schedules.list_sync()

    async def unschedule(self, schedule_id: str) -> bool:
        """Remove a schedule; once this has returned, it fires no more. False: there was none of this id."""
        return await self.schedules.remove(schedule_id)

    def unschedule_sync(self, schedule_id: str) -> bool:
        """:meth:`unschedule` from blocking code."""
        return self.schedules.remove_sync(schedule_id)
