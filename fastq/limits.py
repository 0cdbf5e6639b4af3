"""Limit rules, what they promise, and the same algorithms as the Lua scripts on a private memory. No I/O, no clock.

**The promise.** Units (an acquire's ``cost``) are used somewhere between the instant at which Redis grants them and
``use_within`` seconds after the request for them was *sent*. No clock of a client is compared with Redis's for that: the
request is sent before the grant, so every use is at most ``use_within`` later than its grant. Each rule reserves for that
delay, so the definitions below hold where units are used, not only where they are granted; see docs/adr/0008-limits.md.

The one door to the compiled core, beside metrics.py: :class:`Tokens` is what a process holds of a grant, :class:`UnitCount` what it used.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, cast

import msgspec

from fastq._core import Tokens, UnitCount
from fastq.errors import ConfigError, FastQError, did_you_mean

__all__ = [
    "RULE_OPTIONS",
    "Acquired",
    "CostTooHigh",
    "FixedWindow",
    "LimitState",
    "Rule",
    "SlidingWindow",
    "Terms",
    "TokenBucket",
    "Tokens",
    "UnitCount",
    "block",
    "check_cost",
    "check_limiter_id",
    "check_penalty",
    "check_wait",
    "parse_rate",
    "partition_name",
    "read_rule",
    "size_of",
]

LONGEST_USE: Final = 0.1
"""Seconds: most that a granted unit may wait in a process. A changed rule is in force everywhere after this."""

SHORTEST_USE: Final = 0.005
"""Seconds: a round trip to a Redis near by, and a busy loop's turn, fit into it."""

_US: Final = 1_000_000
_SLOW: Final = 2.0  # units per second: a use's delay of 5 ms is up to 1 % of the time between two of them
_LENGTHY: Final = 0.5  # units per second: 1 % of the time between two of them is 20 ms, enough for a use's delay
_LONGEST_PERIOD: Final = 366 * 86_400.0  # seconds: of windows, and for one unit of a rate
_MOST: Final = 10**9  # units: a rate, limit or burst above this is a mistake
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,100}\Z")


class CostTooHigh(FastQError, ValueError):
    """An acquire asks for more units than its limiter can ever grant at once."""

    def __init__(self, cost: int, capacity: int) -> None:
        super().__init__(f"cost={cost} is more than the {capacity} units that this limiter can ever grant at once")
        self.cost = cost
        self.capacity = capacity


# -- rules ------------------------------------------------------------------------------------


class TokenBucket(msgspec.Struct, frozen=True, tag="token_bucket"):
    """``rate_per_second`` units a second on average, up to ``burst`` at once.

    Exactly: in any span of time, of L seconds, at most ``burst + rate_per_second × L`` units are used.

    ``burst`` is one second's worth by default, and at least 1. A burst so near to 1 that the delay of a use cannot be taken
    out of it slows a rate of up to 2/s down by up to 1 %; at a higher rate a burst below ``1 + rate × 10 ms`` counts as that:
    calls cannot be spaced more evenly than that over a network.
    """

    rate_per_second: float
    burst: float | None = None

    def __post_init__(self) -> None:
        _raise(_bucket_problems(self.rate_per_second, self.burst))

    @property
    def size(self) -> float:
        """The burst in force."""
        return max(1.0, self.rate_per_second) if self.burst is None else float(self.burst)


class SlidingWindow(msgspec.Struct, frozen=True, tag="sliding_window"):
    """At most ``limit`` units in any span of ``window_seconds`` (1 second to 366 days).

    Counted in up to 100 parts of the window, each of which counts until the whole part has left it: memory is bounded
    whatever the limit, and up to 1.5 % of it is not used.
    """

    limit: int
    window_seconds: float

    def __post_init__(self) -> None:
        _raise([*_limit_problems(self.limit), *_window_problems(self.window_seconds)])


Period = Literal["minute", "hour", "day", "week", "month"]


