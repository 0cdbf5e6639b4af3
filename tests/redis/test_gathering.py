"""Handlers that take many jobs at once, ``@app.task(batch=…)``: one call, an outcome for each (F131, F133)."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest

import fastq
from fastq import FastQ
from fastq.errors import InvalidArguments, TaskDefinitionError
from fastq.testing.eager import eagerly
from tests.conftest import eventually
from tests.redis.workshop import working

pytestmark = pytest.mark.versions  # eager tasks from 3.12


@dataclass
class Row:
    """More than one value goes as one item."""

    key: str
    amount: int = 0


class Mill:
    """An application whose handlers write down the lists that they were given."""

    def __init__(self, url: str, **settings: Any) -> None:
        defaults = {"concurrency": 50, "default_max_attempts": 1, "threads": 4}
        self.app = app = FastQ(url, **defaults | settings)
        self.calls: list[list[Any]] = []
        self.gate = asyncio.Event()
        self.free = threading.Event()
        self.cancelled = 0
        self.seen: list[fastq.JobContext] = []

        @app.task(batch=10, batch_wait=0.05)
        async def square(numbers: list[int]) -> list[int]:
            self.calls.append(numbers)
            return [n * n for n in numbers]

        @app.task(batch=10, batch_wait=0.05, max_attempts=3, retry=0)
        async def picky(numbers: list[int], jobs: list[fastq.JobContext]) -> list[int | Exception]:
            self.calls.append(numbers)
            outcomes: list[Any] = []
            for number, job in zip(numbers, jobs, strict=True):
                if number == 1:
                    outcomes.append(ValueError("one"))
                elif number == 2:
                    outcomes.append(fastq.Fail("two"))
                elif number == 3 and job.attempt == 1:
                    outcomes.append(fastq.Retry("three", delay=0))
                elif number == 4 and job.extra.snoozes == 0:
                    outcomes.append(fastq.Snooze(0))
                else:
                    outcomes.append(number)
            return outcomes

        @app.task(batch=10, batch_wait=0.05)
        async def broken(numbers: list[int]) -> Any:
            self.calls.append(numbers)
            if numbers[0] == 0:
                raise OSError("the disk is full")
            return "x" if numbers[0] == 1 else [1]

        @app.task(batch=5, batch_wait=30)
        async def hold(numbers: list[int], jobs: list[fastq.JobContext]) -> None:
            self.calls.append(numbers)
            self.seen = jobs
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

        @app.task(batch=5, batch_wait=0.05)
        def blocking(rows: list[Row], word: str = fastq.State("word")) -> list[str]:
            self.calls.append(rows)
            assert threading.current_thread().name.startswith("fastq-handler")
            return [f"{word} {row.key} {row.amount}" for row in rows]

        @app.task(batch=10, batch_wait=0.05, timeout=0.3, max_attempts=1)
        async def slow(numbers: list[int]) -> None:
            self.calls.append(numbers)
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

        self.square, self.picky, self.broken, self.hold = square, picky, broken, hold
        self.blocking, self.slow = blocking, slow

    async def until(self, calls: int) -> None:
        """So many calls have begun."""
        while len(self.calls) < calls:
            await asyncio.sleep(0.002)


@pytest.fixture
def mill(redis_url: str) -> Mill:
    return Mill(redis_url)


async def test_a_full_list_begins_at_once_and_the_rest_after_a_while(mill: Mill) -> None:
    """Max size and max wait: 25 jobs are two full lists and one of five; each has its own result."""
    jobs = [await mill.square.enqueue(n) for n in range(25)]
    async with working(mill.app) as worker:
        assert [await job.result(10) for job in jobs] == [n * n for n in range(25)]
        assert worker.counts("square") == {"success": 25}
    assert sorted(map(len, mill.calls)) == [5, 10, 10]
    assert sorted(n for call in mill.calls for n in call) == list(range(25))


async def test_each_job_has_its_own_outcome(mill: Mill) -> None:
    """F131: exceptions in the list: failed, retried, snoozed and failed for good beside those that succeed."""
    jobs = [await mill.picky.enqueue(n) for n in range(6)]
    async with working(mill.app) as worker:
        ended = [await worker.ended(job) for job in jobs]
        assert worker.counts("picky") == {"success": 4, "retry": 3, "failed": 2, "snoozed": 1}
    assert [status.state for status in ended] == ["success", "failed", "failed", "success", "success", "success"]
    assert [status.attempts for status in ended] == [1, 3, 1, 2, 1, 1]
    assert [status.result for status in ended if status.state == "success"] == [0, 3, 4, 5]
    assert (ended[1].error_type, ended[1].error_message) == ("ValueError", "one")


async def test_what_the_handler_raises_is_the_error_of_each(mill: Mill) -> None:
    """Also a return value that says nothing of each job; the tracebacks begin in the handler and do not grow."""
    async with working(mill.app) as worker:
        for first, kind in ((0, "OSError"), (1, "TypeError"), (2, "TypeError")):
            jobs = [await mill.broken.enqueue(first) for _ in range(5)]
            for job in jobs:
                status = await worker.ended(job)
                assert status.error_type == kind
                lines = (status.traceback or "").splitlines()
                assert len(lines) < 8
                assert first or "test_gathering.py" in lines[1]
        assert "given 5 jobs and returned 1 items" in status.error_message
        assert worker.counts("broken") == {"failed": 15}


async def test_arguments_are_those_of_one_job(mill: Mill, redis_url: str) -> None:
    """Checked at the call, typed at the run; a wrong stored one fails alone."""
    with pytest.raises(InvalidArguments):
        await mill.square.enqueue("x")  # type: ignore[arg-type]
    with pytest.raises(InvalidArguments):
        await mill.square.enqueue([1, 2])  # type: ignore[arg-type]
    other = FastQ(redis_url)
    good, bad = await mill.square.enqueue(3), await other.enqueue("square", "three")
    async with working(mill.app) as worker:
        assert await good.result(10) == 9
        assert (await worker.ended(bad)).state == "failed"
    assert mill.calls == [[3]]
    await other.aclose()


async def test_a_plain_function_runs_in_a_thread(mill: Mill) -> None:
    """And gets what the lifespan yielded."""
    jobs = [await mill.blocking.enqueue(Row(str(n), n)) for n in range(5)]
    async with working(mill.app, state={"word": "row"}):
        assert [await job.result(10) for job in jobs] == [f"row {n} {n}" for n in range(5)]
    assert len(mill.calls) == 1


async def test_a_drain_gives_back_what_has_not_begun(mill: Mill) -> None:
    """F131: three jobs wait for two more; the worker is told to stop: they are pending again, uncharged, and nothing ran."""
    jobs = [await mill.hold.enqueue(n) for n in range(3)]
    async with working(mill.app) as worker:
        while len(worker.loop.executor.running) < 3:
            await asyncio.sleep(0.002)
        while worker.slot.running_ids():  # they have come together: a death is charged to none of them
            await asyncio.sleep(0.002)
        started = time.monotonic()
        worker.loop.stop(20.0, "the test says so")
        while worker.loop.executor.running:
            await asyncio.sleep(0.002)
        assert time.monotonic() - started < 5
        assert worker.counts("hold") == {"released": 3}
    assert mill.calls == []
    statuses = [await job.status() for job in jobs]
    assert [(status.state, status.attempts) for status in statuses if status] == [("pending", 0)] * 3
    await mill.app.aclose()


async def test_a_quiet_worker_gives_them_back_too_and_takes_them_again(mill: Mill) -> None:
    jobs = [await mill.hold.enqueue(n) for n in range(3)]
    async with working(mill.app) as worker:
        while len(worker.loop.executor.running) < 3:
            await asyncio.sleep(0.002)
        worker.loop.set_quiet(True)
        while worker.loop.executor.running:
            await asyncio.sleep(0.002)
        worker.loop.set_quiet(False)
        jobs += [await mill.hold.enqueue(n) for n in range(3, 5)]
        await mill.until(1)
        assert len(worker.slot.running_ids()) == 5
        mill.gate.set()
        for job in jobs:
            assert (await worker.ended(job)).state == "success"
    assert sorted(mill.calls[0]) == list(range(5))


async def test_a_cancelled_job_leaves_the_others_alone(mill: Mill) -> None:
    """One that waits never begins; one that runs ends, and the call goes on for the others; the last one takes it along."""
    async with working(mill.app) as worker:
        waiting = [await mill.hold.enqueue(n) for n in range(2)]
        while len(worker.loop.executor.running) < 2:
            await asyncio.sleep(0.002)
        assert await waiting[0].cancel(terminate=True)
        assert (await worker.ended(waiting[0])).state == "cancelled"
        jobs = [waiting[1], *[await mill.hold.enqueue(n) for n in range(10, 14)]]
        await mill.until(1)
        assert sorted(mill.calls[0]) == [1, 10, 11, 12, 13]
        assert await jobs[0].cancel(terminate=True)
        assert (await worker.ended(jobs[0])).state == "cancelled"
        assert next(job for job in mill.seen if job.id == jobs[0].id).cancelled
        assert (mill.cancelled, len(worker.loop.executor.running)) == (0, 4)
        for job in jobs[1:]:
            await job.cancel(terminate=True)
        for job in jobs[1:]:
            assert (await worker.ended(job)).state == "cancelled"
        assert mill.cancelled == 1


async def test_a_call_that_takes_too_long_is_ended(mill: Mill) -> None:
    """The time counts from the call, for each job; when the last one is over its time the handler is stopped."""
    jobs = [await mill.slow.enqueue(n) for n in range(3)]
    async with working(mill.app) as worker:
        for job in jobs:
            status = await worker.ended(job)
            assert (status.state, status.error_type) == ("failed", "JobTimeout")
        assert mill.cancelled == 1


async def test_a_lost_lease_stops_the_call(mill: Mill) -> None:
    """Somebody else has its jobs: the handler is cancelled, and its outcomes are nobody's."""
    jobs = [await mill.hold.enqueue(n) for n in range(5)]
    async with working(mill.app) as worker:
        await mill.until(1)
        keys = mill.app.keys("default")
        mill.app.run_sync(_delete(keys.running(worker.name), keys.workers))
        await mill.square.enqueue(1)
        await mill.until(2)
        assert mill.cancelled == 1
        assert worker.counts("hold") == {"lost": 5}
    assert len(jobs) == 5


