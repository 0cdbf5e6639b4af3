"""What a worker does with jobs: outcomes, retries, time limits, bad input, order, lost replies and leases."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import msgspec
import pytest

import fastq
from fastq import FastQ, JobContext, JobState
from fastq.broker.command import raw
from fastq.broker.commands import NewJob, enqueue, recover
from fastq.broker.connection import SyncConnection
from fastq.job import Envelope, encode
from fastq.worker import rate as rate_module
from fastq.worker import stopping as stopping_module
from fastq.worker.cancels import Cancels
from fastq.worker.waker import IDLE_WAIT
from tests.conftest import eventually_async
from tests.redis.workshop import Workshop, working


def make_app(url: str, **settings: Any) -> FastQ:
    return FastQ(url, **{"concurrency": 10, "default_max_attempts": 3, **settings})


# -- outcomes ------------------------------------------------------------------------------


@pytest.mark.versions
async def test_success_keeps_a_record_with_the_result(redis_url: str) -> None:
    """F155, F163: the record has state, times, attempts and the returned value."""
    app = make_app(redis_url)

    @app.task
    async def add(a: int, b: int = 2) -> dict[str, int]:
        return {"sum": a + b}

    async with working(app) as shop:
        job = await add.enqueue(40)
        status = await shop.ended(job)
    assert status.state == "success"
    assert status.result == {"sum": 42}
    assert (status.task, status.attempts, status.last_error) == ("add", 1, None)
    assert status.enqueued_at <= status.started_at <= status.finished_at
    assert shop.counts("add") == {"success": 1}


@pytest.mark.versions
async def test_sync_handlers_run_in_threads_and_see_their_job(redis_url: str) -> None:
    """F108, F229: plain functions run off the event loop, with the job's context."""
    app = make_app(redis_url)

    @app.task
    def where(tag: str) -> list[str]:
        return [tag, threading.current_thread().name, app.job().id]

    async with working(app) as shop:
        job = await where.enqueue("x")
        tag, thread, job_id = (await shop.ended(job)).result
    assert tag == "x"
    assert thread.startswith("fastq-handler")
    assert job_id == job.id


async def test_without_result_ttl_nothing_is_left(redis_url: str, raw: Any) -> None:
    """A job with result_ttl=0 leaves no trace: no record, no bucket."""
    app = make_app(redis_url, result_ttl=0)

    @app.task
    async def quick() -> int:
        return 1

    async with working(app) as shop:
        job = await quick.enqueue()
        assert await shop.ended(job) is None
    assert not [key for key in raw.keys("fastq:*") if b"done" in key or b"running" in key]


async def test_retry_charges_an_attempt_and_keeps_the_error(redis_url: str) -> None:
    """F270, F284: attempts count failures; the error of the last one is visible while the job waits."""
    app = make_app(redis_url)
    seen: list[int] = []

    @app.task(retry=0.01)
    async def flaky(job: JobContext) -> str:
        seen.append(job.attempt)
        if job.attempt < 3:
            raise ValueError(f"no {job.attempt}")
        return "yes"

    async with working(app) as shop:
        job = await flaky.enqueue()
        status = await shop.ended(job)
    assert seen == [1, 2, 3]
    assert (status.result, status.attempts) == ("yes", 3)
    assert shop.counts("flaky") == {"success": 1, "retry": 2}


async def test_out_of_attempts_goes_to_the_dead_letters_with_everything(redis_url: str) -> None:
    """F295, F296: body, error type, message, traceback, attempts, times and host are kept."""
    app = make_app(redis_url)

    @app.task(max_retries=1, retry=0)
    async def broken(x: int) -> None:
        raise LookupError("not \x1b[2J there")

    async with working(app) as shop:
        job = await broken.enqueue(7)
        status = await shop.ended(job)
        [letter] = await app.dead.list()
    assert status.state is JobState.FAILED
    assert status.enqueued_at < status.started_at <= status.finished_at
    assert status.attempts == 2
    assert (letter.id, letter.task, letter.reason, letter.attempts) == (job.id, "broken", "exception", 2)
    assert letter.error_type == "LookupError"
    assert "\x1b" not in letter.error_message
    assert "raise LookupError" in letter.traceback
    assert "executor.py" not in letter.traceback
    assert msgspec.msgpack.decode(letter.body) == [7]


