"""Jobs that the compiled runner drives: to the handler all is as in a Task of its own."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fastq import FastQ, JobContext, Middleware
from tests.redis.workshop import Workshop, working

pytestmark = pytest.mark.versions  # eager tasks from 3.12

seen: contextvars.ContextVar[str] = contextvars.ContextVar("seen", default="")


@pytest.fixture
def app(redis_url: str) -> FastQ:
    return FastQ(redis_url, result_ttl=60, concurrency=10)


async def outcome(app: FastQ, shop: Workshop, job: Any) -> Any:
    status = await shop.ended(job)
    assert status is not None
    return status


async def test_each_job_has_a_context_of_its_own(app: FastQ) -> None:
    found: list[tuple[str, str, str]] = []

    @app.task
    async def mark(name: str) -> None:
        before = seen.get()
        seen.set(name)
        await asyncio.sleep(0)
        found.append((before, seen.get(), app.job().id))

    jobs = [await mark.enqueue(str(n)) for n in range(30)]
    async with working(app) as shop:
        for job in jobs:
            await outcome(app, shop, job)
    assert {(before, after) for before, after, _ in found} == {("", str(n)) for n in range(30)}
    assert {job_id for _, _, job_id in found} == {job.id for job in jobs}
    assert seen.get() == ""


@pytest.mark.parametrize("kind", ["plain", "kept", "threads", "limited", "wrapped"])
async def test_no_job_sees_what_the_one_before_it_has_set(redis_url: str, kind: str) -> None:
    """A busy worker starts a job where another one ends: in that one's context."""
    app = FastQ(redis_url, result_ttl=60 if kind == "kept" else 0, concurrency=10)
    found: list[str] = []

    async def mark(n: int) -> None:
        found.append(seen.get())
        seen.set(str(n))

    def mark_in_thread(n: int) -> None:
        found.append(seen.get())
        seen.set(str(n))

    class Wrapped(Middleware):
        async def before(self, job: JobContext) -> None:
            found.append(seen.get())
            seen.set(job.id)

    if kind == "wrapped":
        app.middleware(Wrapped())
    rate = {"rate_limit": "1000000/s"} if kind == "limited" else {}
    task: Any = app.task(mark_in_thread if kind == "threads" else mark, name="mark", **rate)
    jobs, per_job = 5_000, 2 if kind == "wrapped" else 1
    token = seen.set("lifespan")
    try:
        async with working(app):
            await task.enqueue_many([(n,) for n in range(jobs)])
            async with asyncio.timeout(30):
                while len(found) < jobs * per_job:
                    await asyncio.sleep(0.001)
    finally:
        seen.reset(token)
    ids = [value for value in found if value != "lifespan"]
    assert len(ids) == (jobs if kind == "wrapped" else 0)  # the handler sees what its own middleware has set


async def test_timeouts_groups_and_cancellation_work_as_in_any_task(app: FastQ) -> None:
    ends: dict[str, Any] = {}

    @app.task
    async def timed() -> str:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        except TimeoutError:
            return "timed out"
        return "slept"

    @app.task(max_attempts=1)
    async def grouped() -> None:
        async def fail(kind: type[Exception]) -> None:
            raise kind

        async with asyncio.TaskGroup() as group:
            group.create_task(fail(ValueError))
            group.create_task(fail(KeyError))

    @app.task
    async def waited() -> str:
        return await asyncio.wait_for(asyncio.sleep(0, "value"), 1)

    @app.task
    async def cancels_itself() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            task.uncancel()
        return f"{task.cancelling()} {task.get_name() == app.job().id}"

    @app.task
    async def thrown() -> list[str]:
        said: list[str] = []

        async def numbers() -> AsyncIterator[int]:
            try:
                yield 1
                yield 2
            finally:
                said.append("closed")

        async for number in numbers():
            said.append(str(number))
            await asyncio.sleep(0)
        return said

    jobs = {name: await app.enqueue(name) for name in ("timed", "grouped", "waited", "cancels_itself", "thrown")}
    async with working(app) as shop:
        for name, job in jobs.items():
            ends[name] = await outcome(app, shop, job)
    assert ends["timed"].result == "timed out"
    assert ends["waited"].result == "value"
    assert ends["cancels_itself"].result == "0 True"
    assert ends["thrown"].result == ["1", "2", "closed"]
    assert ends["grouped"].state == "failed"
    assert "ExceptionGroup" in ends["grouped"].last_error


async def test_an_object_may_be_a_handler(app: FastQ) -> None:
    class Callable_:
        __name__ = "object_with_a_call"

        async def __call__(self, n: int) -> int:
            return n + 1

    app.task(Callable_())
    job = await app.enqueue("object_with_a_call", 1)
    async with working(app) as shop:
        assert (await outcome(app, shop, job)).result == 2


async def test_tracebacks_begin_with_the_handler(app: FastQ) -> None:
    @app.task(max_attempts=1)
    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    @app.task(max_attempts=1)
    async def arguments(n: int) -> None: ...

    first = await fail.enqueue()
    async with working(app) as shop:
        await outcome(app, shop, first)
    (letter,) = await app.dead.list()
    lines = letter.traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "in fail" in lines[1]
    assert "_core.pyx" not in letter.traceback
    await app.aclose()


async def test_the_stack_of_a_running_job_can_be_seen(app: FastQ) -> None:
    """Debuggers and the watchdog look at tasks."""
    gate = asyncio.Event()

    @app.task
    async def waits() -> None:
        await gate.wait()

    job = await waits.enqueue()
    async with working(app) as shop:
        while not shop.loop.executor.running:
            await asyncio.sleep(0.001)
        (task,) = [task for task in asyncio.all_tasks() if task.get_name() == job.id]
        while not task.get_stack():
            await asyncio.sleep(0.001)
        assert task.get_stack()[-1].f_code.co_name == "waits"
        assert "waits" in repr(task)
        gate.set()
        await outcome(app, shop, job)


async def test_nothing_of_a_job_is_kept(app: FastQ) -> None:
    class Big:
        pass

    kept: list[weakref.ref[Any]] = []

    @app.task(result_ttl=0)
    async def make(n: int) -> None:
        big = Big()
        kept.append(weakref.ref(big))
        await asyncio.sleep(0)

    @app.task(max_attempts=1)
    async def fail(n: int) -> None:
        big = Big()
        kept.append(weakref.ref(big))
        raise ValueError(big)

    await make.enqueue_many([(n,) for n in range(50)])
    await fail.enqueue_many([(n,) for n in range(50)])
    async with working(app) as shop:
        while shop.loop.executor.finished < 100:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        gc.collect()
        assert [ref for ref in kept if ref() is not None] == []


@pytest.mark.parametrize("body", [b"", b"\x91", b"\x92\x01\x02", b"\x91\xa1x", b"\xc1", b"\x81\xa1z\x01", b"\x90"])
async def test_bodies_that_do_not_fit(app: FastQ, body: bytes) -> None:
    """What the compiled reader cannot take is judged by the one that says why."""
    from fastq.broker.commands import NewJob
    from fastq.job import PLAIN, Envelope, encode
    from fastq.task import Call

    @app.task(max_attempts=1)
    async def one(n: int) -> None: ...

    envelope = encode(Envelope(5, PLAIN, "one", body, app.now_ms()))
    job = await app.send(Call("default", 5, NewJob("odd", envelope)))
    async with working(app) as shop:
        assert (await outcome(app, shop, job)).state == "failed"
    (letter,) = await app.dead.list()
    assert letter.reason in ("arguments", "undecodable")
    await app.aclose()