def _delete(*keys: bytes) -> Any:
    from fastq.broker.command import raw

    return (yield raw("DEL", *keys))


async def test_no_more_than_run_at_once_come_together(redis_url: str) -> None:
    """concurrency=4: a list of four is full, whatever batch= says."""
    mill = Mill(redis_url, concurrency=4)
    jobs = [await mill.hold.enqueue(n) for n in range(4)]
    async with working(mill.app) as worker:
        await mill.until(1)
        mill.gate.set()
        for job in jobs:
            assert (await worker.ended(job)).state == "success"
    assert list(map(len, mill.calls)) == [4]


async def test_limits_hold_for_each_job(redis_url: str) -> None:
    app = FastQ(redis_url, concurrency=20)
    calls: list[list[int]] = []

    @app.task(batch=10, batch_wait=0.02, concurrency=3)
    async def work(numbers: list[int]) -> None:
        calls.append(numbers)

    jobs = [await work.enqueue(n) for n in range(9)]
    async with working(app) as worker:
        for job in jobs:
            assert (await worker.ended(job)).state == "success"
    assert max(map(len, calls)) <= 3
    assert sorted(n for call in calls for n in call) == list(range(9))


async def test_handlers_can_be_called_and_run_eagerly(mill: Mill) -> None:
    """As a function with a list; fastq.testing runs each job as a list of one."""
    assert await mill.square([2, 3]) == [4, 9]
    with eagerly(mill.app):
        job = await mill.square.enqueue(5)
        assert await job.result() == 25
        with pytest.raises(ValueError, match="one"):
            await mill.picky.enqueue(1)
    assert mill.square.returned.type is int
    assert mill.picky.returned.type is int


