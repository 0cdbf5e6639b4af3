"""Jobs whose end is out of the ordinary: errors that cannot be stored as they are, threads that never come free."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import fastq
from fastq import FastQ, JobContext
from fastq.worker import stopping
from tests.conftest import eventually_async
from tests.redis.workshop import Workshop, working

NOT_TEXT = os.fsdecode(b"caf\xe9.txt")
"""A file's name that is not UTF-8: Python has a lone surrogate in it, which no encoder takes."""


class Markup(str):
    __slots__ = ()


class Fancy(Exception):
    def __str__(self) -> str:
        return Markup("of a subclass of str")


class Never(fastq.RetryPolicy):
    def plain(self, attempt: int) -> float:
        return float("nan")


class OwnRetry(fastq.Retry):
    def __init__(self, why: str) -> None:
        Exception.__init__(self, why)


class OwnSnooze(fastq.Snooze):
    def __init__(self, why: str) -> None:
        Exception.__init__(self, why)


ODD: dict[str, Any] = {
    "bytes": (lambda: ValueError(f"cannot read {NOT_TEXT}"), 0, "ValueError: cannot read caf\\udce9.txt"),
    "subclass": (Fancy, 0, "Fancy: of a subclass of str"),
    "nan": (lambda: ValueError("x"), Never(), "ValueError: cannot convert float NaN to integer"),
    "retry": (lambda: OwnRetry("not yet"), 0, "OwnRetry: not yet"),
    "snooze": (
        lambda: OwnSnooze("not yet"),
        0,
        "OwnSnooze: not yet (what follows could not be found out: AttributeError:",
    ),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("threaded", [False, True], ids=["async", "thread"])
async def test_an_error_that_cannot_be_stored_as_it_is_ends_its_job(redis_url: str, odd: str, threaded: bool) -> None:
    """Such a job stayed `running` until its timeout, and in threads its neighbours, whose ends were told with it."""
    app = FastQ(redis_url, result_ttl=60, concurrency=4, default_max_attempts=2)
    make, policy, told = ODD[odd]

    def break_off(n: int) -> int:
        if n:
            return n
        raise make()

    async def break_off_async(n: int) -> int:
        return break_off(n)

    task = app.task(name="odd", retry=policy)(break_off if threaded else break_off_async)
    async with working(app) as shop:
        bulk = await task.enqueue_many([(n,) for n in range(4)], ids=True)
        statuses = [await shop.ended(fastq.JobHandle(app, job_id, "default")) for job_id in bulk.ids]
        [letter] = await app.dead.list()
    assert [status.result for status in statuses] == [None, 1, 2, 3]
    assert statuses[0].last_error.startswith(told)
    assert letter.attempts == (1 if odd in ("nan", "snooze") else 2)


# -- threads that do not come free --------------------------------------------------------------------


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What handlers wait for; open at the end, so that no thread outlives its test."""
    gate = threading.Event()
    yield gate
    gate.set()


async def state(job: fastq.JobHandle[Any]) -> str:
    status = await job.status()
    assert status is not None
    return status.state.value


def app_with_one_thread(redis_url: str, gate: threading.Event, **options: Any) -> tuple[FastQ, Any]:
    """And a task whose handlers keep it."""
    app = FastQ(redis_url, result_ttl=60, concurrency=10, threads=1)

    @app.task(name="hang", **options)
    def hang() -> None:
        gate.wait(30)

    return app, hang


async def running(shop: Workshop, count: int) -> None:
    await eventually_async(lambda: len(shop.loop.executor.running) == count)


@pytest.mark.parametrize("middleware", [False, True], ids=["plain", "middleware"])
async def test_a_worker_that_goes_waits_for_no_thread(
    redis_url: str, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, middleware: bool
) -> None:
    """Its threads may be taken for ever: jobs that wait for one go back, and no attempt is charged. They stayed `running` for ever."""
    monkeypatch.setattr(stopping, "CANCEL_GRACE", 0.1)
    app, hang = app_with_one_thread(redis_url, gate, timeout=0.05, max_attempts=1)
    if middleware:
        app.middleware(fastq.Middleware())

    @app.task(timeout=0.05)
    def quick(n: int) -> None: ...

    @app.task(batch=3, batch_wait=0.01)
    def together(items: list[int]) -> None: ...

    async with working(app) as shop:
        hung = await hang.enqueue()
        await running(shop, 1)
        waiting = [await quick.enqueue(n) for n in range(3)] + [await together.enqueue(n) for n in range(3)]
        assert (await shop.ended(hung)).state == "failed"
        await running(shop, 6)
        shop.loop.stop(60, "a handler does not stop")
        await running(shop, 0)
        assert [await state(job) for job in waiting] == ["pending"] * 6
        assert {(await job.status()).attempts for job in waiting} == {0}


async def test_a_job_that_waits_for_a_thread_is_cancelled_at_once(redis_url: str, gate: threading.Event) -> None:
    """It has not begun: nobody has to be given time to stop, and this worker need not be replaced for it."""
    app, hang = app_with_one_thread(redis_url, gate)
    ran: list[int] = []

    @app.task
    def quick() -> None:
        ran.append(1)

    @app.task(batch=3, batch_wait=0.01)
    def together(items: list[int]) -> None:
        ran.extend(items)

    async with working(app) as shop:
        await hang.enqueue()
        await running(shop, 1)
        waiting = [await quick.enqueue(), *[await together.enqueue(n) for n in range(3)]]
        await running(shop, 5)
        for job in waiting:
            assert await job.cancel(terminate=True)
        await running(shop, 1)
        assert [await state(job) for job in waiting] == ["cancelled"] * 4
        assert {(await job.status()).last_error for job in waiting} == {"cancelled before it started"}
        assert shop.loop.executor.stops.stuck == 0
        gate.set()
        await running(shop, 0)
        assert (await shop.ended(await quick.enqueue())).state == "success"
    assert ran == [1]


async def test_the_time_of_a_shared_call_begins_in_its_thread(redis_url: str, gate: threading.Event) -> None:
    """It ran after its jobs had been retried elsewhere, and once more with them: twice, although no process had died."""
    app, hang = app_with_one_thread(redis_url, gate)
    calls: list[list[int]] = []

    @app.task(batch=3, batch_wait=0.01, timeout=0.3, max_attempts=2, retry=0)
    def together(items: list[int], jobs: list[JobContext]) -> None:
        calls.append([job.attempt for job in jobs])

    async with working(app) as shop:
        await hang.enqueue()
        await running(shop, 1)
        jobs = [await together.enqueue(n) for n in range(3)]
        await running(shop, 4)
        members = [job for job in shop.loop.executor.running if job.task == "together"]
        shop.loop.executor.stops.sweep(asyncio.get_running_loop().time() + 60)
        assert [member.stopping for member in members] == ["", "", ""]
        gate.set()
        assert [(await shop.ended(job)).state for job in jobs] == ["success"] * 3
    assert calls == [[1, 1, 1]]


async def test_a_system_without_room_for_threads(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its jobs fail, and have their attempts as any other; it ended the worker."""
    app = FastQ(redis_url, result_ttl=60, default_max_attempts=2, concurrency=5)

    @app.task(retry=0)
    def quick() -> str:
        return "well"

    start, full = threading.Thread.start, True

    def refuse(thread: threading.Thread) -> None:
        if full and thread.name.startswith("fastq-handler"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    async with working(app) as shop:
        assert (await shop.ended(await quick.enqueue())).last_error == "RuntimeError: can't start new thread"
        full = False
        assert (await shop.ended(await quick.enqueue())).result == "well"
        full = True
        jobs = [await quick.enqueue() for _ in range(5)]  # one thread is enough
        assert [(await shop.ended(job)).result for job in jobs] == ["well"] * 5


# -- a worker that stops ------------------------------------------------------------------------------


async def test_a_handler_that_fails_while_it_is_stopped_is_charged_nothing(redis_url: str) -> None:
    """What goes wrong in a `finally` at a deploy is no failure of the job. What it says on purpose counts."""
    app, started = FastQ(redis_url, result_ttl=60), list[str]()

    @app.task(max_attempts=1)
    async def tidy(how: str) -> None:
        started.append(how)
        try:
            await asyncio.sleep(60)
        finally:
            raise {"lost": ConnectionError("gone"), "fail": fastq.Fail("enough")}[how]

    async with working(app, grace=0.0) as shop:
        jobs = {how: await tidy.enqueue(how) for how in ("lost", "fail")}
        await eventually_async(lambda: len(started) == 2)
        shop.loop.stop(0.0, "a deploy")
        await running(shop, 0)
        assert {how: await state(job) for how, job in jobs.items()} == {"lost": "pending", "fail": "failed"}


@pytest.mark.parametrize(
    "options", [{}, {"retry_on": OSError}, {"never_on": asyncio.CancelledError}], ids=["plain", "on", "never"]
)
async def test_a_job_whose_work_was_cancelled_by_others_runs_again(redis_url: str, options: dict[str, Any]) -> None:
    """A dead letter at the first attempt would be a job that one closed connection has lost."""
    app = FastQ(redis_url, result_ttl=60)

    @app.task(retry=0, **options)
    async def waits(job: JobContext) -> int:
        if job.attempt < 3:
            other = asyncio.get_running_loop().create_future()
            other.cancel()
            await other
        return job.attempt

    async with working(app) as shop:
        status = await shop.ended(await waits.enqueue())
    assert (status.result, status.attempts) == ((None, 1) if "never_on" in options else (3, 3))


async def test_a_hook_that_waits_for_what_was_cancelled_fails_no_job(redis_url: str) -> None:
    """`after` changes nothing of a job that has succeeded, whatever it raises."""
    app = FastQ(redis_url, result_ttl=60, default_max_attempts=1)

    class Late(fastq.Middleware):
        async def after(self, job: JobContext, result: Any) -> None:
            other = asyncio.get_running_loop().create_future()
            other.cancel()
            await other

    app.middleware(Late())

    @app.task
    async def well() -> str:
        return "well"

    async with working(app) as shop:
        assert (await shop.ended(await well.enqueue())).result == "well"
