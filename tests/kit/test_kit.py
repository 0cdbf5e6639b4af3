"""fastq.testing: an application on a private server, its jobs run here and now (F380, F381, F382, F384)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

import fastq
from fastq.testing import Drained, DrainTimeout, Kit, drain

done: list[object] = []


def make_app() -> fastq.FastQ:
    app = fastq.FastQ("redis://nobody.invalid:1/0")  # where no test may go
    done.clear()

    @app.task(queue="emails", retry=30.0, max_attempts=2)
    async def send(to: str, subject: str = "hi", times: int = 1) -> str:
        done.append(to)
        if to == "nobody":
            raise ConnectionError("no such host")
        for _ in range(times - 1):
            await send.enqueue(to)
        return f"{subject} {to}"

    @app.task
    def add(a: int, b: int) -> int:
        done.append(a + b)
        return a + b

    return app


async def test_what_is_enqueued_runs_in_this_process_with_all_that_it_enqueues():
    """F382, F384: `drain` is a real worker: results, retries and dead letters are what they are in production."""
    app = make_app()
    async with Kit(app) as kit:
        job = await app.tasks["send"].enqueue("ann", times=3)
        other = await app.enqueue("add", 1, 2)
        assert await kit.drain() == Drained(success=4)
        assert done.count("ann") == 3
        assert (await job.result(), await other.result()) == ("hi ann", 3)
        assert await kit.drain() == Drained()


async def test_a_failed_run_is_a_retry_that_is_due_later():
    app = make_app()
    async with Kit(app) as kit:
        job = await app.enqueue("send", "nobody")
        assert await kit.drain() == Drained(retried=1)
        left = kit.assert_enqueued("send", "nobody")
        assert (left.id, left.attempt, left.queue) == (job.id, 2, "emails")
        assert 29 < left.delay < 31


def test_plain_functions_can_use_it_too():
    """F384: no event loop, no plugin."""
    app = make_app()
    with Kit(app) as kit:
        job = app.enqueue_sync("add", 40, 2)
        assert kit.drain_sync().success == 1
        assert job.result_sync() == 42


def test_every_kit_begins_with_nothing_and_gives_the_settings_back():
    """F380: like a new in-memory queue for each test."""
    app = make_app()
    url = app.settings.url
    with Kit(app, result_ttl=0) as kit:
        assert app.settings.result_ttl == 0
        app.enqueue_sync("add", 1, 1)
        assert len(kit.enqueued()) == 1
    assert (app.settings.url, app.settings.result_ttl) == (url, 3600)
    with Kit(app) as kit:
        assert kit.enqueued() == []
    with pytest.raises(fastq.FastQError, match="not open"):
        kit.enqueued()


def test_only_one_kit_at_a_time():
    with Kit(), pytest.raises(fastq.FastQError, match="another kit is open"):
        Kit().open()


async def test_assertions_say_what_there_is():
    """Arguments that are not given are not compared; defaults count."""
    app = make_app()
    async with Kit(app) as kit:
        send = app.tasks["send"]
        await send.options(delay=60, priority=8).enqueue("ann")
        await app.enqueue("add", 1, b=2)
        job = kit.assert_enqueued(send, to="ann", subject="hi")
        assert (job.args, job.delay, job.priority, job.queue) == (("ann",), 60, 8, "emails")
        kit.assert_enqueued("add")
        kit.assert_enqueued("add", 1, 2)
        kit.refute_enqueued(send, "bob")
        with pytest.raises(
            AssertionError,
            match=r"no job send\('bob'\) was enqueued; there are:\n  send\('ann'\) in queue emails in 60 s\n",
        ):
            kit.assert_enqueued(send, "bob")
        with pytest.raises(AssertionError, match="1 such jobs"):
            kit.refute_enqueued(send)
        assert [job.task for job in kit.enqueued(queue="emails")] == ["send"]


async def test_jobs_are_listed_in_the_order_of_their_calls(monkeypatch: pytest.MonkeyPatch):
    """Also those of one millisecond, in whichever queue and by whichever way: Redis has their time in milliseconds alone."""
    app = make_app()
    send, add, at = app.tasks["send"], app.tasks["add"], app.now_ms()
    monkeypatch.setattr(app, "now_ms", lambda: at)

    async def more():
        yield ("8",)
        yield ("9",)

    async with Kit(app) as kit:
        await send.enqueue("0")
        await add.enqueue(1, 0)
        send.options(delay=60).enqueue_sync("2")
        await add.enqueue_many([(3, 0), (4, 0)])
        await app.enqueue("send", "5")
        add.enqueue_many_sync([(6, 0), (7, 0)])
        await send.enqueue_many(more())
        await add.enqueue(10, 0)
        assert [int(job.args[0]) for job in kit.enqueued()] == list(range(11))


async def test_a_task_that_is_not_registered_here_can_be_asserted():
    async with Kit(make_app()) as kit:
        await kit.app.enqueue("elsewhere", 1, x=[2])
        job = kit.assert_enqueued("elsewhere", 1, x=[2])
        assert (job.args, job.kwargs) == ((1,), {"x": [2]})
        kit.refute_enqueued("elsewhere", 2)


async def test_what_could_never_be_enqueued_is_not_refuted():
    """A misspelt name would make the assertion true of any code."""
    app = make_app()
    async with Kit(app) as kit:
        await app.tasks["send"].enqueue("ann")
        with pytest.raises(fastq.InvalidArguments, match=r"task 'send' has no argument 'tto' - did you mean 'to'\?"):
            kit.refute_enqueued(app.tasks["send"], tto="ann")
        with pytest.raises(fastq.UnknownTask, match=r"no task is named 'sned' - did you mean 'send'\?"):
            kit.refute_enqueued("sned")
        kit.refute_enqueued("send", to="bob")


async def test_a_drain_that_cannot_end_says_what_is_left():
    app = make_app()

    @app.task
    async def sleeper() -> None:
        await asyncio.Event().wait()

    async with Kit(app) as kit:
        await sleeper.enqueue()
        with pytest.raises(DrainTimeout, match=r"not drained within 0.05 s: sleeper \w+ runs"):
            await drain(app, timeout=0.05)
        assert [job.task for job in kit.enqueued()] == ["sleeper"]  # it went back, uncharged


async def test_the_lifespan_surrounds_a_drain_and_queues_can_be_chosen():
    app = make_app()
    events: list[str] = []

    @app.lifespan
    async def resources() -> AsyncIterator[dict[str, int]]:
        events.append("up")
        yield {"n": 7}
        events.append("down")

    @app.task(queue="late")
    async def count(n: int = fastq.State("n")) -> int:
        events.append("run")
        return n

    async with Kit(app) as kit:
        job = await count.enqueue()
        await app.enqueue("add", 1, 1)
        assert (await kit.drain("late")).total == 1
        assert await job.result() == 7
        assert events == ["up", "run", "down"]
        assert (await kit.drain()).total == 1


async def test_isolated_handlers_run_in_this_process():
    """There is nothing that could fork: a test process has threads."""
    app = make_app()

    @app.task(isolation="process", max_memory="64MB")
    async def isolated(n: int) -> int:
        done.append(n)
        return n

    @app.task(isolation="process")
    def isolated_in_a_thread(n: int) -> int:
        done.append(n)
        return n

    async with Kit(app) as kit:
        await isolated.enqueue(1)
        await isolated_in_a_thread.enqueue(2)
        assert await kit.drain() == Drained(success=2)
        assert sorted(done) == [1, 2]  # type: ignore[type-var]


async def test_a_paused_queue_is_not_drained():
    app = make_app()
    async with Kit(app) as kit:
        await app.enqueue("add", 1, 1)
        await app.queues.pause("default")
        assert (await kit.drain()).total == 0
        await app.queues.resume("default")
        assert (await kit.drain()).total == 1


async def test_memory_url_needs_no_kit():
    """F381: `FastQ("memory://")` is the same Lua on a private server."""
    app = fastq.FastQ("memory://", prefix="test")

    @app.task
    async def echo(x: str) -> str:
        return x

    async with contextlib.aclosing(app):  # type: ignore[type-var]  # it has an aclose
        job = await echo.options(delay=60).enqueue("a")
        assert (await drain(app)).total == 0  # delayed: not available immediately
        status = await job.status()
        assert status is not None
        assert status.state == "scheduled"
        await job.cancel()


async def test_a_queue_that_is_split_is_one_queue_to_a_test():
    """F380, F381: which partition a job is in is nothing that a test of an application asks."""
    app = make_app()
    app.queue("emails", partitions=4)
    async with Kit(app) as kit:
        for n in range(12):
            await app.tasks["send"].options(delay=3_600 if n % 2 else 0).enqueue(f"{n}@example.org")
        assert len(kit.enqueued(queue="emails")) == len(kit.enqueued()) == 12
        job = kit.assert_enqueued("send", "5@example.org")
        assert (job.queue, job.delay) == ("emails", 3_600)
        await kit.drain()
        assert len(done) == 6
        await kit.advance(hours=1)
        assert len(done) == 12