def test_definitions_that_cannot_be_called_are_told() -> None:
    app = FastQ("redis://localhost:1/0")
    for options, error in (
        ({"batch": 0}, "whole number from 1 to 10,000"),
        ({"batch": True}, "whole number"),
        ({"batch": 5, "batch_wait": -1}, "batch_wait"),
        ({"batch_wait": 1}, "batch_wait needs batch"),
        ({"batch": 5, "isolation": "process"}, "batch and isolation"),
        ({"batch": 5, "soft_timeout": 3}, "batch and soft_timeout"),
    ):
        with pytest.raises(TaskDefinitionError, match=error):
            app.task(name="wrong", **options)(lambda items: None)

    def two(a: list[int], b: list[int]) -> None: ...
    def none() -> None: ...
    def one(a: int) -> None: ...
    def single(a: list[int], job: fastq.JobContext) -> None: ...

    for fn, error in (
        (two, "a, b"),
        (none, "nobody|nothing"),
        (one, "as a list"),
        (single, "list\\[fastq.JobContext\\]"),
    ):
        task = app.task(batch=5)(fn)
        with pytest.raises(TaskDefinitionError, match=error):
            _ = task.arguments


def test_members_of_a_batch_can_be_gathered(mill: Mill) -> None:
    """enqueue_batch by name: tuples of one item."""
    done: list[Any] = []

    async def main() -> None:
        async with working(mill.app):
            batch = await mill.app.enqueue_batch("square", [(n,) for n in range(20)])
            done.append(await batch.wait(10))

    asyncio.run(main())
    eventually(lambda: done, 1)
    assert (done[0].state, done[0].success) == ("success", 20)
