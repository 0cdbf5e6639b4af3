"""Schedules as data: what is stored of one, the policies it may have, and the forms in which people write them.

Pure. A definition holds no code: it selects a task by name and carries its encoded arguments, like an envelope.
"""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, cast, get_args

import msgspec

from fastq.cron import Cron, Every, Instant, MisfirePolicy, Schedule
from fastq.errors import ConfigError, FastQError, InvalidOption, TaskDefinitionError, did_you_mean, safe_text
from fastq.job import PLAIN, Envelope, Extra, JobPriority, check_priority, encode
from fastq.values import check_queue_name, parse_duration

__all__ = [
    "CronTrigger", "Definition", "OverlapPolicy", "ScheduleInfo", "ScheduleOptions", "ScheduleRun", "Written",
    "crontab", "definition", "read_table",
]  # fmt: skip

OverlapPolicy: TypeAlias = Literal["allow", "skip", "queue", "cancel"]
"""What becomes of a tick while ``max_instances`` jobs of the schedule live; see :class:`ScheduleOptions`."""

Duration: TypeAlias = float | dt.timedelta

MOST_INSTANCES = 20
"""Runs of a schedule that Redis remembers: more could not be told apart from none."""

_FAR = 366 * 86_400.0
_LONGEST_NAME = 200


class ScheduleOptions(TypedDict, total=False):
    """The policies of a schedule; durations are seconds or ``timedelta`` (text such as ``"5m"`` in files).

    ``queue``, ``priority``: of its jobs; default: the task's. ``expires``: a job that has not started so long after it
    was due is cancelled. ``misfire``: ticks that nobody fired: "skip", "once", "all" (at most 100); default: "once" for
    cron, "skip" for intervals; ``coalesce=True`` means "once", False "all". ``misfire_grace_time``: a tick that is later
    than this is dropped (default: 60 s for "skip", none for the others). ``overlap``: while ``max_instances`` (1 to 20,
    default 1) of its jobs live, a tick is fired all the same ("allow", the default), dropped ("skip"), waits until one of
    them has ended ("queue"), or the living ones are cancelled first ("cancel"); ``max_instances`` alone means "skip".
    ``jitter``: each job is due up to so much later. ``start``, ``end``: no tick before, none after; datetimes with a zone.
    """

    queue: str
    priority: int
    expires: Duration
    misfire: MisfirePolicy
    misfire_grace_time: Duration
    coalesce: bool
    overlap: OverlapPolicy
    max_instances: int
    jitter: Duration
    start: dt.datetime
    end: dt.datetime


class Definition(msgspec.Struct, frozen=True, omit_defaults=True):
    """One schedule as stored. Times and durations are seconds; ``source`` "" was made at run time, else by that
    application's code. ``own``: its ticks are those of an object that only the code has; the text explains it.
    """

    name: str
    task: str
    body: bytes
    cron: str = ""
    tz: str = "UTC"
    interval: float = 0.0
    own: str = ""
    priority: int = JobPriority.NORMAL
    expires: float | None = None
    misfire: MisfirePolicy = "once"
    grace: float | None = None
    overlap: OverlapPolicy = "allow"
    most: int = 1
    jitter: float = 0.0
    start: float | None = None
    end: float | None = None
    source: str = ""

    def same_ticks(self, other: Definition) -> bool:
        """Whether both tick at the same instants."""
        return all(getattr(self, f) == getattr(other, f) for f in ("cron", "tz", "interval", "own", "start", "end"))

    def schedule(self, own: Mapping[str, Schedule]) -> Schedule | None:
        """What it ticks by; None when that stands in code which is not here (``own``: name -> schedule)."""
        found = own.get(self.name) if self.own else _schedule(self.cron, self.tz, self.interval)
        if found is not None and (self.start is not None or self.end is not None):
            return _Between(found, self.start, self.end)
        return found

    def explain(self) -> str:
        """The schedule in words."""
        return self.own or cast(Schedule, _schedule(self.cron, self.tz, self.interval)).explain()

    def delay_ms(self, tick_ms: int) -> int:
        """By how much ``jitter`` puts the job of a tick off: the same for every scheduler."""
        if not self.jitter:
            return 0
        digest = hashlib.blake2b(f"{self.name}@{tick_ms}".encode(), digest_size=6).digest()
        return int.from_bytes(digest) % (round(self.jitter * 1_000) + 1)

    def envelope(self, tick_ms: int, now_ms: int, delay_ms: int = 0) -> bytes:
        """The job of one tick. Its expiry counts from now: it may be late by design."""
        extra = Extra(schedule=self.name, due_at=tick_ms + delay_ms)
        if self.expires is not None:
            extra.expires_at = now_ms + delay_ms + round(self.expires * 1_000)
        return encode(Envelope(self.priority, PLAIN, self.task, self.body, now_ms, 0, extra))


