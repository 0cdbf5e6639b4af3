"""F106, F108: functions at intervals within one process."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

import fastq
from fastq.errors import InvalidOption


async def test_functions_are_called_at_their_intervals_and_a_slow_one_delays_no_other() -> None:
    """F106: `InMemoryScheduler(tick_interval=60.0)`, `add_task(name, interval_seconds, func)`, `await run()` blocks."""
    scheduler = fastq.InMemoryScheduler(tick_interval=60.0)
    calls: dict[str, list[float]] = {"quick": [], "plain": [], "slow": []}
    threads: list[str] = []
    beside = 0

    async def quick() -> None:
        calls["quick"].append(time.monotonic())
        if len(calls["quick"]) == 2:
            raise ValueError("the second call fails, the third is made")
        if len(calls["quick"]) == 20:
            scheduler.stop()

    def plain() -> None:
        threads.append(threading.current_thread().name)

    async def slow() -> None:
        nonlocal beside
        beside += 1
        assert beside == 1, "a task never runs beside itself"
        calls["slow"].append(time.monotonic())
        await asyncio.sleep(0.1)
        beside -= 1

    scheduler.add_task("quick", 0.02, quick)
    scheduler.add_task("plain", 0.05, plain)
    scheduler.add_task("slow", 0.03, slow)
    started = time.monotonic()
    await asyncio.wait_for(scheduler.run(), 30)
    assert time.monotonic() - started >= 0.39, "twenty intervals of 20 ms"
    assert len(calls["quick"]) == 20
    assert 1 <= len(calls["slow"]) < len(calls["quick"])
    assert threads
    assert all("MainThread" not in name for name in threads)


async def test_tasks_come_and_go_while_it_runs() -> None:
    scheduler = fastq.InMemoryScheduler()
    came, again = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(scheduler.run())
    await asyncio.sleep(0)

    async def first() -> None:
        came.set()

    async def second() -> None:
        again.set()

    scheduler.add_task("it", 0.01, first)
    await asyncio.wait_for(came.wait(), 10)
    assert scheduler.remove_task("it")
    assert not scheduler.remove_task("it")
    scheduler.add_task("it", 0.01, second)
    came.clear()
    await asyncio.wait_for(again.wait(), 10)
    assert not came.is_set()
    scheduler.stop()
    await asyncio.wait_for(running, 10)


def test_what_cannot_be_called_is_told() -> None:
    scheduler = fastq.InMemoryScheduler()
    scheduler.add_task("it", 300, print)
    for name, interval, func in (("it", 300, print), ("other", 0, print), ("other", 300, "print")):
        with pytest.raises(InvalidOption):
            scheduler.add_task(name, interval, func)  # type: ignore[arg-type]
    with pytest.raises(InvalidOption):
        fastq.InMemoryScheduler(tick_interval=0)