class FixedWindow(msgspec.Struct, frozen=True, tag="fixed_window"):
    """At most ``limit`` units in each minute, hour, day, week (from Monday) or month of the clock in ``zone``.

    Two full quotas may meet at the change of the window, as in any quota that "resets at midnight". A day of a change to
    daylight saving time is 23 or 25 hours long. ``every`` may be a number of seconds instead: windows of that length are
    counted from 1970-01-01 00:00 UTC.
    """

    limit: int
    every: Period | float = "day"
    zone: str = "UTC"

    def __post_init__(self) -> None:
        _raise([*_limit_problems(self.limit), *_every_problems(self.every), *_zone_problems(self.zone)])

    def window(self, now_us: int) -> tuple[int, int]:
        """Start and end (µs since the epoch) of the window that holds the instant ``now_us``.

        >>> FixedWindow(10, "hour").window(7_200_000_001)
        (7200000000, 10800000000)
        """
        if not isinstance(self.every, str):
            length = round(self.every * _US)
            start = now_us // length * length
            return start, start + length
        return _calendar(self.every, self.zone, now_us)


class Rule(msgspec.Struct, frozen=True):
    """What one limiter enforces: a rate, ``max_concurrent`` holders at once, or both (then both hold).

    ``max_concurrent``: holders at once, each by a lease that its process extends.
    ``use_within``: seconds that a granted unit may wait in a process before it is used, 5 ms to 10 s. The default is up
    to 100 ms by the rate; raise it when Redis is further away than that: units that arrive later are lost.
    """

    rate: TokenBucket | SlidingWindow | FixedWindow | None = None
    max_concurrent: int | None = None
    use_within: float | None = None

    def __post_init__(self) -> None:
        _raise(_rule_problems(self.rate, self.max_concurrent, self.use_within))

    def changed(self, change: Rule) -> Rule:
        """This rule with what ``change`` says; what it does not say stays, the burst of a rate among it."""
        rate = change.rate or self.rate
        if isinstance(rate, TokenBucket) and isinstance(self.rate, TokenBucket) and rate.burst is None:
            rate = TokenBucket(rate.rate_per_second, self.rate.burst)
        return Rule(
            rate=rate,
            max_concurrent=change.max_concurrent or self.max_concurrent,
            use_within=change.use_within or self.use_within,
        )

    def __str__(self) -> str:
        """In words: ``100/s burst 200``, ``5000 in any 3600 s``, ``10000 each day (Europe/Berlin)``, ``7 at once``."""
        words = []
        match self.rate:
            case TokenBucket(rate_per_second=rate, burst=burst):
                words.append(_rate_text(rate) + (f" burst {burst:g}" if burst is not None else ""))
            case SlidingWindow(limit=limit, window_seconds=seconds):
                words.append(f"{limit} in any {seconds:g} s")
            case FixedWindow(limit=limit, every=every, zone=zone):
                period = every if isinstance(every, str) else f"{every:g} s"
                words.append(f"{limit} each {period}" + ("" if zone == "UTC" else f" ({zone})"))
        if self.max_concurrent is not None:
            words.append(f"{self.max_concurrent} at once")
        return ", ".join(words)

    def encode(self) -> bytes:
        """The bytes that :meth:`decode` reads: an override of this rule in Redis."""
        return msgspec.msgpack.encode(self)

    @staticmethod
    def decode(data: bytes) -> Rule:
        """Raises ConfigError: these bytes are no rule (of this release)."""
        try:
            return msgspec.msgpack.decode(data, type=Rule)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"the rule stored in Redis cannot be read: {error}") from None

    def terms(self, now_us: int) -> Terms:
        """The rule as the scripts take it. Only those of a fixed window depend on ``now_us`` (Redis's time in µs)."""
        match self.rate:
            case TokenBucket():
                return _bucket_terms(self.rate, self.use_within)
            case SlidingWindow(limit=limit, window_seconds=seconds):
                use = self.use_within or _between(0.005 * seconds)
                window, reserve = round(seconds * _US), math.ceil(use * _US)
                return Terms("window", limit, -(-window // 100), window + reserve, use, limit, limit / seconds)
            case FixedWindow(limit=limit):
                start, end = self.rate.window(now_us)
                return Terms(
                    "fixed", limit, start, end, self.use_within or LONGEST_USE, limit, limit * _US / (end - start)
                )
            case None:
                return Terms("none", 0, 0, 0, self.use_within or LONGEST_USE, _MOST, math.inf)


class Terms(NamedTuple):
    """A rule in numbers. ``a``, ``b`` and ``c`` by ``kind`` (times in µs):

    bucket: µs per unit, room for debt, more room after idling as long | window: limit, width of a part, how long after its
    end a part counts | fixed: limit, start, end | none: nothing.
    """

    kind: str
    a: float
    b: float
    c: float
    use_within: float
    """Seconds from the sending of a request to the last use of its units."""
    capacity: int
    """Most units that can be granted at once."""
    rate: float
    """Units per second, on average."""

    def usable(self, granted_us: int) -> float:
        """Seconds from the sending of the request in which units granted at ``granted_us`` may be used."""
        if self.kind == "fixed":
            return max(0.0, min(self.use_within, (self.c - granted_us) / _US))
        return self.use_within


def _rate_text(rate: float) -> str:
    for seconds, unit in ((1, "s"), (60, "m"), (3_600, "h"), (86_400, "d")):
        units = rate * seconds
        if units >= 1 and abs(units - round(units)) < 1e-6 * units:
            return f"{round(units)}/{unit}"
    return f"{rate:g}/s"


def size_of(rule: Rule) -> float | None:
    """Units: the burst of a token bucket, the limit of a window; None without a rate."""
    match rule.rate:
        case TokenBucket():
            return rule.rate.size
        case SlidingWindow(limit=limit) | FixedWindow(limit=limit):
            return limit
    return None


def _between(seconds: float) -> float:
    return min(LONGEST_USE, max(SHORTEST_USE, seconds))


def _bucket_terms(bucket: TokenBucket, use_within: float | None) -> Terms:
    rate, size = bucket.rate_per_second, bucket.size
    slow = rate <= _SLOW
    spare = (
        0.0 if slow else SHORTEST_USE
    )  # a waiter's timer is late by a little: what flows in meanwhile needs room, too
    use = use_within or _between(0.05 * size / rate)
    if use_within is None and size < 1 + rate * (use + spare):
        use = min(use, max(SHORTEST_USE, (size - 1) / rate - spare, 0.01 / rate if slow else 0.0))
    if use_within is None and size == int(size) and rate <= _LENGTHY:
        use = min(use, 0.01 / rate)
    interval, stretch = _US / rate, 1 + rate * use
    if size == int(size) and rate <= _LENGTHY and stretch <= 1.0101:
        # An interval longer by `use` keeps the promise by itself: between the uses of n units more than the burst lie n of
        # these, less one `use`. So no room is reserved, and a fresh bucket has its whole burst, unit by unit. One µs more,
        # in both, so that no rounding keeps the last unit out of reach.
        interval = interval * stretch + 1
        return Terms("bucket", interval, size * interval + 1, 0.0, use, int(size), rate)
    if size < stretch and slow and stretch <= 1.0101:
        return Terms("bucket", interval * stretch, interval * stretch, 0.0, use, 1, rate)
    size = max(size, stretch + rate * spare)
    # One µs more, so that no rounding keeps the whole burst out of reach.
    return Terms("bucket", interval, size * interval - use * _US, use * _US + 1, use, math.floor(size), rate)


def _calendar(every: str, zone: str, now_us: int) -> tuple[int, int]:
    """The window of the clock on the wall, as UTC instants in µs."""
    if every in ("minute", "hour"):
        length = 60 * _US if every == "minute" else 3_600 * _US
        offset = _wall(now_us, zone).utcoffset()
        assert offset is not None
        shift = int(offset.total_seconds()) * _US
        start = (now_us + shift) // length * length - shift
        return start, start + length
    wall = _wall(now_us, zone)
    day = wall.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    if every == "week":
        day -= dt.timedelta(days=day.weekday())
    elif every == "month":
        day = day.replace(day=1)
    following = day + dt.timedelta(days={"day": 1, "week": 7, "month": 32}[every])
    if every == "month":
        following = following.replace(day=1)
    return _instant(day), _instant(following)


def _wall(now_us: int, zone: str) -> dt.datetime:
    from zoneinfo import ZoneInfo

    return dt.datetime.fromtimestamp(now_us // _US, ZoneInfo(zone))


def _instant(wall: dt.datetime) -> int:
    return int(wall.timestamp()) * _US


def block(terms: Terms, waiting: int, recent: int) -> int:
    """How many units to ask for in one request: what waits, and what is likely to be asked for while they may be used.

    ``waiting``: the cost of all waiters of this process. ``recent``: units that it used in the last ``use_within``
    seconds. A slow limit yields less than a unit in that time, so nothing is taken in advance and the processes share it;
    a process that uses little takes little, because units that nobody uses in time are lost to everybody.
    """
    # Twice as many: half of them are there when the answer to the next request is late, and demand may grow.
    ahead = 0 if math.isinf(terms.rate) else min(2 * recent, math.floor(terms.rate * terms.use_within))
    return max(1, min(terms.capacity, waiting + ahead))


def check_cost(terms: Terms, cost: int) -> int:
    """``cost``, if an acquire may ask for it. Raises CostTooHigh, or ConfigError when it is no whole number >= 0."""
    if check_whole(cost) > terms.capacity:
        raise CostTooHigh(cost, terms.capacity)
    return cost


def check_whole(cost: Any) -> int:
    """``cost``, if it can be one at all. Raises ConfigError."""
    if isinstance(cost, bool) or not isinstance(cost, int) or cost < 0:
        raise ConfigError(f"cost={cost!r} must be a whole number of at least 0")
    return cost


def check_wait(timeout: float) -> float:
    """``timeout``, if an acquire may wait for so many seconds: any number, infinity too. Raises ConfigError."""
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= -math.inf:
        raise ConfigError(f"timeout={timeout!r} must be a number of seconds")
    return timeout if timeout == math.inf else min(timeout, _LONGEST_PERIOD)


def check_penalty(seconds: float) -> float:
    """``seconds``, if a penalty may last so long. Raises ConfigError."""
    if not _is_number(seconds) or not 0 <= seconds <= _LONGEST_PERIOD:
        raise ConfigError(f"a penalty of {seconds!r} must be a number of seconds from 0 to 366 days")
    return seconds


# -- names ------------------------------------------------------------------------------------


def check_limiter_id(name: str) -> str:
    """``name``, if it can name a limiter. Raises ConfigError."""
    if not isinstance(name, str) or not _ID.match(name):
        raise ConfigError(f"limiter id {name!r} must be 1 to 100 characters of A-Z a-z 0-9 _ . : -")
    return name


def partition_name(key: str) -> str:
    """The part of a limiter's key names that stands for one partition; "" is the limiter as a whole.

    >>> partition_name("tenant-42"), partition_name("")
    ('tenant-42', '~all')

    Anything that does not fit into a key name is hashed; the tilde keeps both kinds apart.
    """
    if not key:
        return "~all"
    if _ID.match(key):
        return key
    if len(key) > 200:
        raise ConfigError(f"a limiter's partition key has at most 200 characters, not {len(key)}")
    return "~" + hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


# -- reading rules ------------------------------------------------------------------------------

_UNITS: Final = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3_600, "hour": 3_600, "d": 86_400, "day": 86_400}  # fmt: skip
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*/\s*([a-z]+)(?:\s+burst\s+(\d+(?:\.\d+)?))?\s*\Z")


def parse_rate(text: str) -> TokenBucket:
    """A token bucket in words: ``100/s``, ``10/m``, ``5000/h``, ``100/s burst 200``.

    >>> parse_rate("600/min burst 20")
    TokenBucket(rate_per_second=10.0, burst=20.0)

    Raises ConfigError.
    """
    match = _RATE.match(text) if isinstance(text, str) else None
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"rate {text!r} cannot be read; write '100/s', '10/m', '5000/h' or '100/s burst 200'")
    return TokenBucket(float(match[1]) / _UNITS[match[2]], float(match[3]) if match[3] else None)


_ALGORITHMS: Final[dict[str, tuple[str, ...]]] = {
    "token_bucket": ("rate_per_second", "burst"),
    "sliding_window": ("limit", "window_seconds"),
    "fixed_window": ("limit", "every", "window_seconds", "zone"),
    "none": (),
}
RULE_OPTIONS: Final = frozenset({"algorithm", "rate", "max_concurrent", "use_within"}.union(*_ALGORITHMS.values()))
"""The options that :func:`read_rule` knows."""


def read_rule(options: Mapping[str, object]) -> Rule:
    """A rule from the options of a table or a call; ``rate="100/s"`` stands for a token bucket.

    Raises ConfigError, whose message names every problem at once (separated by "; ").
    """
    given = {name: value for name, value in options.items() if value is not None}
    problems = [f"unknown option {n!r}{did_you_mean(n, RULE_OPTIONS)}" for n in given if n not in RULE_OPTIONS]
    algorithm = given.get("algorithm", _implied(given))
    if algorithm not in _ALGORITHMS:
        near = did_you_mean(str(algorithm), _ALGORITHMS)
        _raise([*problems, f"unknown algorithm {algorithm!r}{near} (known: {', '.join(_ALGORITHMS)})"])
    used = {*_ALGORITHMS[cast(str, algorithm)], "algorithm", "max_concurrent", "use_within"}
    if algorithm == "token_bucket":
        used.add("rate")
    problems += [f"{n} is no option of {algorithm}" for n in given if n in RULE_OPTIONS and n not in used]
    rate, more = _read_rate(cast(str, algorithm), given)
    problems += more
    concurrent, use_within = given.get("max_concurrent"), given.get("use_within")
    problems += _rule_problems(rate or (None if algorithm == "none" else _UNREADABLE), concurrent, use_within)
    _raise(problems)
    return Rule(rate, cast(Any, concurrent), cast(Any, use_within))


_UNREADABLE: Final = object()


def _implied(given: Mapping[str, object]) -> str:
    if "rate" in given or "rate_per_second" in given or "burst" in given:
        return "token_bucket"
    if "every" in given or "zone" in given:
        return "fixed_window"
    return "sliding_window" if "limit" in given or "window_seconds" in given else "none"


def _read_rate(algorithm: str, given: Mapping[str, Any]) -> tuple[Any, list[str]]:
    missing: list[str] = []

    def need(name: str) -> Any:
        if name not in given:
            missing.append(f"{algorithm} needs {name}")
        return given.get(name)

    try:
        if algorithm == "token_bucket" and "rate" in given:
            both = [n for n in ("rate_per_second", "burst") if n in given]
            if both:
                return None, [f"rate says it all: leave {' and '.join(both)} away"]
            return parse_rate(given["rate"]), []
        if algorithm == "token_bucket":
            rate = need("rate_per_second")
            return (None, missing) if missing else (TokenBucket(rate, given.get("burst")), [])
        if algorithm == "sliding_window":
            limit, seconds = need("limit"), need("window_seconds")
            if missing:
                return None, missing + (_limit_problems(limit) if limit is not None else []) + (
                    _window_problems(seconds) if seconds is not None else []
                )
            return SlidingWindow(limit, seconds), []
        if algorithm == "fixed_window":
            limit = need("limit")
            every = given.get("every", given.get("window_seconds", "day"))
            return (None, missing) if missing else (FixedWindow(limit, every, given.get("zone", "UTC")), [])
    except ConfigError as error:
        return None, [str(error)]
    return None, []


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("; ".join(problems))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _bucket_problems(rate: Any, burst: Any) -> list[str]:
    problems = []
    if not _is_number(rate) or not 1 / _LONGEST_PERIOD <= rate <= _MOST:
        problems.append(f"rate_per_second={rate!r} must be a number above one unit a year and up to {_MOST}")
    if burst is not None and (not _is_number(burst) or not 1 <= burst <= _MOST):
        problems.append(f"burst={burst!r} must be a number from 1 to {_MOST}")
    return problems


def _limit_problems(limit: Any) -> list[str]:
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= _MOST:
        return [f"limit={limit!r} must be a whole number from 1 to {_MOST}"]
    return []


def _window_problems(seconds: Any, name: str = "window_seconds") -> list[str]:
    if not _is_number(seconds) or not 1 <= seconds <= _LONGEST_PERIOD:
        return [f"{name}={seconds!r} must be a number of seconds from 1 to 366 days"]
    return []


def _every_problems(every: Any) -> list[str]:
    if not isinstance(every, str):
        return _window_problems(every, "every")
    known = ("minute", "hour", "day", "week", "month")
    return [] if every in known else [f"every={every!r} must be one of {', '.join(known)}{did_you_mean(every, known)}"]


def _zone_problems(zone: Any) -> list[str]:
    if zone == "UTC":
        return []
    from zoneinfo import ZoneInfo

    try:
        ZoneInfo(zone)
    except (OSError, LookupError, ValueError, TypeError):
        return [f"zone={zone!r} is no time zone known here, like 'Europe/Berlin'"]
    return []


def _rule_problems(rate: object, max_concurrent: Any, use_within: Any) -> list[str]:
    problems = []
    if rate is None and max_concurrent is None:
        problems.append("a limiter needs a rate or max_concurrent")
    if max_concurrent is not None and (
        isinstance(max_concurrent, bool) or not isinstance(max_concurrent, int) or not 1 <= max_concurrent <= 1_000_000
    ):
        problems.append(f"max_concurrent={max_concurrent!r} must be a whole number from 1 to 1000000")
    if use_within is not None and (not _is_number(use_within) or not SHORTEST_USE <= use_within <= 10):
        problems.append(f"use_within={use_within!r} must be a number of seconds from 0.005 to 10")
    elif use_within is not None and isinstance(rate, TokenBucket) and use_within > (most := _longest_use(rate)):
        least = math.ceil(1 + rate.rate_per_second * (use_within + SHORTEST_USE))
        problems.append(
            f"use_within={use_within!r} is longer than a burst of {rate.size:g} leaves room for at this rate: "
            f"at most {math.floor(most * 1_000) / 1_000:g}, or burst={least}"
        )
    return problems


def _longest_use(bucket: TokenBucket) -> float:
    """How long the units of a bucket may live without more of them in use at once than its burst."""
    rate, size = bucket.rate_per_second, bucket.size
    room = (size - 1) / rate
    return max(SHORTEST_USE, *((room, 0.01 / rate) if rate <= _SLOW else (room - SHORTEST_USE,)))


# -- replies ------------------------------------------------------------------------------------


class Acquired(NamedTuple):
    """What Redis answered to one request.

    ``status``: b"granted" | b"short" (units are missing: they are there in ``wait_us``) | b"full" (slots are missing: the
    first lease of a holder ends in ``wait_us``; a slot given back before leaves a token in the wake list) | b"penalized"
    (for ``wait_us``) | b"window" (the fixed window in the request is over or has not begun: ask with one of ``now_us``)
    | b"rule" (``rule`` overrides, or b"" the override has gone: ask again with that).

    With b"granted" and less than was wanted, or nothing left, ``wait_us`` says when one more unit is there: who paces itself
    needs one request for each grant.
    """

    status: bytes
    units: int
    """Units granted."""
    slots: int
    """Holders, from the first in the request, that have their slots."""
    wait_us: int
    now_us: int
    """Redis's time of the grant: to be named when units are given back."""
    left: int
    """Units that were left in Redis; -1: the rule has no rate."""
    rule: bytes


class LimitState(NamedTuple):
    """A limiter, or one partition of it, as Redis sees it."""

    now_us: int
    left: int
    """Units to be had now; -1: the rule has no rate."""
    reset_us: int
    """µs until all units are back if nobody takes any."""
    penalty_us: int
    """µs until a penalty ends, 0 without one."""
    holders: int
    lease_us: int
    """µs until the first lease of a holder ends, 0 without a holder."""
    rule: bytes
    """The rule that overrides the configured ones, b"" without one."""
    pace: int = 1_000_000
    """In millionths: below 1,000,000 while an adaptive limiter is slowed down."""