_NOT_IN_ID = re.compile(r"[^A-Za-z0-9_.:/+=-]+")
_LONGEST_IN_ID = 80


def job_id(schedule: str, tick_ms: int) -> str:
    """The id of the job of one tick; names that do not fit into an id are shortened and told apart by a digest.

    >>> job_id("nightly", 1_000), job_id("report */5 * * * *", 2_000)
    ('nightly@1000', 'report_/5_-453ce961d4@2000')
    """
    name = _NOT_IN_ID.sub("_", schedule)
    if name != schedule or len(name) > _LONGEST_IN_ID:
        digest = hashlib.blake2b(schedule.encode("utf-8", "replace"), digest_size=5).hexdigest()
        name = f"{name[:_LONGEST_IN_ID]}-{digest}"
    return f"{name}@{tick_ms}"


_decoder = msgspec.msgpack.Decoder(Definition)


def decode_definition(data: bytes) -> Definition | None:
    """A stored definition; None when it cannot be read (a foreign writer)."""
    try:
        return _decoder.decode(data)
    except Exception:  # noqa: BLE001 - msgspec raises more than its own errors
        return None


class ScheduleRun(NamedTuple):
    """One run of a schedule. ``tick`` and ``at`` (when it was fired) are seconds since the epoch; ``tick`` None: by hand.

    ``state``: "open" (its job lives), "success", "failed", "cancelled", "finished" (its job left no record), or "skipped".
    """

    tick: float | None
    job_id: str
    at: float
    state: str


class ScheduleInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One schedule as it stands in Redis. Times are seconds since the epoch.

    ``next_run`` None: paused, over, or known to the application's code alone. ``source``: the application whose code
    declares it; "" for one made at run time. ``last_status`` as in :class:`ScheduleRun`; None: it has not run yet.
    """

    id: str
    name: str
    task: str
    queue: str
    schedule: str
    tz: str
    misfire: str
    overlap: str
    paused: bool
    source: str
    next_run: float | None
    last_run: float | None
    last_status: str | None
    last_job: str | None


class _Between:
    """The ticks of a schedule from ``start`` to ``end``, both included."""

    def __init__(self, inner: Schedule, start: float | None, end: float | None) -> None:
        self._inner = inner
        self._start = -math.inf if start is None else start
        self._end = math.inf if end is None else end

    def next(self, after: Instant) -> float:
        """The first tick later than ``after``; infinite when there is none."""
        instant = after.timestamp() if isinstance(after, dt.datetime) else after
        tick = self._inner.next(max(instant, math.nextafter(self._start, -math.inf)))
        return tick if tick <= self._end else math.inf

    def previous(self, before: Instant) -> float:
        """The last tick earlier than ``before``; minus infinity when there is none."""
        instant = before.timestamp() if isinstance(before, dt.datetime) else before
        tick = self._inner.previous(min(instant, math.nextafter(self._end, math.inf)))
        return tick if tick >= self._start else -math.inf

    def explain(self) -> str:
        """In words."""
        return self._inner.explain()


@functools.lru_cache(4_096)
def _schedule(cron: str, tz: str, interval: float) -> Schedule | None:
    return Cron(cron, tz) if cron else Every(interval) if interval else None


# -- from options to a definition ------------------------------------------------------------------

_OPTIONS = tuple(ScheduleOptions.__annotations__)


def definition(
    name: str,
    task: str,
    body: bytes,
    schedule: Schedule,
    options: Mapping[str, Any],
    *,
    priority: int = JobPriority.NORMAL,
    expires: float | None = None,
    source: str = "",
) -> Definition:
    """Put a definition together; ``priority`` and ``expires`` are the task's own.

    Raises:
        InvalidOption: an option is unknown or makes no sense.
    """
    for option in options:
        if option not in _OPTIONS:
            raise InvalidOption(f"schedule {name!r}: unknown option {option!r}{did_you_mean(option, _OPTIONS)}")
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise InvalidOption(f"the name of a schedule is 1 to {_LONGEST_NAME} printable characters, not {name!r:.250}")
    try:
        overlap, most = _overlap(options)
        start, end = _instant("start", options.get("start")), _instant("end", options.get("end"))
        if start is not None and end is not None and start > end:
            raise InvalidOption("it ends before it starts")
        return Definition(
            name=name,
            task=task,
            body=body,
            **_timing(schedule),
            priority=check_priority(options.get("priority", priority)),
            expires=_span("expires", options["expires"]) if options.get("expires") is not None else expires,
            misfire=_misfire(options, schedule),
            grace=_span("misfire_grace_time", options.get("misfire_grace_time")),
            overlap=overlap,
            most=most,
            jitter=_span("jitter", options.get("jitter")) or 0.0,
            start=start,
            end=end,
            source=source,
        )
    except FastQError as error:
        raise InvalidOption(f"schedule {name!r}: {error}") from None


def _timing(schedule: Schedule) -> dict[str, Any]:
    if isinstance(schedule, Cron):
        return {"cron": schedule.expression, "tz": schedule.tz}
    if isinstance(schedule, Every):
        return {"interval": schedule.seconds}
    return {"own": f"{type(schedule).__name__}: {safe_text(str(schedule.explain()), 200)}"}


def _misfire(options: Mapping[str, Any], schedule: Schedule) -> MisfirePolicy:
    coalesce = options.get("coalesce")
    if coalesce is not None and "misfire" in options:
        raise InvalidOption("misfire and coalesce were both given: coalesce=True means misfire='once'")
    if coalesce is not None:
        return "once" if coalesce else "all"
    misfire = options.get("misfire") or ("skip" if isinstance(schedule, Every) else "once")
    if misfire not in get_args(MisfirePolicy):
        raise InvalidOption(f"misfire={misfire!r:.100} is none of {', '.join(get_args(MisfirePolicy))}")
    return cast(MisfirePolicy, misfire)


def _overlap(options: Mapping[str, Any]) -> tuple[OverlapPolicy, int]:
    most = options.get("max_instances")
    overlap = options.get("overlap") or ("allow" if most is None else "skip")
    if overlap not in get_args(OverlapPolicy):
        raise InvalidOption(f"overlap={overlap!r:.100} is none of {', '.join(get_args(OverlapPolicy))}")
    most = 1 if most is None else most
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= MOST_INSTANCES:
        raise InvalidOption(f"max_instances={most!r:.100} is not 1 to {MOST_INSTANCES}")
    return cast(OverlapPolicy, overlap), most


def _span(option: str, value: object) -> float | None:
    if value is None:
        return None
    try:
        span = parse_duration(value)
    except ConfigError as error:
        raise InvalidOption(f"{option}: {error}") from None
    if span > _FAR:
        raise InvalidOption(f"{option}={value!r:.100} is longer than 366 days")
    return span


def _instant(option: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = dt.datetime.fromisoformat(value)
        except ValueError:
            raise InvalidOption(f"{option}={value!r:.100} is no time: write 2027-01-01T00:00:00+00:00") from None
    if not isinstance(value, dt.datetime) or value.tzinfo is None:
        raise InvalidOption(f"{option}={value!r:.100} must be a datetime with a time zone")
    return value.timestamp()


def as_schedule(value: object, tz: str = "UTC") -> Schedule:
    """A schedule from what people write: an object with ``next``, a cron expression, seconds, or a ``timedelta``.

    Raises:
        TaskDefinitionError: it is none of these.
    """
    if isinstance(value, str):
        return Cron(value, tz)
    if isinstance(value, int | float | dt.timedelta):
        return Every(value)
    if hasattr(value, "next") and hasattr(value, "previous") and hasattr(value, "explain"):
        return cast(Schedule, value)
    raise TaskDefinitionError(
        f"{value!r:.100} is no schedule: give crontab(...), a cron expression, seconds or a timedelta"
    )


# -- the forms that people know ------------------------------------------------------------------

Field: TypeAlias = str | int | Iterable[int | str]


def crontab(
    minute: Field = "*",
    hour: Field = "*",
    day_of_week: Field = "*",
    day_of_month: Field = "*",
    month_of_year: Field = "*",
    *,
    tz: str = "UTC",
) -> Cron:
    """Celery's ``crontab``: a field that is not given matches always.

    >>> crontab(minute=0, hour="*/6").expression
    '0 */6 * * *'

    Raises TaskDefinitionError.
    """
    return Cron(" ".join(map(_field, (minute, hour, day_of_month, month_of_year, day_of_week))), tz)


def CronTrigger(  # noqa: N802 - the name that users of APScheduler know
    *,
    month: Field | None = None,
    day: Field | None = None,
    day_of_week: Field | None = None,
    hour: Field | None = None,
    minute: Field | None = None,
    timezone: str = "UTC",
) -> Cron:
    """APScheduler's ``CronTrigger``: fields finer than the finest one given are at their least, the others match always;
    weekdays are counted from Monday, 0.

    >>> CronTrigger(hour="*/6").expression, CronTrigger(hour=2, day_of_week="mon-fri").expression
    ('0 */6 * * *', '0 2 * * MON-FRI')

    Raises TaskDefinitionError.
    """
    return _trigger(minute, hour, day_of_week, day, month, timezone)


def _trigger(
    minute: Field | None, hour: Field | None, weekday: Field | None, day: Field | None, month: Field | None, tz: str
) -> Cron:
    fields = [minute, hour, weekday, day, month]
    least = ["0", "0", "*", "1", "1"]
    finest = next((i for i, field in enumerate(fields) if field is not None), 0)
    words = [_field(field) if field is not None else least[i] if i < finest else "*" for i, field in enumerate(fields)]
    if weekday is not None:
        words[2] = _from_monday(words[2])
    return Cron(f"{words[0]} {words[1]} {words[3]} {words[4]} {words[2]}", tz)


def _from_monday(field: str) -> str:
    """APScheduler's weekdays, 0 = Monday, as names."""
    names = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
    return ",".join(
        "-".join(names[int(end)] if end.isdigit() and int(end) < 7 else end for end in item.split("-"))
        if "/" not in item
        else item
        for item in field.split(",")
    )


