"""Concurrent callers: a full call leaves while others are under way, and nothing is lost or doubled for it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from fastq.broker.calls import Target
from fastq.broker.cluster import AsyncCluster
from fastq.broker.commands import BATCH, NewJob
from fastq.broker.connection import AsyncConnection
from fastq.broker.embedded import EmbeddedServer
from fastq.broker.enqueuer import MOST_ALOFT, PART, AsyncEnqueuer
from fastq.broker.keys import QueueKeys
from fastq.broker.url import parse_url
from tests.chaos.proxy import CUT, HOLD, PASS, FaultProxy
from tests.redis.lab import envelope

E = envelope()
QUEUE = QueueKeys("fastq", "default")
TARGET = Target(QUEUE, 5)
JOBS = 4_000


@pytest.fixture
def proxy(redis_server: EmbeddedServer) -> Iterator[FaultProxy]:
    with FaultProxy(redis_server.url) as proxy:
        yield proxy


@contextlib.asynccontextmanager
async def sending_over(url: str) -> AsyncIterator[AsyncEnqueuer]:
    connection = AsyncConnection.to(parse_url(url))
    await connection.connect()
    enqueuer = AsyncEnqueuer(connection, timeout=30.0)
    await enqueuer.submit(TARGET, [NewJob("first", E)])  # the script is known from here on
    yield enqueuer
    await enqueuer.close()


async def send(enqueuer: AsyncEnqueuer, name: str, jobs: int = JOBS, spread: float = 0.0) -> None:
    async def one(n: int) -> None:
        await asyncio.sleep(spread * (n // 200) * 200 / jobs)  # waves: the pace of the load, nothing is waited for
        await enqueuer.submit(TARGET, [NewJob(f"{name}{n}", E)])

    await asyncio.gather(*(one(n) for n in range(jobs)))


async def most_aloft(enqueuer: AsyncEnqueuer, sending: Any) -> int:
    most, task = 0, asyncio.ensure_future(sending)
    while not task.done():
        most = max(most, enqueuer._aloft)
        await asyncio.sleep(0)
    await task
    return most


async def test_a_full_call_does_not_wait_for_the_one_before_it(proxy: FaultProxy, raw: Any) -> None:
    """And their number is bounded: what comes on top waits for the next flight."""
    async with sending_over(proxy.url) as enqueuer:
        proxy.delay = 0.02
        most = await most_aloft(enqueuer, send(enqueuer, "a"))
    assert 2 <= most <= MOST_ALOFT + JOBS // BATCH  # the calls of one take-off go together, however many there are
    assert raw.hlen(QUEUE.jobs) == raw.llen(QUEUE.ready[5]) == JOBS + 1


async def test_one_caller_after_another_makes_a_call_each(redis_url: str, raw: Any) -> None:
    async with sending_over(redis_url) as enqueuer:
        for n in range(20):
            await enqueuer.submit(TARGET, [NewJob(str(n), E)])
        assert enqueuer.round_trips == 21
    assert [each.decode() for each in raw.lrange(QUEUE.ready[5], 1, -1)] == [str(n) for n in range(20)]


async def lose_replies(proxy: FaultProxy, seed: int) -> None:
    rng = random.Random(seed)
    async with sending_over(proxy.url) as enqueuer:
        proxy.rule = lambda names: "drop" if "enqueue" in names and rng.random() < 0.35 else "pass"
        await send(enqueuer, "x", spread=0.2)
        proxy.rule = lambda names: "pass"


@pytest.mark.parametrize("seed", range(5))
async def test_lost_replies_among_calls_under_way(proxy: FaultProxy, raw: Any, seed: int) -> None:
    """F-33: the newest call ran, or did not; an older one is only repeated before any newer one is sent."""
    await lose_replies(proxy, seed)
    assert proxy.dropped["enqueue"] > 0, f"nothing was lost with seed {seed}"
    assert raw.hlen(QUEUE.jobs) == JOBS + 1
    assert raw.llen(QUEUE.ready[5]) == len(set(raw.lrange(QUEUE.ready[5], 0, -1))) == JOBS + 1


async def repeat_while_others_come(proxy: FaultProxy) -> None:
    """Calls that Redis never saw are repeated one by one; the first reply waits until a newer call's worth of jobs is there."""
    async with sending_over(proxy.url) as enqueuer:
        fates = iter([CUT, HOLD])
        proxy.rule = lambda names: next(fates, PASS) if "enqueue" in names else PASS
        older = asyncio.ensure_future(send(enqueuer, "older", 2 * BATCH))
        while not proxy.held:
            await asyncio.sleep(0)
        newer = [enqueuer.submit(TARGET, [NewJob(f"newer{n}", E)]) for n in range(PART)]
        proxy.release()
        await asyncio.gather(older, *newer)


async def test_no_call_overtakes_one_that_is_repeated(proxy: FaultProxy, raw: Any) -> None:
    await repeat_while_others_come(proxy)
    assert raw.hlen(QUEUE.jobs) == raw.llen(QUEUE.ready[5]) == 2 * BATCH + PART + 1


async def test_that_would_find_calls_that_overtake(
    proxy: FaultProxy, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: calls follow while older ones are being repeated."""

    def plant(name: str, value: Any) -> None:
        monkeypatch.setattr(AsyncEnqueuer, name, property(value, lambda self, value: None), raising=False)

    plant("_sound", lambda self: True)
    plant("_epoch", lambda self: self._connection.connects)
    await repeat_while_others_come(proxy)
    assert raw.hlen(QUEUE.jobs) < 2 * BATCH + PART + 1


async def test_connections_lost_among_calls_under_way(redis_url: str, raw: Any) -> None:
    """Redis ends the connection 20 times; calls on their way then may have run or not."""
    async with sending_over(redis_url) as enqueuer:
        connection = enqueuer._connection
        sending, cuts = [], 0
        while cuts < 20:
            sending.append(asyncio.ensure_future(send(enqueuer, f"{cuts}-", 1_000, 0.05)))
            while not enqueuer._aloft or not connection.connected:
                await asyncio.sleep(0)
            raw.client_kill_filter(_type="normal", skipme=True)
            cuts += 1
        await asyncio.gather(*sending)
        assert connection.connects > 1
    assert raw.hlen(QUEUE.jobs) == raw.llen(QUEUE.ready[5]) == 20 * 1_000 + 1


async def test_nothing_follows_in_a_cluster(redis_url: str, raw: Any) -> None:
    """There a slot may have moved between two calls, and the newer one arrive first."""
    assert AsyncConnection.in_order
    assert not AsyncCluster.in_order
    async with sending_over(redis_url) as enqueuer:
        enqueuer._connection.in_order = False  # type: ignore[misc]
        assert await most_aloft(enqueuer, send(enqueuer, "z", 2 * BATCH)) <= 2
    assert raw.hlen(QUEUE.jobs) == 2 * BATCH + 1