async def test_replay_gives_a_fresh_budget_and_is_once(redis_url: str) -> None:
    """F297, F-48."""
    app = make_app(redis_url)
    healed = False

    @app.task(max_attempts=1)
    async def job() -> str:
        if not healed:
            raise RuntimeError("ill")
        return "well"

    async with working(app) as shop:
        handle = await job.enqueue()
        assert (await shop.ended(handle)).state == "failed"
        healed = True
        assert await app.dead.replay(ids=[handle.id]) == 1
        status = await shop.ended(handle)
        assert await app.dead.replay(ids=[handle.id]) == 0
    assert (status.state, status.result, status.attempts) == ("success", "well", 1)


async def test_the_handler_decides(redis_url: str) -> None:
    """Retry(delay), Snooze (no attempt charged), Fail (no more attempts), retry_on and never_on (F279, F281)."""
    app = make_app(redis_url)
    runs: list[str] = []

    @app.task
    async def asks(job: JobContext) -> int:
        runs.append("asks")
        if job.attempt == 1:
            raise fastq.Retry(delay=0)
        return job.attempt

    @app.task
    async def sleeps(job: JobContext) -> int:
        runs.append("sleeps")
        if runs.count("sleeps") < 4:
            job.snooze(0)
        return job.attempt

    @app.task
    async def gives_up() -> None:
        raise fastq.Fail("card declined")

    @app.task(retry_on=OSError, never_on=PermissionError, retry=0)
    async def picky(kind: str) -> None:
        runs.append(kind)
        raise {"os": OSError, "perm": PermissionError, "value": ValueError}[kind]("no")

    async with working(app) as shop:
        assert (await shop.ended(await asks.enqueue())).result == 2
        assert (await shop.ended(await sleeps.enqueue())).result == 1
        failed = await shop.ended(await gives_up.enqueue())
        for kind in ("os", "perm", "value"):
            await shop.ended(await picky.enqueue(kind))
        letters = {letter.error_message: letter for letter in await app.dead.list()}
    assert (failed.state, failed.attempts) == ("failed", 1)
    assert letters["card declined"].reason == "fail"
    assert [runs.count(kind) for kind in ("os", "perm", "value")] == [3, 1, 1]
    assert shop.counts("sleeps") == {"success": 1, "snoozed": 3}


async def test_results_that_cannot_be_kept_do_not_lose_the_job(redis_url: str) -> None:
    """F-45: the job succeeded; the record says why there is no result."""
    app = make_app(redis_url, max_body=1_000)

    @app.task
    async def odd() -> object:
        return object()

    @app.task
    async def big() -> str:
        return "x" * 2_000

    async with working(app) as shop:
        first, second = await shop.ended(await odd.enqueue()), await shop.ended(await big.enqueue())
    assert (first.state, first.result) == ("success", None)
    assert "cannot be encoded" in first.last_error
    assert "2,003 bytes" in second.last_error


async def test_handlers_that_exit_do_not_end_the_worker(redis_url: str) -> None:
    app = make_app(redis_url)

    @app.task(max_attempts=1)
    async def leaves() -> None:
        raise SystemExit(3)

    @app.task(max_attempts=1)
    async def interrupts() -> None:
        raise KeyboardInterrupt

    @app.task(max_attempts=1)
    def leaves_thread() -> None:
        raise SystemExit(3)

    async with working(app) as shop:
        for task in (leaves, interrupts, leaves_thread):
            assert (await shop.ended(await task.enqueue())).state == "failed"


# -- time limits ------------------------------------------------------------------------------


@pytest.mark.versions
async def test_timeout_cancels_and_retries(redis_url: str) -> None:
    """F261, F264: the time limit is a failure that retries; the next attempt may succeed."""
    app = make_app(redis_url)
    cancelled: list[int] = []

    @app.task(timeout=0.05, retry=0)
    async def slow(job: JobContext) -> str:
        if job.attempt == 1:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(job.attempt)
                raise
        return "in time"

    async with working(app) as shop:
        status = await shop.ended(await slow.enqueue())
    assert (status.result, status.attempts, cancelled) == ("in time", 2, [1])


async def test_timeout_of_the_last_attempt_is_a_dead_letter(redis_url: str) -> None:
    app = make_app(redis_url)

    @app.task(timeout=0.05, max_attempts=1)
    async def hangs() -> None:
        await asyncio.Event().wait()

    async with working(app) as shop:
        await shop.ended(await hangs.enqueue())
        [letter] = await app.dead.list()
    assert (letter.reason, letter.error_type) == ("timeout", "JobTimeout")
    assert "timeout of 0.05 s" in letter.error_message


