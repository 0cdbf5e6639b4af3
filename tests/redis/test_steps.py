"""JobContext.once: a step's result is remembered across the runs of a job."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import fastq
from fastq import FastQ, JobContext
from tests.redis.workshop import working


@pytest.fixture
def app(redis_url: str) -> FastQ:
    return FastQ(redis_url, concurrency=10)


async def test_a_step_is_called_once_whatever_happens_after_it(app: FastQ) -> None:
    """F312: retry, snooze and replay go on behind it."""
    calls: list[str] = []
    results: list[Any] = []

    async def charge(order: str, *, amount: float) -> dict[str, Any]:
        calls.append(order)
        return {"receipt": (1, amount)}

    @app.task(max_attempts=2, retry=0)
    async def pay(job: JobContext, order: str) -> None:
        results.append(await job.once("charge", charge, order, amount=9.5))
        calls.append(await job.once("mail", lambda: "mail"))
        if len(results) == 1:
            job.snooze(0)
        if len(results) < 4:
            raise RuntimeError("after the step")

    async with working(app) as shop:
        job = await pay.enqueue("o")
        assert (await shop.ended(job)).state == "failed"
        assert len(results) == 3
        assert await app.dead.replay() == 1
        assert (await shop.ended(job)).state == "success"
        another = await pay.enqueue("p")
        await shop.ended(another)
    assert calls == ["o", "mail", "mail", "mail", "mail", "p", "mail"]
    assert results == [{"receipt": [1, 9.5]}] * 5, "the first run gets what the others get"


async def test_a_step_that_raises_is_called_again(app: FastQ) -> None:
    calls: list[int] = []

    def charge() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("no answer")
        return 7

    @app.task(retry=0)
    def pay(job: JobContext) -> int:
        return int(job.once_sync("charge", charge)) + int(job.once_sync("charge", charge))

    async with working(app) as shop:
        assert (await shop.ended(await pay.enqueue())).result == 14
    assert len(calls) == 2


async def test_two_workers_with_one_job_agree_on_the_first_result(app: FastQ) -> None:
    """After a lost lease two of them are at it."""
    gate = asyncio.Event()
    results: list[Any] = []

    async def slow(value: str) -> str:
        await gate.wait()
        return value

    @app.task
    async def pay(job: JobContext) -> None:
        twin = asyncio.create_task(job.once("charge", slow, "twin"))
        await asyncio.sleep(0)
        gate.set()
        results.extend((await job.once("charge", slow, "original"), await twin))

    async with working(app) as shop:
        await shop.ended(await pay.enqueue())
    assert results in (["twin"] * 2, ["original"] * 2)


async def test_a_result_that_cannot_be_remembered_ends_the_job_for_good(app: FastQ) -> None:
    """Another run would call the step a second time."""
    calls: list[int] = []

    @app.task(retry=0)
    async def pay(job: JobContext) -> None:
        await job.once("charge", lambda: calls.append(1) or object())

    @app.task
    async def wrong(job: JobContext) -> None:
        await job.once("", print)

    async with working(app) as shop:
        assert (await shop.ended(await pay.enqueue())).state == "failed"
        (letter,) = await app.dead.list()
        assert (letter.error_type, calls) == ("Fail", [1])
        assert "the result of step 'charge' cannot be encoded" in letter.error_message
        with pytest.raises(fastq.InvalidOption, match="step=''"):
            JobContext.once_sync(JobContext("a", "q", None), "", print)  # type: ignore[arg-type]  # not looked at