def _field(value: Field) -> str:
    if isinstance(value, str | int):
        return str(value).replace(" ", "")
    return ",".join(str(item) for item in sorted(value, key=str))


class Written(NamedTuple):
    """A schedule as somebody wrote it down: its task by name, its arguments not yet encoded."""

    name: str
    task: str
    schedule: Schedule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: dict[str, Any]


_ENTRY = ("name", "task", "target", "cron", "every", "interval", "interval_seconds", "schedule", "tz", "args", "kwargs",
          "options")  # fmt: skip


def read_table(table: object, origin: str) -> Iterator[Written]:
    """Schedules from a mapping name -> entry (TOML, ``beat_schedule``) or a list of entries with names (JSON).

    An entry has ``task`` (or ``target``, ``module:function``), one of ``cron``, ``every``, ``interval_seconds``,
    ``schedule``, and may have ``tz``, ``args``, ``kwargs`` and any of :class:`ScheduleOptions` (also under ``options``).

    Raises:
        ConfigError: naming ``origin``, the schedule and what is wrong with it.
    """
    if isinstance(table, Mapping):
        entries = [(str(name), entry) for name, entry in table.items()]
    elif isinstance(table, list | tuple):
        entries = [(str(entry.get("name", "")) if isinstance(entry, Mapping) else "", entry) for entry in table]
    else:
        raise ConfigError(f"{origin}: schedules are a table by name or a list, not {table!r:.100}")
    for name, entry in entries:
        try:
            yield _written(name, entry)
        except (FastQError, TypeError) as error:
            raise ConfigError(f"{origin}: schedule {name!r}: {error}") from None


def _written(name: str, entry: object) -> Written:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"an entry is a table, not {entry!r:.100}")
    if not name:
        raise ConfigError(f"an entry needs a name: {dict(entry)!r:.200}")
    task = entry.get("task", entry.get("target"))
    if not isinstance(task, str):
        raise ConfigError("it names no task")
    options = {
        str(key): value for key, value in {**dict(entry.get("options") or {}), **entry}.items() if key not in _ENTRY
    }
    for option in options:
        if option not in _OPTIONS:
            raise ConfigError(f"unknown option {option!r}{did_you_mean(option, (*_OPTIONS, *_ENTRY))}")
    if "queue" in options:
        check_queue_name(options["queue"])
    given = [key for key in ("cron", "every", "interval", "interval_seconds", "schedule") if key in entry]
    if len(given) != 1:
        raise ConfigError("give one of cron, every, interval_seconds, schedule")
    value = entry[given[0]]
    if given[0] in ("every", "interval", "interval_seconds"):
        value = parse_duration(value)
    args, kwargs = entry.get("args") or (), entry.get("kwargs") or {}
    if not isinstance(args, list | tuple) or not isinstance(kwargs, Mapping):
        raise ConfigError("args is a list and kwargs is a table")
    return Written(name, task, as_schedule(value, entry.get("tz", "UTC")), tuple(args), dict(kwargs), options)
