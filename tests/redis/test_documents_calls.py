"""What the documents that users come from do when they enqueue and ask, in fastq's own words."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

import fastq
from fastq.broker.command import raw as command
from fastq.broker.embedded import shared_server
from fastq.waiting import Backstage
from tests.conftest import eventually_async
from tests.redis.workshop import working


@pytest.fixture
def app(redis_url: str) -> fastq.FastQ:
    return fastq.FastQ(redis_url, log_level="error", queues="critical,default,bulk")


async def test_blocking_code_enqueues_with_a_delay_and_gets_a_handle(app: fastq.FastQ) -> None:
    """F062, F066: the handle has the id; the job is due when it was said to be."""

    @app.task
    def remind(who: str) -> str:
        return who

    job = await asyncio.to_thread(lambda: remind.options(delay=60).enqueue_sync("a"))
    status = await app.get_status(job.id)
    assert status is not None
    assert (status.id, status.state, status.task) == (job.id, "scheduled", "remind")
    assert status.due_at is not None
    assert status.enqueued_at is not None
    assert 59 < status.due_at - status.enqueued_at < 61
    app.close()
    await app.aclose()


async def test_options_of_one_call(app: fastq.FastQ) -> None:
    """F063, F069, F070: attempts are set at enqueue; the job knows its id, its attempts, how many there may be, its last error."""
    seen: list[tuple[str, str, int, int]] = []

    @app.task(max_attempts=5, retry=0.001)
    async def flaky(job: fastq.JobContext) -> None:
        seen.append((job.id, job.task, job.attempt, job.max_attempts))
        raise ConnectionError("away")

    async with working(app) as shop:
        job = await flaky.options(max_attempts=2).enqueue()
        status = await shop.ended(job)
        assert seen == [(job.id, "flaky", 1, 2), (job.id, "flaky", 2, 2)]
        assert (status.attempts, status.last_error) == (2, "ConnectionError: away")
        kept = await flaky.options(max_attempts=1, result_ttl=0).enqueue()
        assert (await shop.ended(kept)).state == "failed"  # removeOnComplete is for those that succeed


async def test_the_202_pattern(app: fastq.FastQ) -> None:
    """F071, F157, F164, F167: the answer is the id; asked later it is not ready, ready, or not found; all of it is JSON."""

    @app.task
    async def double(rows: list[dict[str, int]]) -> dict[str, Any]:
        return {"rows": [{key: 2 * n for key, n in row.items()} for row in rows]}

    answer = json.loads(json.dumps({"task_id": (await double.enqueue([{"a": 1}])).id}))

    async def show(job_id: str) -> tuple[int, dict[str, Any]]:
        status = await app.get_status(job_id)
        return (200, json.loads(json.dumps(status.to_dict()))) if status else (404, {"status": "not_found"})

    code, shown = await show(answer["task_id"])
    assert (code, shown["status"], shown["result"]) == (200, "pending", None)
    async with working(app):
        ended = await app.wait_for(answer["task_id"], timeout=10)
        assert ended is not None
        assert ended.ready()
        code, shown = await show(answer["task_id"])
        assert (code, shown["status"], shown["result"]) == (200, "success", {"rows": [{"a": 2}]})
        assert await show("nobody") == (404, {"status": "not_found"})


async def test_named_queues(app: fastq.FastQ) -> None:
    """F142, F144, F147: a task has its queue; a call may choose another; the worker serves them in the order given."""
    order: list[str] = []

    @app.task(queue="critical", max_attempts=1)
    async def alert(n: int) -> None:
        order.append(f"critical {n}")

    @app.task(queue="bulk")
    async def report(n: int) -> None:
        order.append(f"bulk {n}")

    jobs = [await report.enqueue(1), await alert.enqueue(1), await report.options(queue="default").enqueue(2)]
    assert [job.queue for job in jobs] == ["bulk", "critical", "default"]
    async with working(app):
        for job in jobs:
            await job.result(10)
    assert order == ["critical 1", "bulk 2", "bulk 1"]


def test_one_object_from_the_environment_is_queue_and_scheduler(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, raw: Any
) -> None:
    """F065, F192: which Redis, or `memory://`, comes from the environment or an argument; it enqueues and it schedules."""
    monkeypatch.delenv("FASTQ_REDIS_URL", raising=False)
    monkeypatch.setenv("REDIS_URL", redis_url)
    app = fastq.FastQ()
    job = app.enqueue_sync("send_email", to="user@example.com", subject="Hello")
    assert raw.hexists("fastq:{default}:jobs", job.id)
    assert app.schedule_sync("cleanup", cron="0 * * * *", name="cleanup") == "cleanup"
    app.close()
    monkeypatch.setenv("FASTQ_REDIS_URL", "memory://")
    private = fastq.FastQ()
    private.purge_queue_sync()  # the process's own, which an earlier test may have used
    other = private.enqueue_sync("send_email", to="user@example.com")
    assert private.get_status_sync(other.id) is not None, "the same commands, on a private server"
    assert not raw.hexists("fastq:{default}:jobs", other.id)
    assert private.purge_queue_sync() == 1
    private.close()
    shared_server().stop()
    with pytest.raises(fastq.ConfigError, match="celery"):
        fastq.FastQ("celery://localhost")


async def test_enqueue_and_enqueue_later_in_one_line(app: fastq.FastQ) -> None:
    """F068: the two functions of a module, by name; a delay is a timedelta or seconds."""
    enqueue, later = app.enqueue, app.options(delay=timedelta(hours=1)).enqueue
    task_id = (await enqueue("send_email", to="user@example.com")).id
    reminder = await later("send_reminder", user_id="123")
    sent, waits = await app.get_status(task_id), await reminder.status()
    assert sent is not None
    assert waits is not None
    assert (sent.state, waits.state, waits.task) == ("pending", "scheduled", "send_reminder")
    assert waits.due_at is not None
    assert waits.enqueued_at is not None
    assert 3_599 < waits.due_at - waits.enqueued_at < 3_601
    await app.aclose()


async def test_a_routing_key_is_a_queue(redis_url: str) -> None:
    """F146: Celery's table of routes is read; what it says besides the queue (exchange, routing key) has no meaning here."""
    table = {
        "tasks.send_email": {"queue": "emails", "exchange": "tasks", "routing_key": "emails"},
        "tasks.report*": {"queue": "reports"},
    }
    app = fastq.FastQ(redis_url, routes=table)
    queues = [(await app.enqueue(name)).queue for name in ("tasks.send_email", "tasks.report_daily", "tasks.other")]
    assert queues == ["emails", "reports", "default"]
    await app.aclose()


