"""When a schedule is due: cron expressions and intervals, as pure functions of the time that is passed in.

A tick is an instant in seconds since the epoch. Two schedulers that hold the same schedule compute the same ticks,
whenever they were started: that is what lets the first one fire a tick and the others know that it was fired.

Daylight saving time, for a cron expression in a zone that has it:

- When the hour field lets every hour through (``*/15 * * * *``), the schedule follows real time: it fires at every
  real minute whose clock time matches, so the repeated hour in autumn is served twice and nothing is late in spring.
- Otherwise (``30 2 * * *``) it follows the clock on the wall, and each clock time fires once a day: one that spring
  skips fires at the first minute after the gap (several skipped ones together fire once), one that autumn repeats
  fires the first time only.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias, get_args

from fastq.errors import TaskDefinitionError, did_you_mean, safe_text

if TYPE_CHECKING:
    from cronsim import CronSim

__all__ = ["Cron", "Every", "Instant", "MisfirePolicy", "Schedule", "due_ticks"]

Instant: TypeAlias = float | dt.datetime
"""Seconds since the epoch, or a datetime that has a zone."""

MisfirePolicy: TypeAlias = Literal["skip", "once", "all"]
"""What becomes of ticks that nobody was there to fire; see :func:`due_ticks`."""


class Schedule(Protocol):
    """Anything that ticks: :class:`Cron`, :class:`Every`, or your own."""

    def next(self, after: Instant) -> float:
        """The first tick later than ``after``."""
        ...

    def previous(self, before: Instant) -> float:
        """The last tick earlier than ``before``."""
        ...

    def explain(self) -> str:
        """The schedule in words."""
        ...


# -- intervals --------------------------------------------------------------------------------


class Every:
    """A tick at every multiple of an interval since the epoch (1970-01-01 00:00 UTC), whatever the zone.

    ``seconds`` is a number or a ``timedelta``: 0.1 s to 366 days, in whole milliseconds.

    >>> Every(300).next(1_000_000_000)
    1000000200.0

    Raises TaskDefinitionError.
    """

    __slots__ = ("_milliseconds", "seconds")

    def __init__(self, seconds: float | dt.timedelta) -> None:
        # Milliseconds, because multiples of an integer are exact: schedulers must agree to the last bit.
        self._milliseconds: Final = _milliseconds(seconds)
        self.seconds: Final = self._milliseconds / 1_000

    def next(self, after: Instant) -> float:
        """The first tick later than ``after``."""
        instant = _epoch(after)
        count = int(instant * 1_000) // self._milliseconds
        while self._tick(count) <= instant:
            count += 1
        return self._tick(count)

    def previous(self, before: Instant) -> float:
        """The last tick earlier than ``before``."""
        instant = _epoch(before)
        count = int(instant * 1_000) // self._milliseconds + 1
        while self._tick(count) >= instant:
            count -= 1
        return self._tick(count)

    def ticks(self, after: Instant, until: Instant, limit: int = 1_000) -> list[float]:
        """The ticks later than ``after`` and not later than ``until``, oldest first, at most ``limit``."""
        return _ticks(self, _epoch(after), _epoch(until), limit)

    def _tick(self, count: int) -> float:
        return count * self._milliseconds / 1_000

    def explain(self) -> str:
        """``Every 300 seconds``."""
        return f"Every {self.seconds:g} seconds"

    def __repr__(self) -> str:
        return f"Every({self.seconds:g})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Every) and other._milliseconds == self._milliseconds

    def __hash__(self) -> int:
        return hash((Every, self._milliseconds))


def _milliseconds(interval: object) -> int:
    seconds = interval.total_seconds() if isinstance(interval, dt.timedelta) else interval
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TaskDefinitionError(f"an interval is a number of seconds or a timedelta, not {_quoted(interval)}")
    milliseconds = round(seconds * 1_000) if 0.1 <= seconds <= 366 * 86_400 else 0
    if not milliseconds or abs(milliseconds / 1_000 - seconds) > 1e-9:
        raise TaskDefinitionError(f"the interval {_quoted(interval)} is not 0.1 s to 366 days in whole milliseconds")
    return milliseconds


# -- cron -------------------------------------------------------------------------------------

ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}

_MAX_LENGTH = 256
_MAX_ITEMS = 64  # a field has at most 60 values
_CHARACTERS = re.compile(r"[0-9A-Za-z*/,#@ \t-]*")
_STEP = re.compile(r"/([0-9]+)")
_POINT = re.compile(r"\b([0-9A-Z]+)-\1/[0-9]+")
#: Each field: its name, how many values it has, and what may stand in it. Longer names first: errors are matched by name.
_FIELDS = (
    ("minute", 60, "0-59"),
    ("hour", 24, "0-23"),
    ("day-of-month", 31, "1-31, L, LW, a day that the months have"),
    ("month", 12, "1-12 or JAN-DEC"),
    ("day-of-week", 7, "0-6 with 0 = Sunday (7 too) or SUN-SAT, 5L, 1#2"),
)

_DAY = dt.timedelta(days=1)
#: Two kinds of year and seven first weekdays: every calendar page comes back within 40 years, also across 2100.
_HORIZON = 41 * 366
#: How far ahead a change of the clock can matter: no zone has moved its clock by more than a day.
_SHIFT = 26 * 3_600
#: Instants lie between the years 1900 and 9892: the search never leaves what datetime can hold, and milliseconds
#: taken for seconds are caught.
_EARLIEST, _LATEST = -2_208_988_800, 250_000_000_000


class Cron:
    """A five-field cron expression, or ``@hourly``, ``@daily``, ``@weekly``, ``@monthly``, ``@yearly``, in a time zone.

    Fields: minute, hour, day of month, month, day of week (0 = Sunday); ``*``, lists, ranges, steps, names, ``L`` (last
    day), ``5L`` (last Friday), ``1#2`` (second Monday). When both day fields are restricted, either may match, as in
    every cron. ``tz`` is an IANA name; see the head of this module for daylight saving time.

    >>> cron = Cron("30 4 * * 1-5", tz="Europe/Berlin")
    >>> cron.explain(), cron.next(1_000_000_000)
    ('At 04:30 on Monday through Friday (Europe/Berlin)', 1000089000.0)

    Raises TaskDefinitionError for an expression that is wrong, too long, or never fires.
    """

    __slots__ = ("_minutes", "_real_time", "_sim", "_zone", "expression", "tz")

    def __init__(self, expression: str, tz: str = "UTC") -> None:
        self.expression: Final = _normal(expression)
        self.tz: Final = tz
        self._zone: Final = _zone(tz)
        self._sim: Final = _parsed(self.expression)
        #: The minutes of a day that match, in order.
        self._minutes: Final = tuple(60 * h + m for h in sorted(self._sim.hours) for m in sorted(self._sim.minutes))
        self._real_time: Final = len(self._sim.hours) == 24

    def next(self, after: Instant) -> float:
        """The first tick later than ``after``."""
        instant = _epoch(after)
        return self._next_real(instant) if self._real_time else self._next_wall(instant)

    def previous(self, before: Instant) -> float:
        """The last tick earlier than ``before``."""
        instant = _epoch(before)
        return self._previous_real(instant) if self._real_time else self._previous_wall(instant)

    def ticks(self, after: Instant, until: Instant, limit: int = 1_000) -> list[float]:
        """The ticks later than ``after`` and not later than ``until``, oldest first, at most ``limit``."""
        return _ticks(self, _epoch(after), _epoch(until), limit)

    def explain(self) -> str:
        """The schedule in words: ``At 09:00 every day (Europe/Berlin)``."""
        return self._sim.explain() + ("" if self.tz == "UTC" else f" ({self.tz})")

    def __repr__(self) -> str:
        return f"Cron({self.expression!r}, tz={self.tz!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cron) and (other.expression, other.tz) == (self.expression, self.tz)

    def __hash__(self) -> int:
        return hash((Cron, self.expression, self.tz))

    # Clock times: what matches on the wall, without any zone.

    def _walls_from(self, start: dt.datetime) -> Iterator[dt.datetime]:
        """The matching clock times from the minute of ``start`` on."""
        first = bisect_left(self._minutes, _minute_of_day(start))
        for day in self._days(start.date(), 1):
            for minute in self._minutes[first if day == start.date() else 0 :]:
                yield dt.datetime.combine(day, dt.time(*divmod(minute, 60)))

    def _walls_back_from(self, start: dt.datetime) -> Iterator[dt.datetime]:
        """The matching clock times from the minute of ``start`` back."""
        last = bisect_right(self._minutes, _minute_of_day(start))
        for day in self._days(start.date(), -1):
            for minute in reversed(self._minutes[: last if day == start.date() else None]):
                yield dt.datetime.combine(day, dt.time(*divmod(minute, 60)))

    def _days(self, day: dt.date, step: Literal[1, -1]) -> Iterator[dt.date]:
        end = day + step * _HORIZON * _DAY
        while (day < end) if step > 0 else (day > end):
            if day.month not in self._sim.months:
                day = _month_edge(day, step)
                continue
            if self._sim.match_day(day):
                yield day
            day += step * _DAY

    # From clock times to instants.

    def _wall(self, instant: float) -> dt.datetime:
        return dt.datetime.fromtimestamp(instant, self._zone).replace(tzinfo=None)

    def _offset(self, instant: float) -> dt.timedelta:
        offset = dt.datetime.fromtimestamp(instant, self._zone).utcoffset()
        return offset or dt.timedelta()

    def _instants(self, wall: dt.datetime) -> list[float]:
        """When the clock shows ``wall``: once, twice (autumn), or never (spring)."""
        first = wall.replace(tzinfo=self._zone).timestamp()
        second = wall.replace(tzinfo=self._zone, fold=1).timestamp()
        if first == second:
            return [first]
        return [first, second] if self._wall(first) == wall else []

    def _served(self, wall: dt.datetime) -> float:
        """When a schedule that follows the wall serves ``wall``: the first time, or right after the gap."""
        instants = self._instants(wall)
        return instants[0] if instants else self._gap_end(wall)

    def _gap_end(self, wall: dt.datetime) -> float:
        """The first instant after the gap that swallowed ``wall``."""
        # With the offset from before the gap, a swallowed time lies after it; with the one from after, before it.
        late = int(wall.replace(tzinfo=self._zone).timestamp())
        early = int(wall.replace(tzinfo=self._zone, fold=1).timestamp())
        after = self._offset(late)
        while late - early > 1:
            middle = (early + late) // 2
            early, late = (early, middle) if self._offset(middle) == after else (middle, late)
        return float(late)

    # Schedules that follow the wall. `_served` never decreases, so the first clock time that fits is the answer.

    def _next_wall(self, instant: float) -> float:
        return next(tick for wall in self._walls_from(self._wall(instant)) if (tick := self._served(wall)) > instant)

    def _previous_wall(self, instant: float) -> float:
        start = self._wall(instant) + self._set_back(instant - _SHIFT, instant)
        return next(tick for wall in self._walls_back_from(start) if (tick := self._served(wall)) < instant)

    # Schedules that follow real time. Where the clock was set back, later instants can have earlier clock times:
    # look through that overlap too, and go on until no clock time can be nearer than the best one.

    def _next_real(self, instant: float) -> float:
        best = math.inf
        for wall in self._walls_from(self._wall(instant) - self._set_back(instant, instant + _SHIFT)):
            instants = self._instants(wall)
            if instants and instants[0] >= best:
                break
            best = min([best, *(tick for tick in instants if tick > instant)])
        return best

    def _previous_real(self, instant: float) -> float:
        best = -math.inf
        for wall in self._walls_back_from(self._wall(instant) + self._set_back(instant - _SHIFT, instant)):
            instants = self._instants(wall)
            if instants and instants[-1] <= best:
                break
            best = max([best, *(tick for tick in instants if tick < instant)])
        return best

    def _set_back(self, early: float, late: float) -> dt.timedelta:
        """By how much the clock is set back between two instants; zero if it is not."""
        return max(self._offset(early) - self._offset(late), dt.timedelta())


def _minute_of_day(wall: dt.datetime) -> int:
    return 60 * wall.hour + wall.minute


def _month_edge(day: dt.date, step: int) -> dt.date:
    """The first day of the next month, or the last one of the month before."""
    if step < 0:
        return day.replace(day=1) - _DAY
    return (day.replace(day=1) + 32 * _DAY).replace(day=1)


def _epoch(instant: Instant) -> float:
    if isinstance(instant, dt.datetime):
        if instant.tzinfo is None:
            raise ValueError(f"{instant!r} has no time zone: it is no instant")
        instant = instant.timestamp()
    if not _EARLIEST <= instant <= _LATEST:
        raise ValueError(f"instant {instant!r} is not in seconds since the epoch")
    return instant


# -- reading an expression --------------------------------------------------------------------


def _normal(expression: object) -> str:
    """The five fields, upper case, one blank between them; everything that needs no parser is checked here.

    No check takes more than a look at each character, and the length bounds what the parser has to read.
    """
    if not isinstance(expression, str):
        raise TaskDefinitionError(f"a cron expression is text such as '0 9 * * 1-5', not {_quoted(expression)}")
    if len(expression) > _MAX_LENGTH:
        raise TaskDefinitionError(f"a cron expression has at most {_MAX_LENGTH} characters, not {len(expression)}")
    text = expression.strip(" \t")
    if text.startswith("@"):
        text = _alias(text.lower())
    if not _CHARACTERS.fullmatch(text):
        raise TaskDefinitionError(f"cron {_quoted(expression)} holds characters that no cron expression has")
    parts = text.upper().split()
    if len(parts) != len(_FIELDS):
        hint = "; for seconds use an interval" if len(parts) == 6 else ""
        raise TaskDefinitionError(
            f"cron {_quoted(expression)} has {len(parts)} fields, not 5 (minute hour day month weekday){hint}"
        )
    for part, (name, values, _) in zip(parts, _FIELDS, strict=True):
        _check_field(expression, part, name, values)
    # cronsim reads the step of a one-value range, `5-5/10`, as that of `5/10`: here the range ends where it ends.
    return _POINT.sub(r"\1", " ".join(parts))


def _alias(text: str) -> str:
    if text in ALIASES:
        return ALIASES[text]
    raise TaskDefinitionError(f"cron {_quoted(text)} is none of {', '.join(ALIASES)}{did_you_mean(text, ALIASES)}")


def _check_field(expression: str, part: str, name: str, values: int) -> None:
    if part.count(",") >= _MAX_ITEMS:
        raise TaskDefinitionError(f"cron {_quoted(expression)}: {name} lists more than {_MAX_ITEMS} items")
    for step in _STEP.findall(part):
        if int(step) > values:  # `*/90` does not mean every 90 minutes: it would fire every hour
            raise TaskDefinitionError(
                f"cron {_quoted(expression)}: a step of {step} in {name}, which has {values} values; use an interval"
            )


def _parsed(expression: str) -> CronSim:
    from cronsim import CronSim, CronSimError  # here, because it costs more to import than a producer has to pay

    *_, day, _, weekday = expression.split()
    if day.startswith("*") and day != "*" and ("#" in weekday or "L" in weekday):
        # Both would have to match, which few of these ever do: refused rather than searched for.
        raise TaskDefinitionError(f"cron {_quoted(expression)}: a step of days cannot be combined with L or # weekdays")
    try:
        return CronSim(expression, dt.datetime(2000, 1, 1))  # noqa: DTZ001  # only its fields are used
    except CronSimError as error:
        raise TaskDefinitionError(f"cron {_quoted(expression)}: {_reason(expression, str(error))}") from None


def _reason(expression: str, message: str) -> str:
    for part, (name, _, allowed) in zip(expression.split(), _FIELDS, strict=True):
        if message == f"Bad {name}":
            return f"{name} {_quoted(part)} is not possible ({allowed})"
    return message


def _zone(name: object) -> dt.tzinfo:
    if name == "UTC":
        return dt.UTC  # also where the system has no time zone database
    from zoneinfo import ZoneInfo, available_timezones

    try:
        if isinstance(name, str) and 0 < len(name) <= 64:
            return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        pass  # no such file, a path that leaves the database, a folder such as "Europe"
    known = available_timezones()
    hint = (
        did_you_mean(str(name)[:64], known) if known else " - this system has no time zone database: pip install tzdata"
    )
    raise TaskDefinitionError(f"unknown time zone {_quoted(name)}{hint}")


def _quoted(value: object) -> str:
    return safe_text(repr(value), 120)


# -- ticks that nobody fired ------------------------------------------------------------------

#: How late a tick of a schedule that skips may still fire; seconds. A standby takes over well within it.
SKIP_GRACE = 60.0


def due_ticks(
    schedule: Schedule, last: float, now: float, policy: MisfirePolicy, limit: int = 100, grace: float | None = None
) -> list[float]:
    """The ticks to fire now, oldest first, when ``last`` is the newest tick already dealt with (or the time at which
    the schedule was first seen). Instants and ``grace`` are in seconds.

    ``policy`` decides about ticks that passed while no scheduler ran:

    - ``"skip"``: the newest due tick, if it is at most ``grace`` (60 s) late; older ones are dropped;
    - ``"once"``: the newest due tick stands for all; dropped if it is more than ``grace`` late (default: never);
    - ``"all"``: every due tick that is at most ``grace`` late (default: every one), at most ``limit`` in one call:
      call again with the last of them as ``last``.

    >>> [due_ticks(Every(60), last=600, now=790, policy=policy) for policy in ("skip", "once", "all")]
    [[780.0], [780.0], [660.0, 720.0, 780.0]]
    """
    if policy not in get_args(MisfirePolicy):
        raise TaskDefinitionError(f"misfire={_quoted(policy)} is none of {', '.join(get_args(MisfirePolicy))}")
    if grace is None and policy == "skip":
        grace = SKIP_GRACE
    after = last if grace is None else max(last, math.nextafter(now - grace, -math.inf))
    if after >= now:
        return []
    if policy == "all":
        return _ticks(schedule, after, now, limit)
    newest = schedule.previous(math.nextafter(now, math.inf))
    return [newest] if newest > after else []


def _ticks(schedule: Schedule, after: float, until: float, limit: int) -> list[float]:
    found: list[float] = []
    tick = schedule.next(after)
    while tick <= until and len(found) < limit:
        found.append(tick)
        tick = schedule.next(tick)
    return found
