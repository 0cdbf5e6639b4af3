"""Limiters whose Redis stands still or dies at random moments: everybody has an answer in time, nothing leaks, no limit is exceeded."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastq
from benchmarks.limits.forks import over_bucket, over_window
from fastq.broker.embedded import EmbeddedServer
from fastq.limiter.api import Limiter
from fastq.limiter.outage import SILENT, Outage
from tests.redis.limit_lab import application

Figure = Callable[[str], None]

OUTAGES = 3 * int(os.environ.get("CHAOS_SCALE", "1"))

SLACK = 2.5
"""Seconds that an answer may take longer on a busy machine; a connection that hears nothing is given up after ten."""

RULES: dict[str, dict[str, Any]] = {
    "bucket": {"rate": "200/s"},
    "bucket_open": {"rate": "200/s", "on_error": "open"},
    "window": {"algorithm": "sliding_window", "limit": 100, "window_seconds": 2},
    "slots": {"max_concurrent": 3, "lease": 2},
    "slots_open": {"max_concurrent": 3, "lease": 2, "on_error": "open"},
    "both_open": {"rate": "50/s", "max_concurrent": 4, "lease": 2, "on_error": "open"},
}


class Crowd:
    """Users of one limiter, four at a time, and what they met."""

    def __init__(self, name: str, limiter: Limiter, dice: random.Random) -> None:
        self.name = name
        self.limiter = limiter
        self.dice = dice
        self.uses: list[float] = []
        self.met: Counter[str] = Counter()
        self.faults: list[str] = []

    async def user(self, over: asyncio.Event) -> None:
        while not over.is_set():
            await self.use(self.dice.choice((0.0, 0.01, 0.1, 0.7, 2.0)))
            await asyncio.sleep(self.dice.uniform(0, 0.03))

    async def use(self, timeout: float) -> None:
        started = time.monotonic()
        passes = await self.acquire(timeout)
        self.check(started, max(timeout, SILENT), f"an answer for timeout={timeout}")
        if passes:
            self.uses.append(time.monotonic())
        if passes and self.limiter.plan.rule.max_concurrent is not None:
            await asyncio.sleep(self.dice.uniform(0, 0.02))
            released = time.monotonic()
            await self.limiter.release()
            self.check(released, SILENT, "giving back")

    async def acquire(self, timeout: float) -> bool:
        met, passes = "passed", True
        try:
            if timeout and self.dice.random() < 0.2:
                async with asyncio.timeout(timeout):  # cancelled, whatever it waits for
                    await self.limiter.acquire()
            elif timeout:
                await self.limiter.acquire(timeout=timeout)
            else:
                passes = await self.limiter.try_acquire()
        except TimeoutError as error:
            met, passes = type(error).__name__, False
        except fastq.BrokerUnavailable as error:
            met, passes = "BrokerUnavailable", False
            if self.limiter.plan.on_error == "open":
                self.faults.append(f"{self.name} is open and said {error}")
        self.met[met] += 1
        return passes

    def check(self, started: float, limit: float, what: str) -> None:
        if (taken := time.monotonic() - started) > limit + SLACK:
            self.faults.append(f"{self.name}: {what} took {taken:.1f} s")

    async def left(self) -> Iterator[str]:
        """What should not be there any more, once all have gone and Redis answers."""
        gate = self.limiter.here
        await self.limiter.acquire(timeout=10)
        if gate.held:
            await self.limiter.release()
        state = await self.limiter.state()
        found = {"holders": state.holders, "held": gate.held, "queued": gate._queued, "outage": gate._outage.failure}
        return (f"{self.name} has {name} left: {what}" for name, what in found.items() if what)


async def trouble(server: EmbeddedServer, dice: random.Random, pauses: list[float], *, kills: bool) -> None:
    """Redis stands still for so many seconds each, or is killed and comes back empty."""
    for seconds in pauses:
        await asyncio.sleep(dice.uniform(0.3, 1.5))
        if kills and dice.random() < 0.5:
            server.kill()
            await asyncio.sleep(seconds / 4)
            await asyncio.to_thread(server.start)
        else:
            server.pause()
            await asyncio.sleep(seconds)
            server.resume()


async def live_through(server: EmbeddedServer, dice: random.Random, pauses: list[float], *, kills: bool) -> list[Crowd]:
    async with application(server.url) as app:
        crowds = [Crowd(name, app.limiter(name, **rule), dice) for name, rule in RULES.items()]
        over = asyncio.Event()
        users = [asyncio.create_task(crowd.user(over)) for crowd in crowds for _ in range(4)]
        await trouble(server, dice, pauses, kills=kills)
        over.set()
        await asyncio.gather(*users)
        for crowd in crowds:
            crowd.faults += await crowd.left()
    return crowds


@pytest.mark.parametrize("kills", [False, True], ids=["silent", "killed"])
async def test_everybody_has_an_answer_in_time_and_nothing_leaks(
    make_server: Any, dice: random.Random, figure: Figure, kills: bool
) -> None:
    pauses = [2.5, *(dice.choice((0.2, 0.8, 1.3)) for _ in range(OUTAGES))]
    crowds = await live_through(make_server(), dice, pauses, kills=kills)
    assert [fault for crowd in crowds for fault in crowd.faults] == []
    met = Counter[str]()
    for crowd in crowds:
        met.update(crowd.met)
    assert met["BrokerUnavailable"], "Redis was away, and nobody noticed"
    uses = {crowd.name: crowd.uses for crowd in crowds}
    if not kills:  # else what was used is forgotten
        assert over_bucket(sorted(uses["bucket"]), 200, 200) <= 0
        assert over_window(sorted(uses["window"]), 100, 2) <= 0
    figure(f"{len(pauses)} outages ({'killed' if kills else 'silent'}), {met.total():,} acquires: {dict(met)}")


async def test_a_limiter_that_waits_for_a_silent_redis_is_found(
    make_server: Any, dice: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Outage, "watch", lambda *_: contextlib.nullcontext())
    crowds = await live_through(make_server(), dice, [5.0], kills=False)
    assert any("an answer for" in fault for crowd in crowds for fault in crowd.faults)
