"""The third mover: the commands of limiters, run on a private memory instead of Redis.

What the Lua scripts do, line by line, in doubles as Lua has them: the reference model of the scripts (a test sends both
the same requests and compares every reply) and the engine of the memory store. One process, one thread at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from fastq.broker.command import Command

__all__ = ["MemoryEngine"]

T = TypeVar("T")

_GRACE: Final = 60_000  # ms: slots and tickets, as in the scripts
_SWEEP: Final = 1_000  # entries, at least, between two looks for what has expired


class _State:
    """The HASH ``{l}:state:<key>``: named fields, and the parts of a window by their end in µs."""

    __slots__ = ("expires", "fields", "parts")

    def __init__(self) -> None:
        self.fields: dict[str, float] = {}
        self.parts: dict[float, float] = {}
        self.expires = math.inf  # ms


class MemoryEngine:
    """``call(command)`` as the other movers have it, for the commands of limiters except ``wait_for_slot``.

    ``clock`` stands for Redis's: µs since the epoch, never going back. States of idle partitions are forgotten.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._rules: dict[bytes, bytes] = {}
        self._states: dict[bytes, _State] = {}
        self._slots: dict[bytes, dict[str, float]] = {}
        self._given: dict[bytes, float] = {}
        self._sweep_at = _SWEEP
        self._scripts: dict[str | None, Callable[[Sequence[bytes], Sequence[Any], int], Any]] = {
            "acquire": self._acquire,
            "give_back": self._give_back,
            "hold": self._hold,
            "penalize": self._penalize,
            "limit_state": self._limit_state,
            None: self._plain,
        }

    def __len__(self) -> int:
        """States and slots that are remembered."""
        return len(self._states) + len(self._slots)

    def call(self, command: Command[T]) -> T:
        """Run one command. KeyError: it is none of a limiter."""
        return command.decode(self._scripts[command.script](command.keys, command.args, self._clock()))

    # -- the scripts ------------------------------------------------------------------------------

    def _acquire(self, keys: Sequence[bytes], args: Sequence[Any], now: int) -> list[Any]:
        override, kind = args[0], args[1]
        need, want, most, lease = args[5:9]
        current = self._rules.get(keys[0], b"")
        if current != override:
            return [b"rule", 0, 0, 0, now, -1, current]
        rate = self._rate(keys[1], args[1:5], now)
        penalty = self._penalized_until(rate, keys[4:])
        if penalty > now:
            return _refused(b"penalized", penalty - now, now)
        if kind == "fixed" and not rate.b <= now < rate.c:
            return _refused(b"window", 0, now)
        if most < 1:
            return self._take_units(keys[1], rate, need, want)
        return self._take_slots(keys, rate, most, lease, args[9:])

    def _penalized_until(self, rate: _Rate, whole: Sequence[bytes]) -> float:
        known = (self._states.get(key) for key in whole)
        states = [rate.state, *(state for state in known if state is not None)]
        return max(state.fields.get("until", 0) for state in states)

    def _take_units(self, key: bytes, rate: _Rate, need: int, want: int) -> list[Any]:
        wait = rate.wait_for(need, 0)
        if wait > 0:
            return _refused(b"short", wait, rate.now)
        units = want if rate.kind == "none" else max(need, min(want, rate.left))
        if units < want or rate.left - units < 1:
            wait = rate.wait_for(1, units)
        self._spend(key, rate, units)
        return [b"granted", int(units), 0, int(wait), rate.now, max(-1, int(rate.left - units)), b""]

    def _take_slots(
        self, keys: Sequence[bytes], rate: _Rate, most: int, lease: int, wanted: Sequence[Any]
    ) -> list[Any]:
        now_ms = rate.now // 1_000
        held = {h: ends for h, ends in self._slots_of(keys[2], now_ms).items() if ends > now_ms}
        self._slots[keys[2]] = held
        free, units, granted, wait = most - len(held), 0, [], 0.0
        for holder, cost in zip(wanted[::2], wanted[1::2], strict=True):
            if holder not in held and free < 1:
                break
            wait = rate.wait_for(cost, units)
            if wait > 0:
                break
            units += cost
            free -= holder not in held
            granted.append(holder)
        if not granted:
            return (
                _refused(b"short", wait, rate.now) if wait > 0 else _refused(b"full", _lease(held, rate.now), rate.now)
            )
        self._spend(keys[1], rate, units)
        held.update(dict.fromkeys(granted, now_ms + lease))
        return [b"granted", units, len(granted), int(wait), rate.now, max(-1, int(rate.left - units)), b""]

    def _spend(self, key: bytes, rate: _Rate, units: float) -> None:
        if units >= 1 and rate.kind != "none":
            self._keep(key, rate.state)
            rate.state.expires = math.ceil(rate.spend(units) / 1_000)

    def _give_back(self, keys: Sequence[bytes], args: Sequence[Any], now: int) -> list[int]:
        units, granted = args[4], args[5]
        back = 0.0
        now_ms = now // 1_000
        if (
            units > 0
            and args[0] != "none"
            and self._state(keys[0], now) is not None
            and self._given.get(keys[3], 0) <= now_ms
        ):
            self._given[keys[3]] = now_ms + _GRACE
            self._sweep(now_ms)
            back = self._rate(keys[0], args[:4], now).refund(units, granted)
        held = self._slots_of(keys[1], now_ms)
        freed = sum(held.pop(holder, None) is not None for holder in args[6:])
        return [int(back), freed]

    def _hold(self, keys: Sequence[bytes], args: Sequence[Any], now: int) -> list[int]:
        held = self._slots_of(keys[0], now // 1_000)
        reply = [int(holder in held) for holder in args[1:]]
        held.update({holder: now // 1_000 + args[0] for holder in args[1:] if holder in held})
        return reply

    def _penalize(self, keys: Sequence[bytes], args: Sequence[Any], now: int) -> int:
        duration = args[4]
        state = self._state(keys[0], now)
        if duration < 1:
            if state is not None and state.fields.pop("until", 0) > now and args[0] == "bucket":
                state.fields.update(at=now, debt=float(args[2]) + float(args[3]))
            if state is not None:
                for name in ("pace", "since", "recovery", "halved"):
                    state.fields.pop(name, None)
            return 0
        state = state or _State()
        before = now // 1_000 if math.isinf(state.expires) else state.expires
        until = state.fields.get("until", 0)
        stop = max(now + duration, until)
        ends: float = stop
        state.fields["until"] = stop
        pace = _slow_down(state.fields, args[5], now, until, stop)
        if args[0] == "bucket":
            state.fields.update(at=stop, debt=float(args[2]) + float(args[3]))
            ends = stop + lasts(pace, stop, state.fields["debt"])
        if pace is not None:
            ends = max(ends, stop + pace.span)
        state.expires = max(math.ceil(ends / 1_000), before)
        self._keep(keys[0], state)
        return int(stop - now)

    def _limit_state(self, keys: Sequence[bytes], args: Sequence[Any], now: int) -> list[Any]:
        rate = self._rate(keys[1], args[:4], now)
        penalty = max(0, self._penalized_until(rate, keys[3:]) - now)
        held = self._slots_of(keys[2], now // 1_000)
        holders = sum(ends > now // 1_000 for ends in held.values())
        rule = self._rules.get(keys[0], b"")
        return [
            now,
            int(rate.left),
            int(rate.reset()),
            int(penalty),
            holders,
            int(_lease(held, now)),
            rule,
            rate.millionths(),
        ]

    def _plain(self, _keys: Sequence[bytes], words: Sequence[Any], _now: int) -> Any:
        """SET, GET and DEL of a rule, DEL of a state."""
        verb, key = words[0], words[1]
        if verb == "SET":
            self._rules[key] = words[2]
            return b"OK"
        if verb == "GET":
            return self._rules.get(key)
        if verb == "DEL":
            return int(self._rules.pop(key, None) is not None or self._states.pop(key, None) is not None)
        raise KeyError(verb)

    # -- what is remembered -----------------------------------------------------------------------

    def _state(self, key: bytes, now: int) -> _State | None:
        state = self._states.get(key)
        return None if state is None or state.expires < now // 1_000 else state

    def _rate(self, key: bytes, rule: Sequence[Any], now: int) -> _Rate:
        return _Rate(self._state(key, now) or _State(), now, *rule)

    def _slots_of(self, key: bytes, now_ms: int) -> dict[str, float]:
        held = self._slots.get(key)
        return {} if held is None or max(held.values(), default=-_GRACE) + _GRACE < now_ms else held

    def _keep(self, key: bytes, state: _State) -> None:
        self._states[key] = state
        self._sweep(self._clock() // 1_000)

    def _sweep(self, now_ms: int) -> None:
        """Forget what has expired, each time that the number of entries has doubled."""
        if len(self) + len(self._given) < self._sweep_at:
            return
        self._states = {key: state for key, state in self._states.items() if state.expires >= now_ms}
        self._slots = {key: held for key in self._slots if (held := self._slots_of(key, now_ms))}
        self._given = {key: ends for key, ends in self._given.items() if ends > now_ms}
        self._sweep_at = max(_SWEEP, 2 * (len(self) + len(self._given)))


def _refused(status: bytes, wait: float, now: int) -> list[Any]:
    return [status, 0, 0, int(wait), now, -1, b""]


def _lease(held: dict[str, float], now: int) -> float:
    return max(1, min(held.values()) * 1_000 - now) if held else 0


class Pace:
    """How an adaptive limiter recovers from a penalty: its own time runs at ``pace`` (of 1) from ``since`` on, and faster by
    1 per ``recovery`` until it runs at 1 again. Times in µs. What lua/include/pace.lua does.

    >>> p = Pace(0.5, 0, 60e6)
    >>> p.at(0), p.at(15e6), p.at(99e6), p.flow(30e6) / 1e6
    (0.5, 0.75, 1.0, 22.5)
    """

    __slots__ = ("pace", "recovery", "since", "span", "whole")

    def __init__(self, pace: float, since: float, recovery: float) -> None:
        self.pace, self.since, self.recovery = pace, since, recovery
        self.span = (1 - pace) * recovery
        self.whole = self.span * (pace + self.span / (2 * recovery))

    def at(self, now: float) -> float:
        """The pace at an instant."""
        return min(1.0, self.pace + max(0, now - self.since) / self.recovery)

    def flow(self, now: float) -> float:
        """The limiter's own time at an instant."""
        x = now - self.since
        if x <= 0:
            return x
        if x >= self.span:
            return self.whole + x - self.span
        return x * (self.pace + x / (2 * self.recovery))

    def instant(self, own: float) -> float:
        """The instant of its own time."""
        if own <= 0:
            return self.since + own
        if own >= self.whole:
            return self.since + self.span + own - self.whole
        return self.since + self.recovery * (math.sqrt(self.pace * self.pace + 2 * own / self.recovery) - self.pace)

    def allowed(self, now: float, units: float, limit: float) -> float:
        """The instant from which so many of a window's units are allowed."""
        if units > limit:
            return math.inf
        if units <= 1 or units <= limit * self.at(now):
            return now
        return self.since + (units / limit - self.pace) * self.recovery


def pace_at(pace: Pace | None, now: float) -> float:
    """The pace of a limiter that may be adaptive."""
    return 1 if pace is None else pace.at(now)


def lasts(pace: Pace | None, now: float, own: float) -> float:
    """µs from ``now`` until so much of the limiter's own time has passed."""
    return own if pace is None else pace.instant(pace.flow(now) + own) - now


def _pace(fields: dict[str, float]) -> Pace | None:
    return Pace(fields["pace"], fields["since"], fields["recovery"]) if "pace" in fields else None


def _slow_down(fields: dict[str, float], recovery: float, now: int, before: float, stop: float) -> Pace | None:
    pace = _pace(fields)
    if recovery < 1 and pace is None:
        return None
    slower = pace_at(pace, now)
    if recovery < 1 and pace is not None:
        recovery = pace.recovery
    elif before <= now and now >= fields.get("halved", 0) + 1_000_000:
        slower = max(1 / 32, slower / 2)
        fields["halved"] = now
    fields.update(pace=slower, since=stop, recovery=recovery)
    return _pace(fields)


class _Rate:
    """lua/include/rate.lua, wait_for.lua, spend.lua and refund() of give_back.lua."""

    __slots__ = ("a", "b", "c", "count", "debt", "kind", "left", "now", "pace", "parts", "raw", "state", "total")

    def __init__(self, state: _State, now: int, kind: str, a: str, b: str, c: str) -> None:
        self.state, self.now, self.kind = state, now, kind
        self.a, self.b, self.c = float(a), float(b), float(c)
        self.left: float = -1
        fields = state.fields
        self.pace = pace = _pace(fields) if kind != "none" else None
        if kind == "bucket":
            self.raw = -self.c
            if "at" in fields:
                passed = pace.flow(now) - pace.flow(fields["at"]) if pace else now - fields["at"]
                if passed < 0 and fields.get("until", 0) <= now:
                    passed = 0  # a clock that went back does not make debt
                self.raw = max(-self.c, min(self.b + self.c, fields["debt"]) - passed)
            self.debt = max(0.0, self.raw)
            self.left = max(0, math.floor((self.b - self.debt) / self.a))
        elif kind == "window":
            self.parts = sorted(part for part in state.parts.items() if part[0] + self.c > now)
            self.total = sum(count for _, count in self.parts)
            self.left = max(0, self._allowed() - self.total)
        elif kind == "fixed":
            self.count = fields.get("count", 0) if fields.get("start", -1) == self.b else 0
            self.left = max(0, self._allowed() - self.count)

    def _allowed(self) -> float:
        return max(1, math.floor(self.a * pace_at(self.pace, self.now)))

    def millionths(self) -> int:
        """The pace."""
        return math.floor(1_000_000 * pace_at(self.pace, self.now))

    def wait_for(self, n: float, spent: float) -> float:
        """µs until n units are there once ``spent`` more are spent; 0 when they are."""
        if n < 1 or self.kind == "none":
            return 0
        if self.kind == "bucket":
            debt = self.raw if spent < 1 and n * self.a > self.b else self.debt
            missing = debt + (spent + n) * self.a - self.b
            return math.ceil(lasts(self.pace, self.now, missing)) if missing > 0 else 0
        if spent + n <= self.left:
            return 0
        if self.kind == "fixed":
            if self.pace is None:
                return self.c - self.now
            return math.ceil(min(self.c, self.pace.allowed(self.now, self.count + spent + n, self.a)) - self.now)
        if self.pace is not None:
            return self._wait_at_pace(self.pace, n, spent)
        excess = self.total + spent + n - self.a
        for ends, count in self.parts:
            excess -= count
            if excess <= 0:
                return ends + self.c - self.now
        return self._part(self.now) + self.c - self.now

    def _wait_at_pace(self, pace: Pace, n: float, spent: float) -> float:
        needed, now, limit = self.total + spent + n, self.now, self.a
        best = pace.allowed(now, needed, limit)
        for ends, count in self.parts:
            needed -= count
            best = min(best, max(ends + self.c, pace.allowed(now, needed, limit)))
        all_gone = max(self._part(now) + self.c, pace.allowed(now, n, limit))
        return max(1, math.ceil(min(best, all_gone) - now))

    def _part(self, instant: float) -> float:
        return (math.floor(instant / self.b) + 1) * self.b

    def spend(self, n: float) -> float:
        """Write down a grant; returns when the state says nothing any more, in µs."""
        state = self.state
        if self.kind == "bucket":
            debt = self.debt + n * self.a
            state.fields.update(at=self.now, debt=debt)
            return self._end(self.now + lasts(self.pace, self.now, debt + self.c))
        if self.kind == "fixed":
            state.fields.update(start=self.b, count=self.count + n)
            return self._end(self.c)
        part = self._part(self.now)
        state.parts = dict(self.parts)
        state.parts[part] = state.parts.get(part, 0) + n
        return self._end(part + self.c)

    def _end(self, ends: float) -> float:
        return ends if self.pace is None else max(ends, self.pace.since + self.pace.span)

    def refund(self, units: int, granted: int) -> float:
        """Write down units that come back; returns how many."""
        state = self.state
        if self.kind == "bucket":
            if state.fields.get("until", 0) > self.now:
                return 0  # it is to be empty after the penalty
            credit = min(self.debt, max(0, units * self.a - max(0, self.now - granted)))
            if credit > 0:
                state.fields.update(at=self.now, debt=self.debt - credit)
            return math.floor(credit / self.a)
        if self.kind == "window":
            part = self._part(granted)
            back = min(units, state.parts.get(part, 0))
            if back < 1 or part + self.c <= self.now:
                return 0
            state.parts[part] -= back
            return back
        if not self.b <= granted < self.c or self.now >= self.c:
            return 0
        state.fields.update(count=self.count - min(units, self.count))
        return min(units, self.count)

    def reset(self) -> float:
        """µs until all units are there."""
        if self.kind == "bucket":
            return math.ceil(lasts(self.pace, self.now, self.debt))
        if self.kind == "fixed":
            return max(0, self.c - self.now) if self.count > 0 else 0
        if self.kind == "window" and self.parts:
            return self.parts[-1][0] + self.c - self.now
        return 0