async def test_swallowed_cancel_is_given_up(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """F-12: the slot is free again, the outcome is recorded once, the worker wants to be recycled."""
    monkeypatch.setattr(stopping_module, "CANCEL_GRACE", 0.1)
    app = make_app(redis_url, concurrency=1)
    release = asyncio.Event()

    @app.task(timeout=0.05, max_attempts=1)
    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                pass

    @app.task
    async def other() -> str:
        return "ran"

    async with working(app) as shop:
        assert (await shop.ended(await stubborn.enqueue())).state == "failed"
        assert (await shop.ended(await other.enqueue())).result == "ran"
        assert shop.loop.executor.stops.stuck == 1
        release.set()
    assert shop.counts("stubborn") == {"failed": 1}


async def test_thread_that_overruns_is_told_then_given_up(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """F-13: a thread cannot be killed; it is told, and after the grace the job's outcome is recorded without it."""
    monkeypatch.setattr(stopping_module, "CANCEL_GRACE", 0.2)
    app = make_app(redis_url)
    release, told = threading.Event(), threading.Event()

    @app.task(timeout=0.05, max_attempts=1)
    def polite(job: JobContext) -> str:
        while not job.cancelled:
            release.wait(0.005)
        told.set()
        return "stopped by myself"

    @app.task(timeout=0.05, max_attempts=1)
    def deaf() -> None:
        release.wait(30)

    async with working(app) as shop:
        assert (await shop.ended(await polite.enqueue())).result == "stopped by myself"
        assert told.is_set()
        assert (await shop.ended(await deaf.enqueue())).state == "failed"
        assert shop.loop.executor.stops.stuck == 1
        release.set()


async def test_expired_jobs_are_cancelled_not_run(redis_url: str) -> None:
    """F072."""
    app = make_app(redis_url)
    ran: list[int] = []

    @app.task
    async def late(x: int) -> None:
        ran.append(x)

    gone = await late.options(expires=0).enqueue(1)
    await asyncio.sleep(0.002)
    kept = await late.options(expires=60).enqueue(2)
    async with working(app) as shop:
        status = await shop.ended(gone)
        await shop.ended(kept)
    assert (status.state, ran) == ("cancelled", [2])
    assert "expired" in status.last_error
    assert shop.counts("late") == {"success": 1, "cancelled": 1}


# -- bad input ----------------------------------------------------------------------------------


async def test_bad_jobs_are_answered_in_the_dead_letters(redis_url: str, raw: Any) -> None:
    """F-38, F-39: undecodable envelopes and bodies, wrong arguments, oversized bodies; good neighbours run."""
    app = make_app(redis_url, max_body=1_000)

    @app.task
    async def good(x: int) -> int:
        return x

    now = int(time.time() * 1_000)

    def stored(body: bytes, task: str = "good") -> bytes:
        return encode(Envelope(5, 1, task, body, now))

    bad = {
        "garbage": b"\xc1\xc1\xc1",
        "empty": b"",
        "version": encode(Envelope(5, 99, "good", b"\x90", 0)),
        "no-version": encode(Envelope(5, 0, "good", b"\x90", now)),
        "not-utf8": stored(b"\x91\xa2\xff\xfe"),
        "wrong-type": stored(encode(["one"])),
        "too-many": stored(encode([1, 2])),
        "too-few": stored(encode([])),
        "unknown-name": stored(encode({"y": 1})),
        "not-a-body": stored(encode("text")),
        "deep": stored(b"\x91" * 900),
        "oversized": stored(encode(["x" * 2_000])),
    }
    connection = SyncConnection.to(app.endpoint())
    jobs = [NewJob(job_id, data) for job_id, data in bad.items() if data]
    connection.call(enqueue(app.keys("default"), 5, "test", 1, jobs))
    connection.close()
    async with working(app) as shop:
        handles = [await good.enqueue(n) for n in range(3)]
        assert [(await shop.ended(h)).result for h in handles] == [0, 1, 2]
        letters = {letter.id: letter.reason for letter in await app.dead.list()}
    expected = {
        "garbage": "undecodable", "version": "undecodable", "no-version": "undecodable", "not-utf8": "arguments", "not-a-body": "undecodable",
        "wrong-type": "arguments", "too-many": "arguments", "too-few": "arguments", "unknown-name": "arguments",
        "oversized": "undecodable",
    }  # fmt: skip
    assert {job_id: letters.get(job_id) for job_id in expected} == expected
    assert letters["deep"] in ("undecodable", "arguments")


async def test_unknown_task_is_given_back_then_buried(redis_url: str) -> None:
    """F-40, A-03: never imported, given back for another worker a few times, then a dead letter with the reason."""
    app = make_app(redis_url, unknown_task_ttl=0.5)
    handle = await app.enqueue("os.system", "touch pwned")
    async with working(app) as shop:
        status = await shop.ended(handle, timeout=20)
        [letter] = await app.dead.list()
    assert status.state == "failed"
    assert letter.reason == "unknown_task"
    assert "os.system" in letter.error_message
    assert "is it imported" in letter.error_message


async def test_a_key_of_somebody_else_is_told_with_its_queue(redis_url: str, raw: Any, caplog: Any) -> None:
    """Every queue of the worker waits for it: the log must say which one it is."""
    app = make_app(redis_url, queues="default,bulk", default_queue="bulk")
    ran: list[int] = []

    @app.task
    async def quick() -> None:
        ran.append(1)

    raw.set("fastq:{bulk}:ready:5", "not a list")
    async with working(app):
        (said,) = await eventually_async(lambda: [r for r in caplog.records if r.message == "redis refuses, retrying"])
        assert said.fields["error"].startswith("WRONGTYPE")
        assert said.fields["error"].endswith("in queue bulk: 'fastq check bulk' names the key")
        raw.delete("fastq:{bulk}:ready:5")
        await quick.enqueue()
        await eventually_async(lambda: ran)


async def test_an_unknown_task_that_is_nearly_known_is_told(redis_url: str, caplog: Any) -> None:
    app = make_app(redis_url, unknown_task_ttl=0.5)

    @app.task
    async def resize() -> None: ...

    handle = await app.enqueue("resise")
    async with working(app) as shop:
        status = await shop.ended(handle, timeout=20)
    assert status.error_message is not None
    assert status.error_message.endswith("did you mean 'resize'?")
    told = [record.fields["hint"] for record in caplog.records if record.message == "unknown task given back"]
    assert set(told) == {"did you mean 'resize'?"}


async def test_wrong_calls_are_told_before_anything_is_sent(redis_url: str, raw: Any) -> None:
    """Section 5 of the issue: each names the thing and the value."""
    app = make_app(redis_url, max_body=1_000)

    @app.task
    async def mail(to: str, count: int = 1) -> None: ...

    wrong: list[tuple[type[Exception], str, Any]] = [
        (fastq.InvalidArguments, "missing a required argument: 'to'", lambda: mail.enqueue()),  # type: ignore[call-arg]
        (fastq.InvalidArguments, "did you mean 'count'", lambda: mail.enqueue("a", coutn=2)),  # type: ignore[call-arg]
        (fastq.InvalidArguments, "'count'.*Expected `int`, got `str`", lambda: mail.enqueue("a", "b")),  # type: ignore[arg-type]
        (fastq.InvalidArguments, "cannot be encoded", lambda: mail.enqueue(object())),  # type: ignore[arg-type]
        (fastq.InvalidArguments, "too many positional", lambda: mail.enqueue("a", 1, 2)),  # type: ignore[call-arg]
        (fastq.BodyTooLarge, "max_body=1,000", lambda: mail.enqueue("x" * 2_000)),
        (fastq.InvalidOption, "did you mean 'priority'", lambda: mail.options(proirity=1).enqueue("a")),  # type: ignore[call-arg]
        (fastq.InvalidOption, "priority=11", lambda: mail.options(priority=11).enqueue("a")),
        (fastq.InvalidOption, "delay=-1", lambda: mail.options(delay=-1).enqueue("a")),
        (fastq.InvalidOption, "delay and at", lambda: mail.options(delay=1, at=2.0).enqueue("a")),
        (fastq.InvalidQueueName, "{x}", lambda: mail.options(queue="{x}").enqueue("a")),
        (fastq.InvalidQueueName, "''", lambda: mail.options(queue="").enqueue("a")),
        (fastq.InvalidQueueName, "''", lambda: mail.options(queue="").s("a").enqueue()),
        (fastq.InvalidQueueName, "''", lambda: app.queues.purge("")),
        (fastq.InvalidQueueName, "''", lambda: app.dead.purge("")),
        (fastq.InvalidJobId, "job_id", lambda: mail.options(job_id="a b").enqueue("a")),
        (fastq.UnknownTask, "task name", lambda: app.enqueue("mail\n")),
    ]
    for error, text, call in wrong:
        with pytest.raises(error, match=text):
            await call()
    assert raw.keys("fastq:*") == []
    await app.aclose()


async def test_job_id_reuse(redis_url: str) -> None:
    """F-37: the same id while the job lives is the same job; after its end it is an error that names the state."""
    app = make_app(redis_url)

    @app.task(max_attempts=1)
    async def once(fail: bool) -> None:
        if fail:
            raise ValueError

    first = await once.options(job_id="mail-17").enqueue(False)
    second = await once.options(job_id="mail-17").enqueue(False)
    assert (first.created, second.created, first == second) == (True, False, True)
    async with working(app) as shop:
        await shop.ended(first)
        await shop.ended(await once.options(job_id="mail-18").enqueue(True))
        for job_id, state in (("mail-17", "success"), ("mail-18", "failed")):
            with pytest.raises(fastq.JobIdReused, match=f"{job_id}.*ended as {state}"):
                await once.options(job_id=job_id).enqueue(False)
    assert shop.counts("once") == {"success": 1, "failed": 1}


# -- order ----------------------------------------------------------------------------------------


async def test_priorities_and_strict_queue_order(redis_url: str) -> None:
    """F140, F141, F145: higher priority first within a queue; queues in the order given."""
    app = make_app(redis_url, queues="critical,default", concurrency=1)
    order: list[str] = []

    @app.task
    async def note(tag: str) -> None:
        order.append(tag)

    for tag, queue, priority in (
        ("low", "default", 0),
        ("normal", "default", 5),
        ("top", "default", 10),
        ("crit", "critical", 5),
    ):
        last = await note.options(queue=queue, priority=priority).enqueue(tag)
    async with working(app) as shop:
        await shop.ended(last)
        while len(order) < 4:
            await asyncio.sleep(0.005)
    assert order == ["crit", "top", "normal", "low"]


async def test_weighted_queues_do_not_starve(redis_url: str) -> None:
    """F-50: with weights the light queue gets its share while the heavy one is never empty."""
    app = make_app(redis_url, queues="heavy=3,light=1", concurrency=1, result_ttl=0)
    order: list[str] = []

    @app.task
    async def note(tag: str) -> None:
        order.append(tag)
        await asyncio.sleep(0)

    await note.options(queue="heavy").enqueue_many([("heavy",)] * 300)
    await note.options(queue="light").enqueue_many([("light",)] * 30)
    async with working(app):
        while len(order) < 330:
            await asyncio.sleep(0.005)
    assert order.index("light") < 100
    assert len(order) == 330


async def test_paused_queue_waits_and_resumes(redis_url: str) -> None:
    app = make_app(redis_url)
    ran = asyncio.Event()

    @app.task
    async def note() -> None:
        ran.set()

    connection = SyncConnection.to(app.endpoint())
    connection.run(app.inspector.pause("default"))
    async with working(app) as shop:
        job = await note.enqueue()
        while not shop.slot.reserved_at:
            await asyncio.sleep(0.005)
        assert (await job.status()).state == "pending"  # type: ignore[union-attr]
        connection.run(app.inspector.resume("default"))
        await asyncio.wait_for(ran.wait(), 5)
    connection.close()


# -- surroundings ---------------------------------------------------------------------------------


async def test_middleware_state_and_context_reach_handlers(redis_url: str) -> None:
    """F208: hooks around a job, the lifespan's value and the context as parameters, async and in threads."""
    app = make_app(redis_url)
    log: list[tuple[str, str]] = []

    class Watch(fastq.Middleware):
        async def before(self, job: JobContext) -> None:
            log.append(("before", job.task))

        async def after(self, job: JobContext, result: Any) -> None:
            log.append(("after", str(result)))
            raise RuntimeError("a broken hook changes nothing")

        async def on_error(self, job: JobContext, error: BaseException) -> None:
            log.append(("error", type(error).__name__))

    app.middleware(Watch())

    @app.task
    async def first(job: JobContext, x: int, pool: str = fastq.State("pool")) -> str:
        return f"{job.task} {x} {pool}"

    @app.task
    def second(x: int, *rest: int, everything: Any = fastq.State()) -> list[Any]:
        return [x, list(rest), everything["pool"]]

    @app.task(max_attempts=1)
    async def third() -> None:
        raise KeyError("x")

    async with working(app, state={"pool": "the pool"}) as shop:
        assert (await shop.ended(await first.enqueue(1))).result == "first 1 the pool"
        assert (await shop.ended(await second.enqueue(1, 2, 3))).result == [1, [2, 3], "the pool"]
        assert (await shop.ended(await third.enqueue())).state == "failed"
    assert log == [
        ("before", "first"), ("after", "first 1 the pool"),
        ("before", "second"), ("after", "[1, [2, 3], 'the pool']"),
        ("before", "third"), ("error", "KeyError"),
    ]  # fmt: skip


async def test_a_call_by_name_needs_no_import(redis_url: str) -> None:
    """F067, F073: the producer knows the name only; keywords arrive typed."""
    producer, app = make_app(redis_url), make_app(redis_url)

    @app.task
    async def greet(who: str, *, times: int = 1) -> str:
        return who * times

    async with working(app) as shop:
        job = await producer.enqueue("greet", who="x", times=3)
        assert (await shop.ended(job)).result == "xxx"
        job = await producer.options(priority=9).enqueue("greet", "y")
        assert (await shop.ended(job)).result == "y"
    await producer.aclose()


# -- drain, lost replies, lost leases --------------------------------------------------------------


@pytest.mark.versions
async def test_drain_hands_back_what_has_not_started_and_interrupts_at_the_grace(redis_url: str) -> None:
    """F-11, F241: unstarted jobs are back at once, interrupted ones too, no attempt charged."""
    app = make_app(redis_url, concurrency=2)
    started = asyncio.Event()

    @app.task
    async def long(n: int) -> None:
        started.set()
        await asyncio.Event().wait()

    jobs = [await long.enqueue(n) for n in range(5)]
    async with working(app, grace=0.05):
        await asyncio.wait_for(started.wait(), 5)
    statuses = [await job.status() for job in jobs]
    assert [s.state for s in statuses if s] == ["pending"] * 5
    assert {s.attempts for s in statuses if s} == {0}
    await app.aclose()


async def test_lost_replies_lose_and_double_nothing(redis_url: str, raw: Any) -> None:
    """F-33: connections cut at random under load; every job runs, none twice, none is stuck."""
    app = make_app(redis_url, concurrency=20, result_ttl=0)
    runs: dict[int, int] = {}

    @app.task
    async def count(n: int) -> None:
        runs[n] = runs.get(n, 0) + 1

    total = 3_000
    await count.enqueue_many((n,) for n in range(total))
    async with working(app) as shop:
        cuts = 0
        while len(runs) < total:
            if cuts < 25:
                cuts += 1
                shop.connection.drop("cut by the test")
            await asyncio.sleep(0.003)
        while raw.hlen("fastq:{default}:jobs") > 1:
            await asyncio.sleep(0.005)
        assert shop.counter("redis_errors") > 0
    assert set(runs.values()) == {1}


async def test_a_load_that_breaks_in_is_met_before_the_next_tick(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots that are used again and again at once show the rate: no more turns of one job for each slot until a tick has passed."""
    monkeypatch.setattr(rate_module, "LEAST", 0.0)
    monkeypatch.setattr(rate_module.Rate, "measure", lambda *_: 1)  # no tick says anything
    app = make_app(redis_url, concurrency=10, result_ttl=0)
    done = 0

    @app.task
    async def count() -> None:
        nonlocal done
        done += 1

    await count.enqueue_many([()] * 3_000)
    async with working(app) as shop:
        await eventually_async(lambda: done == 3_000)
        assert shop.loop._rate.value > 0.0


async def test_a_worker_that_lost_its_lease_stops_and_begins_again(redis_url: str) -> None:
    """F-10, I3: its outcome is dropped, its handler cancelled, another run settles; it serves on under a new name."""
    app = make_app(redis_url, concurrency=2)
    gate, cancelled = asyncio.Event(), asyncio.Event()
    runs: list[int] = []

    @app.task
    async def guarded() -> str:
        runs.append(len(runs))
        if len(runs) == 1:
            try:
                await gate.wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise
        return f"run {len(runs)}"

    @app.task
    async def poke() -> None: ...

    async with working(app) as shop:
        job = await guarded.enqueue()
        while not runs:
            await asyncio.sleep(0.005)
        name = shop.name
        await shop.helper.call(
            recover(app.keys("default"), name, expired=False, charge="all", max_deliveries=3, dead_max=10)
        )
        await poke.enqueue()
        await asyncio.wait_for(cancelled.wait(), 5)
        status = await shop.ended(job)
        assert shop.name != name
        assert shop.counter("leases_lost") == 1
    assert status.result == "run 2"
    assert runs == [0, 1]


async def test_scripts_unknown_to_redis_are_sent_again(redis_url: str, raw: Any) -> None:
    """F-25: SCRIPT FLUSH under load costs a round trip, nothing else."""
    app = make_app(redis_url, result_ttl=0)
    runs: list[int] = []

    @app.task
    async def count(n: int) -> None:
        runs.append(n)

    async with working(app):
        for n in range(300):
            await count.enqueue(n)
            if n % 20 == 0:
                raw.script_flush()
        while len(runs) < 300:
            await asyncio.sleep(0.005)
    assert sorted(runs) == list(range(300))


async def test_idle_worker_costs_little(redis_url: str, raw: Any) -> None:
    """DESIGN 2: an idle worker blocks on the wake list and costs Redis under two commands a second."""
    app = make_app(redis_url)
    async with working(app) as shop:
        while not shop.slot.reserved_at:
            await asyncio.sleep(0.005)
        before = raw.info("stats")["total_commands_processed"]
        reserved = shop.slot.reserved_at
        while shop.slot.reserved_at == reserved:  # the next look of an idle worker, IDLE_WAIT later
            await asyncio.sleep(0.02)
        elapsed = shop.slot.reserved_at - reserved
        spent = raw.info("stats")["total_commands_processed"] - before - 2
    assert spent / elapsed < 12, f"{spent} commands (those inside the scripts included) in {elapsed:.1f} s"


async def test_long_jobs_are_not_hoarded(redis_url: str) -> None:
    """Adaptive prefetch: one worker with a long queue of long jobs holds no more than its slots."""
    app = make_app(redis_url, concurrency=2)
    gate = asyncio.Event()

    @app.task
    async def long() -> None:
        await gate.wait()

    await long.enqueue_many([()] * 50)
    async with working(app) as shop:
        while shop.slot.busy < 2:
            await asyncio.sleep(0.005)
        keys = app.keys("default")
        held = await shop.helper.call(raw("SCARD", keys.running(shop.name)))
        assert held - 1 == 2
        gate.set()
        while len(shop.loop.executor.running) or await shop.helper.call(raw("LLEN", keys.ready[5])):
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("queues", ["critical,default,bulk", "critical=6,default=3,bulk=1"])
async def test_an_idle_worker_of_several_queues_is_woken_by_each(redis_url: str, queues: str) -> None:
    """No job waits for IDLE_WAIT because the worker looked at another queue's wake list."""
    app = make_app(redis_url, queues=queues, result_ttl=0)
    waits: list[float] = []

    @app.task
    async def note(sent: float) -> None:
        waits.append(time.monotonic() - sent)

    async with working(app) as shop:
        for n in range(30):
            queue = ("critical", "bulk", "critical", "default")[n % 4]
            await note.options(queue=queue).enqueue(time.monotonic())
            while len(waits) <= n or shop.loop.executor.running:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
    assert sorted(waits)[-2] < IDLE_WAIT / 2, waits


ALONE: dict[str, tuple[bytes, bytes | None]] = {
    "garbage": (b"a", b"\xc1\xc1\xc1"),
    "of a newer release": (b"a", encode(Envelope(5, 99, "good", b"\x90", int(time.time() * 1_000)))),
    "an id that is none": (b"\xff" * 3, encode(Envelope(5, 1, "good", b"\x90", 0))),
    "no envelope": (b"a", None),
    "an unknown task": (b"a", encode(Envelope(5, 1, "nobody", b"\x90", int(time.time() * 1_000)))),
    "wrong arguments": (b"a", encode(Envelope(5, 1, "good", b"\x91\x01", 0))),
}


@pytest.mark.parametrize("kind", ALONE)
async def test_an_idle_worker_answers_what_cannot_run(redis_url: str, raw: Any, kind: str) -> None:
    """It is all that has come: no other job's outcome has the worker write this one's."""
    app = make_app(redis_url)

    @app.task
    async def good() -> None: ...

    keys, (job_id, envelope) = app.keys("default"), ALONE[kind]
    async with working(app) as shop:
        await shop.ended(await good.enqueue())
        await eventually_async(lambda: raw.info("clients")["blocked_clients"] == 1)
        if envelope is not None:
            raw.hset(keys.jobs, job_id, envelope)
        raw.rpush(keys.ready[5], job_id)
        raw.rpush(keys.wake, "1")
        await eventually_async(lambda: raw.llen(keys.ready[5]) == 0)
        await eventually_async(lambda: raw.scard(keys.running(shop.name)) == 1)
        await shop.ended(await good.enqueue())


async def test_a_worker_with_a_long_job_goes_on_waiting_for_others(redis_url: str) -> None:
    app = make_app(redis_url, concurrency=20)
    running, gate = list[int](), asyncio.Event()

    @app.task
    async def long(n: int) -> None:
        running.append(n)
        await gate.wait()

    async with working(app) as shop:
        for n in range(15):
            await long.enqueue(n)
            await eventually_async(lambda n=n: running == [*range(n + 1)])
        gate.set()
        await eventually_async(lambda: not shop.loop.executor.running)


async def test_an_error_that_cannot_be_shown_is_a_failure_like_any_other(redis_url: str) -> None:
    app = make_app(redis_url)

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    @app.task(max_attempts=1)
    async def speechless() -> None:
        raise Mute

    async with working(app) as shop:
        assert (await shop.ended(await speechless.enqueue())).state == "failed"
        [letter] = await app.dead.list()
    assert letter.error_type == "Mute"
    assert "cannot be shown" in letter.error_message


async def test_a_body_that_would_never_run_is_a_mistake(redis_url: str) -> None:
    """Generators are refused at the definition; a coroutine handed back by a plain function fails the job."""
    app = make_app(redis_url, result_ttl=0)

    async def inner() -> None: ...

    @app.task(max_attempts=1)
    def forgets() -> Any:
        return inner()

    def items() -> Any:
        yield 1

    with pytest.raises(fastq.TaskDefinitionError, match="generator"):
        app.task(items)
    with pytest.raises(fastq.TaskDefinitionError, match=r"below @app\.cron"):
        app.task(forgets)
    async with working(app) as shop:
        assert (await shop.ended(await forgets.enqueue())).state == "failed"


async def test_max_jobs_is_a_bound(redis_url: str) -> None:
    app = make_app(redis_url, max_jobs=7, result_ttl=0)

    @app.task
    async def quick() -> None: ...

    await quick.enqueue_many([()] * 20)
    async with working(app) as shop:
        while shop.loop.executor.finished < 7:
            await asyncio.sleep(0.005)
        await shop.helper.call(raw("PING"))
    assert shop.loop.executor.finished == 7
    await app.aclose()


async def test_where_jobs_go_does_not_depend_on_what_a_worker_serves(redis_url: str) -> None:
    served = make_app(redis_url, queues="critical,default")
    assert served.default_queue() == "default"
    assert make_app(redis_url, default_queue="main").default_queue() == "main"


def test_enqueue_sync_waits_for_redis_as_long_as_it_may(make_server: Any) -> None:
    """F-17 for blocking producers: a restart within enqueue_timeout costs time, not the job."""
    server = make_server()
    app = make_app(server.url, enqueue_timeout=10)

    @app.task
    async def quick() -> None: ...

    quick.enqueue_sync()
    server.kill()
    back = threading.Timer(0.3, server.restart)
    back.start()
    handle = quick.enqueue_sync()
    back.join()
    assert handle.status_sync().state == "pending"  # type: ignore[union-attr]
    server.kill()
    short = make_app(server.url, enqueue_timeout=0.1)
    with pytest.raises(fastq.BrokerUnavailable, match="nothing was stored"):
        short.enqueue_sync("quick")
    app.close()


async def test_a_task_called_in_a_task_runs_right_there(redis_url: str) -> None:
    """F122: a direct call is a function call: within the job that calls, and no job of its own."""
    app = FastQ(redis_url)
    ran: list[str] = []

    @app.task
    async def inner(word: str) -> str:
        ran.append(app.job().id)
        return word.upper()

    @app.task
    def plain(word: str) -> str:
        return word + "!"

    @app.task
    async def outer(word: str) -> str:
        return plain(await inner(word))

    async with working(app) as worker:
        job = await outer.enqueue("word")
        assert await job.result(10) == "WORD!"
        assert ran == [job.id]
        assert worker.counts("inner") == worker.counts("plain") == {}
        assert worker.counts("outer") == {"success": 1}


async def test_a_part_that_fails_ends_the_worker(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What listens for jobs must not fail without a word: the worker would keep its lease, and what it holds, and do nothing."""
    app = fastq.FastQ(redis_url)

    @app.task(name="t")
    async def nothing() -> None:
        """A handler."""

    shop, go_on = Workshop(app), asyncio.Event()

    async def fail(_: object) -> None:
        await go_on.wait()
        raise RuntimeError("a part has failed")

    monkeypatch.setattr(Cancels, "run", fail)
    running = asyncio.create_task(shop.loop.run())
    await shop.ended(await app.enqueue("t"))
    go_on.set()
    with pytest.raises(RuntimeError, match="a part has failed"):
        await asyncio.wait_for(running, 10)
    await shop.helper.close()
    await app.aclose()
