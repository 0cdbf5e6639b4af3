"""What every service keeps: a stress test of start and stop, and a clock that tests move.

async def test_it_keeps_the_contract():
    await stress_start_stop(lambda: MyService(...))
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from fastq.service import Service


class Controlled(Protocol):
    """What can be stressed: a :class:`fastq.service.Service`, or what behaves like one."""

    @property
    def running(self) -> bool: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


async def stress_start_stop(
    make: Callable[[], Controlled], *, rounds: int = 60, seed: int = 1, limit: float = 60
) -> None:
    """Start, stop, wake and cancel in random order and at the same time; after each round the last call has won,
    and in the end nothing is left. A deadlock fails after ``limit`` seconds.
    """
    before = asyncio.all_tasks()
    rng = random.Random(seed)
    async with asyncio.timeout(limit):
        service = make()
        await service.stop()  # before any start
        assert not is_running(service)
        for _ in range(rounds):
            await _one_round(service, rng)
        await service.stop()
        await service.stop()
        assert not is_running(service)
        await service.start()
        await service.start()
        assert is_running(service)
        await asyncio.gather(service.stop(), service.stop(), service.stop())
        assert not is_running(service)
    assert asyncio.all_tasks() - before == set()


def is_running(service: Controlled) -> bool:
    """As a call, because a type checker takes an attribute for unchanged over an ``await``."""
    return service.running


async def _one_round(service: Controlled, rng: random.Random) -> None:
    calls = [asyncio.create_task(_call(service, rng)) for _ in range(rng.randint(1, 6))]
    for call in calls:
        for _ in range(rng.choice([0, 0, 1, 4])):
            await asyncio.sleep(0)
        if rng.random() < 0.3:
            call.cancel()
    await asyncio.sleep(0)  # every call has begun, or never will
    last = rng.choice([service.start, service.stop])
    await last()
    assert is_running(service) == (last == service.start)
    for result in await asyncio.gather(*calls, return_exceptions=True):
        assert result is None or isinstance(result, asyncio.CancelledError), result
    assert is_running(service) == (last == service.start), "a call that came earlier took effect later"


def _call(service: Controlled, rng: random.Random) -> Coroutine[Any, Any, None]:
    wake = getattr(service, "wake", None)
    if wake is not None and rng.random() < 0.2:
        return _later(wake)
    return rng.choice([service.start, service.stop])()


async def _later(wake: Callable[[], None]) -> None:
    wake()


class _Timer:
    def __init__(self, due: float, callback: Callable[[], object]) -> None:
        self.due = due
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """A :class:`fastq.service.Clock` that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._timers: list[tuple[float, int, _Timer]] = []

    def call_later(self, delay: float, callback: Callable[[], object], /) -> _Timer:
        timer = _Timer(self.now + delay, callback)
        heapq.heappush(self._timers, (timer.due, next(self._order), timer))
        return timer

    @property
    def pending(self) -> list[float]:
        """In how many seconds each timer is due."""
        return [due - self.now for due, _, timer in sorted(self._timers, key=lambda entry: entry[:2]) if timer.callback]

    async def advance(self, seconds: float, *services: Service) -> None:
        """Move on, timer by timer, and let the services settle after each."""
        end = self.now + seconds
        for service in services:
            await service.settled()
        while self._timers and self._timers[0][0] <= end:
            due, _, timer = heapq.heappop(self._timers)
            if timer.callback is None:
                continue
            self.now = max(self.now, due)
            timer.callback()
            for service in services:
                await service.settled()
        self.now = end
