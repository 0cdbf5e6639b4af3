"""Limiters whose Redis cannot be asked: it refuses, or it is there and says nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import pytest
import uvloop

import fastq
from fastq import FastQ
from fastq.limiter.api import Limiter
from fastq.limiter.outage import SILENT
from fastq.limiter.stores import RedisStore
from tests.conftest import eventually_async
from tests.redis.limit_lab import application

SOON = 5.0
"""Seconds that are more than SILENT and less than it takes until a connection is given up."""


# -- it refuses -------------------------------------------------------------------------------------------


async def test_closed_nobody_passes_while_redis_is_away(make_server: Any, caplog: Any) -> None:
    server = make_server()
    async with application(server.url) as app:
        limiter = app.limiter("closed", rate="100/s")
        await limiter.acquire()
        await asyncio.sleep(0.05)  # what it holds may be used for 20 ms
        server.kill()
        with caplog.at_level(logging.WARNING, "fastq.limits"):
            assert await _fails(limiter.try_acquire())
            with pytest.raises(fastq.BrokerUnavailable):
                await limiter.acquire(timeout=0.3)
        assert [r.message for r in caplog.records if "cannot ask" in r.message] == ["limiter cannot ask its store"]
        waiting = asyncio.create_task(limiter.acquire(timeout=20))
        await eventually_async(lambda: limiter.counts.errors >= 3)
        server.start()
        await waiting


async def _fails(work: Any) -> bool:
    try:
        await work
    except fastq.BrokerUnavailable:
        return True
    return False


async def test_open_everybody_passes_while_redis_is_away(make_server: Any, caplog: Any) -> None:
    """rate-sync's sliding window raises although configured to fail open."""
    server = make_server()
    async with application(server.url) as app:
        limiter = app.limiter("open", algorithm="sliding_window", limit=2, window_seconds=60, on_error="open")
        await limiter.acquire()
        server.stop()
        with caplog.at_level(logging.WARNING, "fastq.limits"):
            for _ in range(10):
                await limiter.acquire(timeout=1)
        assert limiter.counts.passed == 10
        assert len([r for r in caplog.records if "cannot ask" in r.message]) == 1


# -- it says nothing --------------------------------------------------------------------------------------


class Hung:
    """A server that is stopped (SIGSTOP) once a limiter knows it."""

    def __init__(self, server: Any, app: FastQ) -> None:
        self.server = server
        self.app = app

    async def limiter(self, **options: Any) -> Limiter:
        """One that holds no units any more, and whose server answers no more."""
        limiter = self.app.limiter("hung", **options)
        await limiter.acquire()
        if limiter.here.rule.max_concurrent is None:
            await eventually_async(lambda: not limiter.here.tokens.left(time.monotonic()))
        self.server.pause()
        return limiter


@contextlib.asynccontextmanager
async def silence(make_server: Any) -> AsyncIterator[Hung]:
    server = make_server()
    async with application(server.url) as app:
        yield Hung(server, app)
        server.resume()


async def _within(seconds: float, work: Awaitable[Any]) -> Any:
    start = time.monotonic()
    try:
        return await work
    finally:
        assert time.monotonic() - start < seconds


RATE: dict[str, Any] = {"rate": "100/s"}
SLOTS: dict[str, Any] = {"max_concurrent": 2}


@pytest.mark.parametrize("rule", [RATE, SLOTS], ids=["rate", "slots"])
async def test_open_everybody_passes_a_silent_redis(make_server: Any, rule: dict[str, Any], caplog: Any) -> None:
    async with silence(make_server) as hung:
        limiter = await hung.limiter(**rule, on_error="open")
        waits = [limiter.acquire(timeout=3), limiter.acquire(timeout=60), limiter.try_acquire(), limiter.acquire()]
        assert await _within(SOON, asyncio.gather(*waits)) == [None, None, True, None]
        for _ in range(50):
            await _within(0.5, limiter.acquire())  # at once: it is known now
        assert await _within(0.5, limiter.try_acquire())
        assert limiter.counts.passed == 55
        (told,) = [record.fields for record in caplog.records if "cannot ask" in record.message]
        assert hung.server.url in told["error"]
        assert "does not answer" in told["error"]


@pytest.mark.parametrize("rule", [RATE, SLOTS], ids=["rate", "slots"])
async def test_closed_those_who_wait_are_told_of_a_silent_redis(make_server: Any, rule: dict[str, Any]) -> None:
    async with silence(make_server) as hung:
        limiter = await hung.limiter(**rule)
        waits = [limiter.acquire(timeout=2), limiter.try_acquire(), limiter.try_acquire(timeout=2)]
        errors = await _within(SOON, asyncio.gather(*waits, return_exceptions=True))
        assert [type(error) for error in errors] == [fastq.BrokerUnavailable] * 3
        assert "does not answer" in str(errors[0])
        for short in (limiter.acquire(timeout=0.05), limiter.try_acquire()):
            with pytest.raises(fastq.BrokerUnavailable):
                await _within(0.5, short)
        waiting = asyncio.create_task(limiter.acquire(timeout=30))
        await eventually_async(lambda: limiter.here.waiters)
        hung.server.resume()
        await waiting
        if limiter.here.held:
            await limiter.release()
            await limiter.release()