async def test_higher_runs_first_whatever_others_count(app: fastq.FastQ) -> None:
    """F148, F149: a number taken over from where 1 is the most urgent is not meant here; most jobs say nothing and are NORMAL."""

    @app.task
    async def note(word: str) -> None: ...

    jobs = [await note.options(priority=1).enqueue("their most urgent"), await note.enqueue("normal")]
    jobs += [await note.options(priority=10 - (1 - 1)).enqueue("translated: 10 - (n - 1)")]
    jobs += [await note.options(priority=fastq.JobPriority.HIGH).enqueue("high")]
    statuses = [await job.status() for job in jobs]
    assert [status and status.priority for status in statuses] == [1, 5, 10, 8]
    with pytest.raises(
        fastq.InvalidOption, match=r"priority=100 is not a whole number from 0 \(LOW\) to 10 \(CRITICAL\)"
    ):
        await note.options(priority=100).enqueue("x")
    order: list[str] = []
    async with app.consume() as messages:
        while message := await messages.reserve_next():
            order.append(message.payload["word"])
            await message.ack()
    assert order == ["translated: 10 - (n - 1)", "high", "normal", "their most urgent"]
    await app.aclose()


async def test_cancel_says_whether_there_was_something_to_cancel(app: fastq.FastQ) -> None:
    """F177, F178: a pending job; a running one that is interrupted; one that has ended; one that nobody knows."""
    started = asyncio.Event()

    @app.task
    async def endless() -> None:
        started.set()
        await asyncio.Event().wait()

    pending = await endless.enqueue()
    assert await app.cancel(pending.id) is True
    assert await app.cancel(pending.id) is False
    assert await app.cancel("nobody") is False
    async with working(app):
        running = await endless.enqueue()
        await started.wait()
        assert await app.cancel(running.id, terminate=True) is True
        with pytest.raises(fastq.JobCancelled):
            await running.result(10)
        assert await app.cancel(running.id, terminate=True) is False


