"""JobRegistry and WorkerRunner: the shapes of the documents that users come from (F220, F221, F222)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import fastq
from tests.conftest import eventually_async


class Job:
    def __init__(self, name: str, **payload: Any) -> None:
        self.name = name
        self.payload = payload


def make_registry() -> fastq.JobRegistry:
    registry = fastq.JobRegistry()

    @registry.handler("send_email")
    async def send_email(job: Any) -> fastq.JobResult:
        to = job.payload["to"]
        return fastq.JobResult(success="@" in to, message=f"Email sent to {to}", details={"to": to})

    @registry.handler("slow")
    async def slow(job: Any) -> None:
        await asyncio.Event().wait()

    def report(job: Any) -> int:
        return len(job.payload)

    registry.register("generate_report", report)
    registry.register("generate_report", report)
    return registry


async def test_the_registry_of_the_documents():
    """register, @registry.handler, has_handler, get_handler, list_handlers, dispatch, JobResult."""
    registry = make_registry()
    assert registry.list_handlers() == ["generate_report", "send_email", "slow"]
    assert registry.has_handler("slow")
    assert not registry.has_handler("other")
    assert registry.get_handler("other") is None
    assert callable(registry.get_handler("slow"))
    result = await registry.dispatch(Job("send_email", to="a@b"), timeout=60.0)
    assert (result.success, result.message, result.details) == (True, "Email sent to a@b", {"to": "a@b"})
    counted = await registry.dispatch(Job("generate_report", a=1, b=2))  # a plain function, in a thread
    assert (counted.success, counted.details) == (True, {"result": 2})
    with pytest.raises(fastq.FastQError, match="Email sent to nobody"):
        await registry.run(Job("send_email", to="nobody"))


async def test_what_goes_wrong_in_a_dispatch():
    """UnknownJobError, JobTimeoutError; a handler's own TimeoutError stays its own."""
    registry = make_registry()
    with pytest.raises(fastq.UnknownJobError, match=r"'send_mail'.*send_email"):
        await registry.dispatch(Job("send_mail"))
    with pytest.raises(fastq.JobTimeoutError, match=r"'slow' ran longer than its timeout of 0.01 s") as told:
        await registry.dispatch(Job("slow"), timeout=0.01)
    assert isinstance(told.value, TimeoutError)

    @registry.handler("own")
    async def own(job: Any) -> None:
        raise TimeoutError("gateway")

    with pytest.raises(TimeoutError, match="gateway") as kept:
        await registry.dispatch(Job("own"), timeout=1)
    assert not isinstance(kept.value, fastq.JobTimeoutError)
    with pytest.raises(fastq.TaskDefinitionError, match="has a handler already"):
        registry.register("own", print)
    with pytest.raises(fastq.TaskDefinitionError, match="not a function"):
        registry.register("x", "y")  # type: ignore[arg-type]


async def test_a_runner_feeds_a_registry_until_it_is_stopped(redis_url: str):
    """F220, F221: WorkerRunner.start() returns an awaitable task, stop(grace_seconds=10); a failed result is a failed run."""
    app = fastq.FastQ(redis_url, default_max_attempts=1)
    runner = fastq.WorkerRunner(app, make_registry().run, concurrency=4)
    task = runner.start()
    assert runner.start() is task
    good = await app.enqueue("send_email", to="a@b")
    bad = await app.enqueue("send_email", to="nobody")
    assert await good.result(timeout=10) == {"success": True, "message": "Email sent to a@b", "details": {"to": "a@b"}}
    with pytest.raises(fastq.JobFailed, match="Email sent to nobody"):
        await bad.result(timeout=10)
    await runner.stop(grace_seconds=10)
    assert task.done()
    await app.aclose()


async def test_a_stop_interrupts_after_the_grace_and_hands_back(redis_url: str, raw: Any):
    app = fastq.FastQ(redis_url)
    begun = asyncio.Event()

    async def endless(message: fastq.Message) -> None:
        begun.set()
        await asyncio.Event().wait()

    runner = fastq.WorkerRunner(app, endless)
    runner.start()
    job = await app.enqueue("endless")
    await asyncio.wait_for(begun.wait(), 10)
    await runner.stop(grace_seconds=0.05)
    status = await job.status()
    assert status is not None
    assert (status.state, status.attempts) == ("pending", 0)
    assert raw.zcard("fastq:{default}:workers") == 0
    await app.aclose()


async def test_several_runners_in_one_process(redis_url: str):
    """F222: gathered; each job runs once."""
    app = fastq.FastQ(redis_url)
    ran: list[int] = []

    async def note(message: fastq.Message) -> None:
        ran.append(message.args[0])

    runners = [fastq.WorkerRunner(app, note, concurrency=3) for _ in range(4)]
    tasks = [runner.start() for runner in runners]
    for n in range(50):
        await app.enqueue("note", n)
    await eventually_async(lambda: len(ran) == 50)
    await asyncio.gather(*(runner.stop() for runner in runners))
    await asyncio.gather(*tasks)
    assert sorted(ran) == list(range(50))
    await app.aclose()