async def test_the_limit_holds_again_after_the_silence(make_server: Any) -> None:
    """What passed meanwhile is not counted; the answer that came late is given back."""
    async with silence(make_server) as hung:
        limiter = await hung.limiter(algorithm="sliding_window", limit=3, window_seconds=60, on_error="open")
        for _ in range(20):
            await limiter.acquire()
        hung.server.resume()
        await eventually_async(lambda: limiter.here._outage.failure is None)
        passed = limiter.counts.passed
        assert [await limiter.try_acquire() for _ in range(3)] == [True, True, False]
        assert limiter.counts.passed == passed


async def test_an_outage_of_long_ago_is_not_told(make_server: Any) -> None:
    """The error of an outage that is over says nothing of the next one."""
    async with silence(make_server) as hung:
        limiter = await hung.limiter(**RATE)
        hung.server.resume()
        hung.server.kill()
        with pytest.raises(fastq.BrokerUnavailable, match="cannot reach"):
            await limiter.try_acquire()
        hung.server.start()
        hung.server.pause()
        with pytest.raises(fastq.BrokerUnavailable, match="does not answer"):
            await _within(SOON, limiter.acquire(timeout=2))


async def test_a_slot_is_given_back_to_a_silent_redis(make_server: Any) -> None:
    """Nobody waits for it; Redis learns of it when it answers again."""
    async with silence(make_server) as hung:
        limiter = await hung.limiter(max_concurrent=1, lease=60)
        await _within(SOON, limiter.release())
        hung.server.resume()
        await limiter.acquire(timeout=30)
        await limiter.release()


async def test_who_waits_for_a_slot_of_a_silent_redis_passes(make_server: Any) -> None:
    """The server stops while it holds the wait back."""
    async with silence(make_server) as hung:
        server, limiter = hung.server, hung.app.limiter("pool", max_concurrent=1, on_error="open")
        await limiter.acquire()
        waiting = asyncio.create_task(limiter.acquire())
        await eventually_async(lambda: limiter.short)
        server.pause()
        await _within(SOON, waiting)
        assert limiter.counts.passed == 1
        server.resume()
        await limiter.release()


# -- it is just slow --------------------------------------------------------------------------------------


class Slow(RedisStore):
    """Answers after 0.3 s."""

    async def ask(self, command: Any) -> Any:
        answer = await super().ask(command)
        await asyncio.sleep(0.3)
        return answer


async def test_who_has_no_time_for_a_slow_redis_does_not_pass(redis_url: str) -> None:
    """A limit that is open would not hold for short timeouts else."""
    async with application(redis_url) as app:
        limiter = app.limiter("slow", rate="100/s burst 102", use_within=1, on_error="open")
        limiter._store = Slow(app.endpoint)
        with pytest.raises(fastq.LimitTimeout):
            await limiter.acquire(timeout=0.05)
        assert await limiter.try_acquire()
        assert limiter.counts.passed == 0
        await limiter._store.aclose()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_loop_that_is_blocked_is_not_a_silent_redis(redis_url: str, times: int, loop: Any) -> None:
    """The answer is there: it has not been read yet."""

    async def main() -> None:
        async with application(redis_url) as app:
            limiter = app.limiter("blocked", rate="1/s", on_error="open")
            await limiter.state()
            asked = asyncio.create_task(limiter.try_acquire())
            while limiter.counts.requests < 2:
                await asyncio.sleep(0)
            for _ in range(times):
                time.sleep(SILENT * 1.1)  # what is tested: a loop that stands still
                await asyncio.sleep(0)
            await asked
            assert limiter.counts.passed == 0
            assert limiter.counts.late

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


# -- the process ends -------------------------------------------------------------------------------------

HOLDER = """
import sys
from fastq import FastQ
limiter = FastQ(sys.argv[1]).limiter("exit", max_concurrent=9, lease=60)
for _ in range(9):
    limiter.sync.acquire()
print("held", flush=True)
sys.stdin.readline()
"""


def test_a_process_with_slots_of_a_silent_redis_ends_soon(make_server: Any) -> None:
    """One try for all slots: their leases end by themselves."""
    server = make_server()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, server.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    server.pause()
    start = time.monotonic()
    process.communicate("\n", timeout=60)
    assert time.monotonic() - start < SOON + 2
    assert process.returncode == 0
    server.resume()


DROPPED = """
import asyncio, gc, sys
from fastq import FastQ
limiter = FastQ(sys.argv[1]).limiter("dropped", rate="5/s")
loop = asyncio.new_event_loop()
loop.run_until_complete(limiter.acquire())
loop.close()
del loop
asyncio.run(FastQ(sys.argv[1]).limiter("dropped", rate="5/s").acquire())
gc.collect()
"""


def test_a_loop_that_is_closed_with_connections_says_nothing(redis_url: str) -> None:
    """Neither a traceback of ours nor of asyncio's."""
    ended = subprocess.run(
        [sys.executable, "-c", DROPPED, redis_url], check=False, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
