"""Processes that share a limiter, on simulated time: what they used and when, judged by the words of the rules alone.

The engine is whatever runs a command at an instant: the memory engine, or the Lua scripts with their clock replaced.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fastq.broker import commands
from fastq.broker.command import Command
from fastq.broker.keys import LimitKeys
from fastq.broker.memory import MemoryEngine
from fastq.limits import FixedWindow, Rule, SlidingWindow, Terms, TokenBucket, block

T = TypeVar("T")
US = 1_000_000
# The fleet's first instant: the start of an hour, in the future, so that no key of a real server expires meanwhile.
START = 1_900_000_800 * US

Engine = Callable[[Command[Any], int], Any]


class Memory:
    """The memory engine at an instant."""

    def __init__(self) -> None:
        self.now = START
        self.engine = MemoryEngine(lambda: self.now)

    def __call__(self, command: Command[T], now: int) -> T:
        self.now = now
        return self.engine.call(command)


class Fleet:
    """``clients`` processes with ``waiting`` units of backlog each, from START for ``seconds``.

    ``delay``: least and most seconds of a message on its way. ``wild``: units are used as late as they may be, or at any
    instant before; a part is not used at all and given back, now or later. Otherwise each is used on arrival.
    ``tamper`` and ``lie`` (about the age of what is given back) plant a fault that the judgement has to find.
    """

    def __init__(
        self,
        engine: Engine,
        rule: Rule,
        *,
        clients: int = 1,
        seconds: float = 10,
        waiting: int = 1_000,
        delay: tuple[float, float] = (0.0001, 0.001),
        wild: bool = False,
        seed: int = 1,
        tamper: Callable[[Terms], Terms] = lambda terms: terms,
        lie: bool = False,
    ) -> None:
        self.engine = engine
        self.rule = rule
        self.waiting = waiting
        self.delay = tuple(round(bound * US) for bound in delay)
        self.wild = wild
        self.rng = random.Random(seed)
        self.keys = LimitKeys("fastq", "fleet")
        self.uses: list[tuple[int, int]] = []
        self.shares = [0] * clients
        self.calls = 0
        self.returned = 0
        self.end = START + round(seconds * US)
        self.tamper = tamper
        self.lie = lie
        self._events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._tickets = itertools.count()
        for client in range(clients):
            self.at(START + self.rng.randrange(1_000), self.ask, client)

    def run(self) -> Fleet:
        while self._events:
            now, _, step, args = heapq.heappop(self._events)
            step(now, *args)
        self.uses.sort()
        return self

    def at(self, when: float, step: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (round(when), next(self._order), step, args))

    def travel(self) -> int:
        return self.rng.randint(*self.delay)

    # -- one client ---------------------------------------------------------------------------------

    def ask(self, now: int, client: int, sent_for: int | None = None) -> None:
        if now >= self.end:
            return
        terms = self.tamper(self.rule.terms(sent_for or now))
        need = 1
        if self.wild:
            need = self.rng.choice([1, 1, 1, min(3, terms.capacity), terms.capacity])
        command = commands.acquire(self.keys, terms, need=need, want=block(terms, self.waiting, 0))
        self.at(now + self.travel(), self.serve, client, now, terms, command)

    def serve(self, now: int, client: int, sent: int, terms: Any, command: Command[Any]) -> None:
        self.calls += 1
        reply = self.engine(command, now)
        assert reply.now_us == now
        self.at(now + self.travel(), self.receive, client, sent, terms, reply)

    def receive(self, now: int, client: int, sent: int, terms: Any, reply: Any) -> None:
        if reply.status == b"granted":
            deadline = sent + int(terms.usable(reply.now_us) * US)
            if now > deadline:
                self.give_back(now, terms, reply.units, reply.now_us)
            else:
                self.use(now, client, deadline, terms, reply)
        # A timer is late by a little, never early.
        late = self.rng.randrange(200) if reply.wait_us else 0
        self.at(now + reply.wait_us + late, self.ask, client, reply.now_us if reply.status == b"window" else None)

    def use(self, now: int, client: int, deadline: int, terms: Any, reply: Any) -> None:
        back = 0
        if not self.wild:
            self.uses.append((now, reply.units))
        else:
            back = self.rng.choice([0, 0, reply.units, self.rng.randint(0, reply.units)])
            together = self.rng.choice([now, deadline, deadline, 0])  # 0: each at an instant of its own
            for _ in range(reply.units - back):
                self.uses.append((together or self.rng.randint(now, deadline), 1))
        self.shares[client] += reply.units - back
        if back:
            self.at(
                self.rng.choice([now, self.rng.randint(now, 2 * deadline - now)]),
                self.give_back,
                terms,
                back,
                reply.now_us,
            )

    def give_back(self, now: int, terms: Any, units: int, granted: int) -> None:
        granted = now if self.lie else granted
        ticket = f"t{next(self._tickets)}"
        command = commands.give_back(self.keys, terms, ticket, units=units, granted_us=granted)
        self.at(now + self.travel(), self.take_back, command)

    def take_back(self, now: int, command: Command[Any]) -> None:
        self.returned += self.engine(command, now).units

    # -- the judgement ------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        return sum(units for _, units in self.uses)

    def share_used(self, skip: float = 0.0) -> float:
        """Units used after the first ``skip`` seconds, as a part of what the rate yields in that time."""
        since = START + skip * US
        used = sum(units for when, units in self.uses if since <= when < self.end)
        return used / (self.rule.terms(START).rate * (self.end - since) / US)

    def excess(self) -> float:
        """How many units too many were used in the worst span of time; 0 or less: none."""
        match self.rule.rate:
            case TokenBucket(rate_per_second=rate):
                return over_bucket(self.uses, rate, promised_burst(self.rule.rate))
            case SlidingWindow(limit=limit, window_seconds=seconds):
                return over_window(self.uses, limit, round(seconds * US))
            case FixedWindow(limit=limit):
                return over_fixed(self.uses, limit, self.rule.rate)
        raise AssertionError


def promised_burst(bucket: TokenBucket) -> float:
    """The docstring of TokenBucket in one line."""
    size = max(1.0, bucket.rate_per_second) if bucket.burst is None else bucket.burst
    return size if bucket.rate_per_second <= 2 else max(size, 1 + bucket.rate_per_second * 0.01)


def over_bucket(uses: Iterable[tuple[int, int]], rate: float, burst: float) -> float:
    """Units above ``burst + rate × L``, in the worst of all spans of L seconds."""
    debt, before, worst = 0.0, 0, -burst
    for when, units in uses:
        debt = max(0.0, debt - (when - before) * rate / US) + units
        worst, before = max(worst, debt - burst), when
    return worst if worst > 1e-6 else min(worst, 0)


def over_window(uses: list[tuple[int, int]], limit: int, length: int) -> int:
    """Units above ``limit`` in the worst span of ``length`` µs, both ends included."""
    first = inside = 0
    worst = -limit
    for when, units in uses:
        inside += units
        while uses[first][0] < when - length:
            inside -= uses[first][1]
            first += 1
        worst = max(worst, inside - limit)
    return worst


def over_fixed(uses: Iterable[tuple[int, int]], limit: int, rule: FixedWindow) -> int:
    counts: dict[int, int] = {}
    for when, units in uses:
        start, _ = rule.window(when)
        counts[start] = counts.get(start, 0) + units
    return max(counts.values(), default=0) - limit
