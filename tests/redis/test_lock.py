"""app.lock: one block of code at a time, in any process. What it stands on is tested in test_leader.py."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

import fastq
from fastq import FastQ, JobAlreadyRunning
from fastq.errors import ConfigError, LeaseLost
from tests.conftest import eventually_async
from tests.redis.workshop import working


@pytest.fixture
def app(redis_url: str) -> FastQ:
    return FastQ(redis_url, concurrency=10)


async def test_one_holds_it_and_the_others_are_told(app: FastQ, redis_url: str) -> None:
    """F307, F308."""
    other = FastQ(redis_url)
    async with app.lock("sync:42", timeout=600) as held:
        assert held.token > 0
        with pytest.raises(JobAlreadyRunning, match="'sync:42' is held by somebody else") as caught:
            async with other.lock("sync:42"):
                pass
        assert caught.value.name == "sync:42"
        async with other.lock("sync:43"):
            pass
    async with other.lock("sync:42") as next_one:
        assert next_one.token > held.token, "a fencing number"
    await other.aclose()
    await app.aclose()


async def test_a_job_that_finds_it_held_is_skipped(app: FastQ) -> None:
    """F308, as reference 004 writes it."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    @app.task
    async def sync_user(user: int) -> dict[str, str]:
        try:
            async with app.lock(f"sync:{user}", timeout=600):
                begun.set()
                await go_on.wait()
        except fastq.JobAlreadyRunning:
            return {"status": "skipped", "reason": "already_running"}
        return {"status": "done"}

    async with working(app) as shop:
        first = await sync_user.enqueue(1)
        await begun.wait()
        assert (await shop.ended(await sync_user.enqueue(1))).result == {
            "status": "skipped",
            "reason": "already_running",
        }
        go_on.set()
        assert (await shop.ended(first)).result == {"status": "done"}


async def test_whoever_waits_gets_it_when_it_is_given_up(app: FastQ) -> None:
    order: list[str] = []

    async def hold(name: str, wait: float) -> None:
        async with app.lock("x", wait=wait):
            order.append(name)
            await asyncio.sleep(0.05)

    await asyncio.gather(hold("a", 0), hold("b", 10))
    assert order == ["a", "b"]
    async with app.lock("x"):
        with pytest.raises(JobAlreadyRunning, match=r"still after 0\.1 s"):
            async with app.lock("x", wait=0.1):
                pass
    await app.aclose()


def test_blocking_code(app: FastQ) -> None:
    counter, most = [0], [0]

    def work() -> None:
        with app.lock("x", wait=30) as held:
            counter[0] += 1
            most[0] = max(most[0], counter[0])
            held.check()
            counter[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    with app.lock("x"), pytest.raises(JobAlreadyRunning), app.lock("x"):
        pass
    app.close()


async def test_a_block_that_has_lost_it_is_cancelled(app: FastQ, raw: Any) -> None:
    """The key is gone (an operator, a failover): the holder may not go on."""
    lock = app.lock("x", timeout=1)
    with pytest.raises(LeaseLost):
        async with lock as held:
            raw.delete("fastq:{lease/lock/x}:lease")
            await asyncio.sleep(30)
    assert held.lost
    assert await eventually_async(lambda: not lock._async)
    await app.aclose()


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": "long"}, {"wait": -1}, {"wait": True}])
def test_times_that_make_no_sense(app: FastQ, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        app.lock("x", **options)
