"""Units that are too old by the time at which whoever waited for them runs: the event loop was blocked, a thread had no turn."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import fastq
from fastq import FastQ
from fastq.limiter.api import Limiter
from fastq.limiter.gate import Gate
from fastq.limiter.stores import this_process
from fastq.limiter.waiter import Waiter
from fastq.limits import Acquired


class Blocked:
    """Blocks the event loop after a waiter was told that it has its units, before it runs: ``times`` times."""

    def __init__(self) -> None:
        self.times = 0
        self.granted: list[Waiter] = []
        self.until: list[float] = []

    def after(self, grant: Callable[..., None]) -> Callable[..., None]:
        def granted(gate: Gate, waiter: Waiter, at: int) -> None:
            grant(gate, waiter, at)
            self.granted.append(waiter)
            self.until.append(waiter.until)
            if self.times:
                self.times -= 1
                time.sleep(
                    max(0.0, waiter.until - time.monotonic()) + 0.001
                )  # what is tested: a loop that stands still

        return granted


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Blocked:
    made = Blocked()
    monkeypatch.setattr(Gate, "_grant", made.after(Gate._grant))
    return made


async def test_a_loop_that_is_blocked_uses_nothing_too_late(redis_url: str, blocked: Blocked) -> None:
    """To be used within 10 ms: the unit goes back, and another one is used in time."""
    app = FastQ(redis_url)
    limiter = app.limiter("blocked", rate="1/s")
    blocked.times = 1
    await limiter.acquire(5)
    assert time.monotonic() <= blocked.until[-1]
    assert len(blocked.granted) == 2
    assert limiter.counts.late >= 1  # a busy machine may be late by itself
    assert limiter.counts.units == 1
    await app.aclose()


async def test_those_that_ran_too_late_are_served_first_and_in_their_order(redis_url: str, blocked: Blocked) -> None:
    app = FastQ(redis_url)
    limiter = app.limiter("order", rate="20/s burst 3")
    served: list[int] = []

    async def use(n: int) -> None:
        await limiter.acquire()
        served.append(n)

    blocked.times = 1  # three are told at once; the first one's block makes all of them late
    await asyncio.gather(*(use(n) for n in range(6)))
    assert served == [0, 1, 2, 3, 4, 5]
    assert limiter.counts.late >= 1
    assert limiter.counts.units == 6
    await app.aclose()


async def test_a_loop_that_is_always_too_busy_passes_late_and_says_so(
    redis_url: str, blocked: Blocked, caplog: pytest.LogCaptureFixture
) -> None:
    app = FastQ(redis_url)
    limiter = app.limiter("busy", rate="100/s")
    blocked.times = 100
    for _ in range(2):
        await limiter.acquire(10)
    assert limiter.counts.late == 8  # three each, and the one that it passed with
    assert "limiter's store answers too late: raise use_within" in caplog.text
    await app.aclose()


KINDS: dict[str, dict[str, Any]] = {
    "bucket": {"rate": "1/s"},
    "slots": {"rate": "1/s", "max_concurrent": 1},
    "window": {"algorithm": "sliding_window", "limit": 1, "window_seconds": 60},
    "guard": {"algorithm": "sliding_window", "limit": 1, "window_seconds": 60, "max_concurrent": 1},
}


@pytest.mark.parametrize("kind", KINDS)
async def test_who_asks_once_and_runs_too_late_asks_again(redis_url: str, blocked: Blocked, kind: str) -> None:
    """A no would be nobody's yes: the others were told that the unit is gone."""
    app = FastQ(redis_url)
    limiter = app.limiter("once", **KINDS[kind])
    blocked.times = 1
    assert await limiter.try_acquire()
    assert time.monotonic() <= blocked.until[-1]
    assert not await limiter.try_acquire()
    assert limiter.counts.late >= 1  # a busy machine may be late by itself
    assert limiter.counts.units == 1
    await limiter.release()
    await app.aclose()


def slowly(limiter: Limiter, monkeypatch: pytest.MonkeyPatch, times: int) -> list[float]:
    """The first answers to this limiter's requests for units come later than these may be used."""
    asked: list[float] = []
    ask = limiter._store.ask

    async def late(command: Any) -> Any:
        sent, reply = await ask(command)
        if isinstance(reply, Acquired):
            asked.append(sent)
            if len(asked) <= times:
                time.sleep(limiter.plan.rule.terms(0).use_within + 0.001)  # what is tested: a loop that stands still
        return sent, reply

    monkeypatch.setattr(limiter._store, "ask", late)
    return asked


@pytest.mark.parametrize(("late", "units"), [(1, 1), (100, 0)])
@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_that_comes_too_late_is_asked_for_again_a_few_times(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, kind: str, late: int, units: int
) -> None:
    """Where all four are too late it is no."""
    app = FastQ(redis_url)
    limiter = app.limiter("answer", **KINDS[kind])
    asked = slowly(limiter, monkeypatch, late)
    async with asyncio.timeout(20):
        assert await limiter.try_acquire() is bool(units)
    assert (len(asked), limiter.counts.late, limiter.counts.units) == ((2, 1, 1) if units else (4, 4, 0))
    await limiter.release()
    await app.aclose()


async def test_a_slot_with_units_that_are_too_old_is_free_again(redis_url: str, blocked: Blocked) -> None:
    app = FastQ(redis_url)
    limiter = app.limiter("slots", rate="10/s", max_concurrent=1)
    blocked.times = 1
    async with limiter.acquire_context(5):
        assert time.monotonic() <= blocked.until[-1]
        assert (await limiter.state()).holders == 1
    assert (await limiter.state()).holders == 0
    assert limiter.counts.late == 1
    await app.aclose()


async def test_the_last_of_several_that_makes_the_first_one_late(redis_url: str, blocked: Blocked) -> None:
    """acquire_all: while the second one was asked, the first one's units became too old."""
    app = FastQ(redis_url)
    first, second = app.limiter("first", rate="10/s"), app.limiter("second", rate="10/s")
    ask, slow = second._store.ask, [True]

    async def asked(command: Any) -> Any:
        if slow and b"second" in command.keys[0]:
            slow.clear()
            time.sleep(0.06)  # blocked on purpose: the first one's units live for 50 ms
        return await ask(command)

    second._store.ask = asked  # type: ignore[method-assign]
    await fastq.acquire_all([first, second], 5)
    assert time.monotonic() <= min(blocked.until[-2:])
    assert len(blocked.granted) == 4
    assert (first.counts.units, second.counts.units) == (1, 1)
    await app.aclose()


def test_a_thread_that_gets_its_turn_too_late(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the event loop that waits and the thread that goes on, a second passes: it waits again."""
    app = FastQ(redis_url)
    limiter = app.limiter("thread", rate="1/s")
    run, waiters = this_process().run, []

    def late(work: Any, *undo: Any) -> Any:
        got = run(work, *undo)
        if isinstance(got, tuple):
            waiters.append(got[1])
            threading.Event().wait(max(0.0, got[1].until - time.monotonic()) + 0.001)
        return got

    monkeypatch.setattr(this_process(), "run", late)
    limiter.sync.acquire(5)
    assert time.monotonic() <= waiters[0].until
    assert waiters[0].missed == 1
    assert limiter.sync.try_acquire(3)
    assert [waiter.missed for waiter in waiters] == [1, 1]
    assert limiter.counts.units == 2
    app.close()
