"""app.consume: a loop of one's own, with the leases and the fence of every worker (F033, F220, F224)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import fastq
from fastq.broker.commands import recover, reserve
from fastq.testing import drain
from tests.conftest import MakeServer, eventually_async


def make_app(url: str, **settings: Any) -> fastq.FastQ:
    app = fastq.FastQ(url, **settings)

    @app.task(retry=60.0, max_attempts=2)
    async def send(to: str, subject: str = "hi") -> str:
        return f"{subject} {to}"

    return app


async def state(job: fastq.JobHandle[Any]) -> str:
    status = await job.status()
    assert status is not None
    return status.state


async def test_messages_come_in_order_and_results_reach_those_who_wait(redis_url: str):
    """F033: `async for message in queue.consume(...)`, `ack`."""
    app = make_app(redis_url)
    jobs = [await app.enqueue("send", name, subject="x") for name in "abc"]
    seen = []
    async with app.consume() as messages:
        async for message in messages:
            seen.append((message.name, message.payload, message.attempt, message.queue))
            await message.ack(message.payload["to"].upper())
            if len(seen) == 3:
                break
    assert seen == [("send", {"to": name, "subject": "x"}, 1, "default") for name in "abc"]
    assert [await job.result() for job in jobs] == ["A", "B", "C"]
    await app.aclose()


async def test_an_idle_consumer_is_woken_by_the_next_job(redis_url: str):
    app = make_app(redis_url)
    async with app.consume() as messages:
        waiting = asyncio.create_task(anext(aiter(messages)))
        await eventually_async(lambda: messages.worker_id)
        await app.enqueue("send", "late")
        message = await asyncio.wait_for(waiting, 5)
        await message.ack()
    await app.aclose()


async def test_handed_back_now_later_or_refused(redis_url: str):
    """F033: `nack(requeue=True, delay=30)`, `nack()`; no attempt is charged."""
    app = make_app(redis_url)
    async with app.consume() as messages:
        job = await app.enqueue("send", "a")
        first = await messages.reserve_next()
        assert first is not None
        await messages.nack(first, requeue=True)
        again = await messages.reserve_next()
        assert again is not None
        assert (again.id, again.attempt) == (job.id, 1)
        await again.nack(requeue=True, delay=30)
        status = await job.status()
        assert status is not None
        assert status.state == "scheduled"
        assert status.due_at is not None
        assert 28 < status.due_at - again.enqueued_at < 32
        other = await app.enqueue("send", "b")
        message = await messages.reserve_next()
        assert message is not None
        await message.nack(error="spam")
        assert await state(other) == "failed"
        status = await other.status()
        assert status is not None
        assert (status.error_type, status.error_message) == ("Nack", "spam")
    await app.aclose()


async def test_a_failed_run_is_retried_by_the_policy_and_then_dead(redis_url: str, raw: Any):
    """F224: `queue.reserve_next()`, `queue.ack(id)`, `queue.fail(id, error=)`."""
    app = make_app(redis_url)
    job = await app.enqueue("send", "a")
    async with app.consume() as messages:
        for left in ("scheduled", "failed"):
            message = await messages.reserve_next()
            assert message is not None
            await message.fail(ConnectionError("no route"))
            assert await state(job) == left
            for job_id, _ in raw.zscan_iter("fastq:{default}:due"):
                raw.zadd("fastq:{default}:due", {job_id: 1})  # it is due
            await drain_due(app)
        assert await messages.reserve_next() is None
    status = await job.status()
    assert status is not None
    assert (status.attempts, status.error_type, status.error_message) == (2, "ConnectionError", "no route")
    await app.aclose()


async def drain_due(app: fastq.FastQ) -> None:
    from fastq.broker.commands import promote

    await app.call(promote(app.keys("default")))


async def test_one_job_with_a_function(redis_url: str):
    """F220: `await process_one(queue, handler)` tells whether there was one."""
    app = make_app(redis_url)

    async def handler(message: fastq.Message) -> str:
        return message.payload["to"] * 2

    assert not await app.process_one(handler)
    job = await app.enqueue("send", to="x")
    assert await app.process_one(handler)
    assert await job.result() == "xx"
    await app.aclose()


async def test_no_more_than_prefetch_are_held_and_all_go_back_at_the_end(redis_url: str, raw: Any):
    app = make_app(redis_url)
    await app.tasks["send"].enqueue_many([(str(n),) for n in range(5)])
    async with app.consume(prefetch=2) as messages:
        held = [await messages.reserve_next() for _ in range(3)]
        assert [message is not None for message in held] == [True, True, False]
        assert raw.llen("fastq:{default}:ready:5") == 3
    assert raw.llen("fastq:{default}:ready:5") == 5
    assert raw.zcard("fastq:{default}:workers") == 0
    assert (await drain(app)).success == 5
    await app.aclose()


async def test_who_has_lost_the_lease_cannot_settle(redis_url: str):
    """The fence of every worker: another one has the job."""
    app = make_app(redis_url)
    job = await app.enqueue("send", "a")
    async with app.consume() as slow, app.consume() as other:
        mine = await slow.reserve_next()
        assert mine is not None
        lost = recover(app.keys("default"), slow.worker_id, expired=False, charge="none", max_deliveries=3, dead_max=10)
        assert (await app.call(lost)).ready == 1
        theirs = await other.reserve_next()
        assert theirs is not None
        assert theirs.id == mine.id == job.id
        with pytest.raises(fastq.LeaseLost, match="another worker has it"):
            await mine.ack("mine")
        await theirs.ack("theirs")
        assert await job.result() == "theirs"
        assert await slow.reserve_next() is None  # a new incarnation has begun
        await app.enqueue("send", "b")
        message = await slow.reserve_next()
        assert message is not None
        await message.ack()
        with pytest.raises(fastq.LeaseLost, match="not held"):
            await message.ack()
    await app.aclose()


async def test_the_lease_is_renewed_while_the_loop_runs(redis_url: str, raw: Any):
    app = make_app(redis_url, lease="1s")
    async with app.consume() as messages:
        await messages.reserve_next()
        first = raw.zscore("fastq:{default}:workers", messages.worker_id)
        await eventually_async(lambda: raw.zscore("fastq:{default}:workers", messages.worker_id) > first)
    await app.aclose()


async def test_a_reply_that_was_lost_is_made_good(redis_url: str, make_server: MakeServer):
    """The jobs of a reserve whose reply nobody has seen are delivered once the connection is back."""
    app = make_app(redis_url)
    job = await app.enqueue("send", "a")
    async with app.consume() as messages:
        assert await messages.reserve_next() is not None  # registered
        other = await app.enqueue("send", "b")
        messages._held.clear()
        await app.call(reserve(app.keys("default"), messages.worker_id, 1))  # as if its reply were lost
        messages._connection.drop("for the test")
        found = {(await messages.reserve_next(timeout=5)).id for _ in range(1)}
        messages._prefetch = 2
        found |= {message.id for message in messages._ready}
        assert found == {job.id, other.id}
    await app.aclose()


async def test_what_cannot_be_read_is_a_dead_letter_and_the_rest_goes_on(redis_url: str, raw: Any):
    app = make_app(redis_url)
    bad = await app.enqueue("send", "a")
    raw.hset("fastq:{default}:jobs", bad.id, b"\x05rubbish")
    good = await app.enqueue("send", "b")
    async with app.consume() as messages:
        message = await messages.reserve_next(timeout=5)
        assert message is not None
        assert message.id == good.id
        await message.ack()
    assert await state(bad) == "failed"
    await app.aclose()


async def test_drain_of_an_application(redis_url: str):
    """F384: `await app.drain()`."""
    app = make_app(redis_url)
    await app.enqueue("send", "a")
    assert (await app.drain()).success == 1
    await app.aclose()


def test_what_cannot_be_consumed_is_told_at_once(redis_url: str):
    app = make_app(redis_url)
    for wrong in (0, 2_001, "many"):
        with pytest.raises(fastq.InvalidOption, match="prefetch"):
            app.consume(prefetch=wrong)  # type: ignore[arg-type]
    with pytest.raises(fastq.InvalidQueueName):
        app.consume("a b")