async def test_queues_and_schedules_are_looked_at_and_emptied(app: fastq.FastQ) -> None:
    """F185, F186, F187, F188."""
    assert await app.queue_length("default") == 0
    for _ in range(3):
        await app.enqueue("send_email")
    assert await app.queue_length("default") == 3
    assert await app.purge_queue("default") == 3
    assert await app.purge_queue("default") == 0
    schedule_id = await app.schedule("generate_daily_report", cron="0 9 * * *", name="daily-report")
    shown = [(s.name, s.schedule, s.next_run) for s in await app.list_scheduled()]
    assert [row[:2] for row in shown] == [("daily-report", "At 09:00 every day")]
    assert shown[0][2] is not None
    assert shown[0][2] > app.now_ms() / 1_000
    assert shown[0][2] % 86_400 == 9 * 3_600
    assert await app.unschedule(schedule_id) is True
    assert await app.unschedule(schedule_id) is False
    assert list(await app.list_scheduled()) == []
    await app.aclose()


async def test_the_keys_that_an_operator_types_into_redis_cli(app: fastq.FastQ, raw: Any) -> None:
    """F190: what the documents' keys show is shown by these (docs/redis_keys.md); ready, processing, its deadlines, delayed, jobs, dead."""
    begun, gate = asyncio.Event(), asyncio.Event()

    @app.task(max_attempts=1)
    async def work(how: str) -> None:
        if how == "fail":
            raise ValueError("broken")
        begun.set()
        await gate.wait()

    key = "fastq:{default}:".__add__
    async with working(app) as shop:
        failed = await work.enqueue("fail")
        await shop.ended(failed)
        held = await work.enqueue("hold")
        await begun.wait()
        shop.loop.set_quiet(True)
        ready = await work.enqueue("wait")
        delayed = await work.options(delay=60).enqueue("wait")
        assert [raw.type(key(name)) for name in ("ready:5", f"running:{shop.name}", "workers", "due", "jobs", "dead")] == [
            b"list", b"set", b"zset", b"zset", b"hash", b"zset",
        ]  # fmt: skip
        assert raw.lrange(key("ready:5"), 0, -1) == [ready.id.encode()]  # {prefix}:ready, one per priority
        assert raw.sismember(key(f"running:{shop.name}"), held.id)  # :processing, of one worker
        assert raw.zscore(key("workers"), shop.name) > app.now_ms()  # :processing_vt, of the worker
        assert raw.zrange(key("due"), 0, -1) == [delayed.id.encode()]  # :delayed
        assert {ready.id.encode(), held.id.encode(), delayed.id.encode()} <= set(raw.hkeys(key("jobs")))  # :job:{id}
        assert raw.zrange(key("dead"), 0, -1) == [failed.id.encode()]  # :dlq
        gate.set()
        await held.result(10)
        await app.purge_queue()


async def test_the_low_level_is_one_object(app: fastq.FastQ) -> None:
    """F191: enqueue, reserve, ack and the length of a queue, without a task and without a worker."""
    await app.enqueue("anything", n=1)
    assert await app.queue_length("default") == 1
    async with app.consume("default") as queue:
        message = await queue.reserve_next()
        assert message is not None
        assert (message.name, message.payload) == ("anything", {"n": 1})
        assert await app.queue_length("default") == 0
        await queue.ack(message)
        assert await queue.reserve_next() is None
    await app.aclose()


async def test_shared_tasks_bound_tasks_and_common_defaults(redis_url: str) -> None:
    """F209: a library's tasks, included; the run as a parameter; options that many tasks share, said once."""
    app, seen = fastq.FastQ(redis_url, log_level="error"), []
    library = fastq.Tasks()
    reliable = library.task(
        retry_on=(ConnectionError, TimeoutError), max_retries=5, retry=fastq.Exponential(0.001, max_delay=0.01)
    )

    @reliable
    async def send_webhook(url: str, job: fastq.JobContext) -> int:
        seen.append((job.retries, job.max_retries))
        if job.retries < 2:
            raise ConnectionError(url)
        return job.retries

    @reliable
    async def notify(who: str) -> None:
        raise ValueError(who)

    app.include(library)
    assert send_webhook.defaults.retry == notify.defaults.retry
    async with working(app) as shop:
        hook, other = await send_webhook.enqueue("https://x"), await notify.enqueue("ann")
        assert (await shop.ended(hook)).result == 2
        assert ((await shop.ended(other)).attempts, seen) == (1, [(0, 5), (1, 5), (2, 5)])


def test_tasks_are_discovered(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F210: by module, by package with all in it, and from sets of tasks that a module defines."""
    package = tmp_path / "shop_jobs_for_discovery"
    (package / "mail").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "mail" / "__init__.py").write_text("")
    (package / "mail" / "letters.py").write_text(
        "import fastq\ntasks = fastq.Tasks()\n\n@tasks.task(name='letters.send')\ndef send(to: str) -> None: ...\n"
    )
    (package / "broken.txt").write_text("no module")
    monkeypatch.syspath_prepend(str(tmp_path))
    app = fastq.FastQ(redis_url)
    assert app.discover("shop_jobs_for_discovery") == ["letters.send"]
    assert app.discover("shop_jobs_for_discovery.mail.letters") == [], "once is enough"
    assert app.enqueue_sync("letters.send", "ann").id
    with pytest.raises(fastq.InvalidArguments):
        app.enqueue_sync("letters.send", 1)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        app.discover("no_such_module")
    app.close()


async def test_the_default_time_limit_from_the_environment(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """F260: JOB_DEFAULT_TIMEOUT_SECONDS, and FASTQ_DEFAULT_TIMEOUT, which comes first."""
    monkeypatch.setenv("JOB_DEFAULT_TIMEOUT_SECONDS", "0.05")
    app = fastq.FastQ(redis_url, log_level="critical", default_max_attempts=1)
    assert app.settings.default_timeout == 0.05

    @app.task
    async def slow() -> None:
        await asyncio.Event().wait()

    async with working(app):
        with pytest.raises(fastq.JobFailed) as failed:
            await (await slow.enqueue()).result(10)
        assert "JobTimeout" in str(failed.value)
    monkeypatch.setenv("FASTQ_DEFAULT_TIMEOUT", "7")
    assert fastq.FastQ(redis_url).settings.default_timeout == 7
    monkeypatch.setenv("JOB_DEFAULT_TIMEOUT_SECONDS", "soon")
    monkeypatch.delenv("FASTQ_DEFAULT_TIMEOUT")
    with pytest.raises(fastq.ConfigError, match="JOB_DEFAULT_TIMEOUT_SECONDS"):
        fastq.FastQ(redis_url)


async def test_out_of_retries(app: fastq.FastQ) -> None:
    """F282, F298: a handler knows its last run and may say why it gives up; a dead letter is made then, and not before."""
    deaths: list[int] = []

    @app.task(max_retries=2, retry=0.001)
    async def flaky(to: str, *, job: fastq.JobContext) -> None:
        deaths.append(len(await app.dead.list("default")))
        if job.retries < job.max_retries:
            job.retry(0.001, "gateway away")
        raise fastq.Fail(f"task {job.id} failed after {job.max_retries} retries")

    async with working(app) as shop:
        job = await flaky.enqueue("ann")
        status = await shop.ended(job)
        assert (status.state, status.attempts) == ("failed", 3)
        assert deaths == [0, 0, 0], "nothing is dead while there are retries"
        with pytest.raises(fastq.JobFailed, match=f"task {job.id} failed after 2 retries"):
            await job.result(10)
        letter = (await app.dead.list("default"))[0]
        assert (letter.id, letter.task, _args(letter), letter.attempts) == (job.id, "flaky", ["ann"], 3)


def _args(letter: fastq.DeadLetter) -> Any:
    return msgspec.msgpack.decode(letter.body)


async def test_a_circuit_breaker(app: fastq.FastQ) -> None:
    """F286: one handler finds the service down, and no other job of the fleet calls it for a while; nobody is charged an attempt."""
    calls: list[int] = []
    service = app.limiter("shop_api", rate="1000/s")

    @app.task(limits=[service], max_attempts=2)
    async def call(n: int) -> None:
        calls.append(n)
        if len(calls) == 1:
            await service.penalize(retry_after=1.0)
            raise fastq.Snooze(1.0)

    async with working(app) as shop:
        first = await call.enqueue(0)
        await eventually_async(lambda: bool(calls))
        rest = [await call.enqueue(n) for n in range(1, 6)]
        await eventually_async(lambda: _all(app, rest, "parked"))
        assert calls == [0], "the breaker is open"
        for job in (first, *rest):
            status = await shop.ended(job)
            assert (status.state, status.attempts) == ("success", 1)
    assert sorted(calls) == [0, 0, 1, 2, 3, 4, 5]


async def _all(app: fastq.FastQ, jobs: list[fastq.JobHandle[Any]], state: str) -> bool:
    statuses = [await job.status() for job in jobs]
    return all(status is not None and status.state == state for status in statuses)


async def test_the_dead_letter_queue_is_bounded_as_the_settings_say(redis_url: str, raw: Any) -> None:
    """F299: one per queue, by the queue's name; how many it keeps and for how long is a setting."""
    app = fastq.FastQ(redis_url, log_level="critical", dead_max=3, dead_max_age="2d", queues="default,emails")
    assert app.settings.dead_max_age == 2 * 86_400

    @app.task(max_attempts=1, result_ttl=0)
    async def broken(n: int) -> None:
        raise ValueError(n)

    async with working(app) as shop:
        for n in range(5):
            await shop.ended(await broken.enqueue(n))
            died = raw.time()
            await eventually_async(lambda died=died: raw.time() >= (died[0], died[1] + 1_000))  # one a millisecond
        await shop.ended(await broken.options(queue="emails").enqueue(9))
    assert [_args(letter) for letter in await app.dead.list("default")] == [[4], [3], [2]]
    assert [_args(letter) for letter in await app.dead.list("emails")] == [[9]]
    assert (raw.zcard("fastq:{default}:dead"), raw.hlen("fastq:{default}:dead:jobs")) == (3, 3)
    await app.aclose()


async def test_what_was_processed_is_marked(app: fastq.FastQ) -> None:
    """F310: the inbox's check and mark are one step, which holds for a time and leaves nothing to purge."""
    sent: list[str] = []

    @app.task(retry=0.001)
    async def send(to: str, job: fastq.JobContext) -> str:
        receipt: str = await job.once(f"email:{to}", _note, sent, to)
        if job.attempt == 1:
            raise ConnectionError("after it was sent")
        return receipt

    async with working(app) as shop:
        event = "event-42"
        first = await send.options(idempotency_key=event).enqueue("ann")
        again = await send.options(idempotency_key=event).enqueue("ann")
        assert (first.created, again.created, again.id) == (True, False, first.id)
        status = await shop.ended(first)
        assert (status.result, status.attempts, sent) == ("sent to ann", 2, ["ann"])
        late = await send.options(idempotency_key=event).enqueue("ann")
        assert (late.created, await late.result(10)) == (False, "sent to ann")


def _note(sent: list[str], to: str) -> str:
    sent.append(to)
    return f"sent to {to}"


async def test_events_from_blocking_code(app: fastq.FastQ) -> None:
    """F161, F162: a plain loop over what happens to a job, and over what happens in a queue."""
    gate = asyncio.Event()

    @app.task(max_attempts=2, retry=0.001)
    async def work(job: fastq.JobContext) -> None:
        await gate.wait()
        if job.attempt == 1:
            raise ValueError("once more")

    def watch(seen: list[str], events: Iterator[fastq.Event]) -> None:
        for event in events:
            seen.append(event.kind)
            if event.final:
                break

    one: list[str] = []
    whole: list[str] = []
    async with working(app) as shop:
        job = await work.enqueue()
        threads = [
            threading.Thread(target=watch, args=(one, job.events_sync())),
            threading.Thread(target=watch, args=(whole, app.events_sync())),
        ]
        for thread in threads:
            thread.start()
        await eventually_async(lambda: _watched(app, job.id))
        gate.set()
        await shop.ended(job)
        for thread in threads:
            await asyncio.to_thread(thread.join, 10)
            assert not thread.is_alive()
        assert one[-2:] == whole[-2:] == ["started", "succeeded"]
        assert "retried" in one
        assert "retried" in whole
        assert await asyncio.to_thread(lambda: [event.kind for event in job.events_sync()]) == ["succeeded"]


async def _watched(app: fastq.FastQ, job_id: str) -> bool:
    awaited = await app.call(command("HGETALL", app.keys("default").awaited))
    return {b"*", job_id.encode()} <= set(awaited[::2])


async def test_closing_ends_the_loops_of_blocking_code(redis_url: str) -> None:
    """A thread that waits for an event that never comes goes on when the application is closed."""
    app = fastq.FastQ(redis_url)
    seen: list[fastq.Event] = []
    thread = threading.Thread(target=lambda: seen.extend(app.events_sync()))
    thread.start()
    await eventually_async(lambda: _everything_is_watched(app))
    await asyncio.to_thread(app.close)
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()
    assert seen == []
    await app.aclose()


async def test_a_loop_of_blocking_code_ends_when_the_application_was_closed_between_two_events(redis_url: str) -> None:
    app = fastq.FastQ(redis_url)
    events = app.events_sync()
    first = asyncio.create_task(asyncio.to_thread(next, events))
    await eventually_async(lambda: _everything_is_watched(app))
    job = await app.enqueue("nobody.works")
    assert await job.cancel()
    assert (await first).job_id == job.id
    await asyncio.to_thread(app.close)
    assert await asyncio.to_thread(list, events) == []
    await app.aclose()


def test_closing_leaves_no_thread_behind_that_is_just_about_to_ask() -> None:
    """Threads that begin, wait and end while the loop that they wait on is closed: on a stopped one they would wait for ever."""

    async def endless() -> AsyncIterator[int]:
        for n in range(1_000_000):
            yield n
            await asyncio.sleep(0.001 if n else 0)

    for _ in range(5):
        backstage, begun = Backstage(), threading.Semaphore(0)

        def read(backstage: Backstage = backstage, begun: threading.Semaphore = begun) -> None:
            for n in backstage.iterate(endless()):
                if not n:
                    begun.release()

        threads = [threading.Thread(target=read, daemon=True) for _ in range(20)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert begun.acquire(timeout=10)
        backstage.close()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)


async def _everything_is_watched(app: fastq.FastQ) -> bool:
    return bool(await app.call(command("HEXISTS", app.keys("default").awaited, "*")))
