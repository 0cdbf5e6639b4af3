"""What the type checkers must say about user code. Nothing here is run.

A line that is wrong carries an ignore for mypy and for pyright; both report an ignore that is not needed, so a mistake that
is no longer caught fails `make check`. The mistakes are those of CHOICES 3.2, in every way of calling.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from typing import assert_type

import fastq
from fastq.task import AsyncTask, SyncTask
from fastq.testing import Drained, Enqueued, Kit

app = fastq.FastQ("redis://localhost:6379/0", concurrency=5)


@app.task
async def send_email(to: str, subject: str = "hi") -> bool:
    return bool(to and subject)


@app.task(queue="images", max_attempts=5, timeout=30.0, retry=fastq.Exponential(base=1, max_delay=600, jitter="full"))
def resize(path: str, *, width: int = 100) -> int:
    return width + len(path)


@app.task
async def with_context(job: fastq.JobContext, number: int) -> str:
    return f"{job.id} {number}"


@app.task(max_retries=3, soft_timeout=25, retry=[10, 60, 300], retry_on=(OSError,), never_on=PermissionError)
def sync_with_context(job: fastq.JobContext, number: int) -> None:
    job.snooze(number)


@app.task(unique=fastq.Unique("until_started", by=["user"], on_duplicate="replace", debounce=5))
async def unique_task(user: int) -> str:
    return str(user)


@app.task(idempotent=86_400)
def idempotent_task(order: str) -> bytes:
    return order.encode()


@app.task(isolation="process", max_memory="512MB", soft_timeout=25.0, timeout=30)
def isolated(path: str) -> int:
    return len(path)


assert_type(isolated.enqueue_sync("x"), fastq.JobHandle[int])

app.queue("emails", max_pending=10_000, when_full="drop_oldest")
app.queue("emails", partitions=4)
app.queue("emails", partitions="4")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.queue("emails", max_pending=1, when_full="explode")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@app.cron("30 4 * * 1-5", tz="Europe/Berlin")
@app.every(dt.timedelta(minutes=5))
@app.task
async def report(pool: str = fastq.State("pool")) -> None: ...


@app.cron("@daily", overlap="skip", jitter=dt.timedelta(seconds=5))
@app.every(5, overlap="sometimes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
@app.task
def swept() -> None: ...


@app.lifespan
async def resources() -> AsyncIterator[dict[str, str]]:
    yield {"pool": "a pool"}


assert_type(send_email, AsyncTask[[str, str], bool])  # type: ignore[assert-type]  # pyright: ignore[reportAssertTypeFailure]  # it keeps names and defaults, which a list of types cannot say


async def right() -> None:
    job = await send_email.enqueue("a@example.org", subject="hello")
    assert_type(job, fastq.JobHandle[bool])
    assert_type(resize.enqueue_sync("x", width=3), fastq.JobHandle[int])
    assert_type(await with_context.enqueue(1), fastq.JobHandle[str])
    assert_type(sync_with_context.enqueue_sync(1), fastq.JobHandle[None])
    assert_type(await send_email("a"), bool)
    assert_type(resize("x"), int)
    configured = send_email.options(delay=60, priority=fastq.JobPriority.HIGH, queue="bulk", job_id="m-17", expires=300)
    assert_type(await configured.enqueue("a"), fastq.JobHandle[bool])
    await send_email.options(at=dt.datetime.now(dt.UTC), max_retries=2).enqueue("a")
    await send_email.enqueue_many([("a",), {"to": "b", "subject": "x"}])
    assert_type(await unique_task.options(unique="until_executed").enqueue(1), fastq.JobHandle[str])
    async with app.lock("sync:42", timeout=600) as held:
        assert_type(held, fastq.Term)
    with app.lock("sync:42", wait=5) as held_sync:
        assert_type(held_sync, fastq.SyncTerm)
    key = fastq.make_idempotency_key("charge", ("o",), {"amount": 1})
    assert_type(idempotent_task.options(idempotency_key=key).enqueue_sync("o"), fastq.JobHandle[bytes])
    assert_type(await app.get_status(job.id), fastq.JobStatus | None)
    await app.enqueue("send_email", to="a")
    await app.options(delay=1).enqueue("send_email", to="a")
    await report.enqueue()
    assert_type(await job.cancel(terminate=True), bool)
    assert_type(await app.cancel(job.id, queue="bulk"), bool)
    assert_type(app.cancel_sync(job.id), bool)
    assert_type(await app.cancel_tag("tenant:42", terminate=True), int)
    assert_type(app.cancel_tag_sync("tenant:42", queue="bulk"), int)
    for told in job.events_sync():
        assert_type(told, fastq.Event)
    assert_type(app.job().attempt, int)
    assert_type(await job.result(timeout=60), bool)
    assert_type(resize.enqueue_sync("x").result_sync(), int)
    assert_type(await job.exists(), bool)
    await app.job().progress(1, 10, message="one", page="a")
    app.job().update_state("UPLOADING", {"current": 1})
    assert_type(await job.logs(), list[str])
    async for event in job.events():
        assert_type(event, fastq.Event)
    assert_type(await app.queues.pause(task=send_email, where={"to": "a"}), bool)
    assert_type(app.queues.resume_sync("bulk", task="send_email"), bool)
    async for event in app.events(queue="bulk"):
        assert_type(event.progress, fastq.Progress | None)
    assert_type(await app.wait_for(job.id, timeout=60), fastq.JobStatus | None)
    assert_type(app.wait_for_sync(job.id), fastq.JobStatus | None)
    assert_type(await app.schedule("report", cron="0 9 * * *", name="daily", misfire="all", max_instances=2), str)
    assert_type(await app.schedule_interval(report, dt.timedelta(minutes=5)), str)
    assert_type([info.next_run for info in await app.list_scheduled()], list[float | None])
    assert_type([run.state for run in app.schedules.history_sync("daily")], list[str])
    assert_type(app.unschedule_sync("daily"), bool)
    assert_type(fastq.crontab(minute=0, hour="*/6").expression, str)


async def wrong() -> None:
    await send_email.enqueue(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await send_email.enqueue()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await send_email.enqueue("a", subjekt="b")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await send_email.options(delay=5).enqueue(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    send_email.options(dealy=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    send_email.options(delay="soon")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    send_email.options(unique="until_dawn")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fastq.Unique(on_duplicate="drop")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    resize.enqueue_sync("x", 3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await with_context.enqueue("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    sync_with_context.enqueue_sync("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await app.schedule("report", cron="@daily", overlapp="skip")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await app.schedule("report", "@daily")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    text: str = resize("x")  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    handle: fastq.JobHandle[str] = await send_email.enqueue("a")  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    size: int = await (await with_context.enqueue(1)).result()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    del text, handle, size


_both: tuple[AsyncTask[..., bool], SyncTask[..., int]] = (send_email, resize)


async def leaders() -> None:
    leader = app.leader("daily_report", ttl=15)
    async with leader as term:
        assert_type(term, fastq.Term)
        assert_type(term.token, int)
    assert_type(await leader.try_acquire(), fastq.Term | None)
    assert_type(await leader.acquire(timeout=3), fastq.Term)
    assert_type(leader.sync, fastq.SyncLease)
    with leader.sync as held:
        assert_type(held, fastq.SyncTerm)
        assert_type(held.lost, bool)

    async def work(term: fastq.Term) -> int:
        return term.token

    assert_type(await leader.run(work), int)
    app.leader("daily_report", 15)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def limiters() -> None:
    limiter = app.limiter("stripe_api", rate="100/s", adaptive=True)
    await fastq.monitored_acquire("stripe_api", "sync", timeout=3)
    async with fastq.acquire_all([limiter], timeout=3) as nothing:
        assert_type(nothing, None)
    with fastq.acquire_all_sync([limiter, limiter.sync], timeout=3):
        pass
    assert_type((await limiter.state()).pace, float)
    assert_type(fastq.LimitTimeout("stripe_api", 3.0).retry_after, float | None)
    await fastq.monitored_acquire("stripe_api")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def workflows() -> None:
    line = fastq.chain(send_email.s("a@example.org"), resize.si("x", width=3))
    flow = await line.enqueue(on_error="ignore", on_failure=send_email.s(), result_ttl=60)
    assert_type(flow, fastq.Workflow)
    assert_type(fastq.chord([resize.s("x")], send_email.s()).enqueue_sync(), fastq.Workflow)
    assert_type(await fastq.group(resize.s(name) for name in "ab").enqueue(), fastq.Workflow)
    assert_type(await app.chain([("send_email", ("a",), {"subject": "x"}), resize.s("x")], name="n"), fastq.Workflow)
    assert_type(await app.chord([resize.s("x")], ("total",)), fastq.Workflow)
    wf = app.workflow("order")
    paid = wf.add(resize.s("x"))
    wf.add(send_email.options(priority=8).s(), after=[paid])
    assert_type(await wf.enqueue(), fastq.Workflow)
    assert_type(await flow.status(), fastq.WorkflowStatus | None)
    assert_type(await flow.cancel(terminate=True), bool)
    assert_type(await flow.retry(), int)
    await line.enqueue(on_error="explode")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def connection() -> str:
    return "db"


@app.task
async def depending(number: int, db: str = fastq.Depends(connection)) -> str:
    return db * number


async def consumers() -> None:
    await depending.enqueue(1)
    assert_type(await depending(1, db="fake"), str)
    async with app.consume("emails", prefetch=2) as messages:
        assert_type(messages, fastq.Consumer)
        async for message in messages:
            assert_type(message, fastq.Message)
            await message.nack(requeue=True, delay=30)
            await messages.ack(message, "done")
        assert_type(await messages.reserve_next(), fastq.Message | None)
        message = await anext(messages)
        await message.nack(True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    registry = fastq.JobRegistry()
    assert_type(await registry.dispatch(message, timeout=60), fastq.JobResult)
    runner = fastq.WorkerRunner(app, registry.run, queue="emails")
    await runner.start()


@app.task(batch=100, batch_wait=0.5)
async def index(documents: list[str], jobs: list[fastq.JobContext]) -> list[int | Exception]:
    return [len(document) for document in documents]


@app.task(batch=10)
def archive(rows: list[tuple[int, str]]) -> None: ...


async def batches() -> None:
    await index.enqueue("one")
    await index.enqueue(["one"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await archive.options(delay=5).enqueue((1, "a"))
    await index(["one", "two"], [])
    batch = await app.enqueue_batch("index", [("one",)], on_complete=send_email.s(), ids=False)
    assert_type(batch, fastq.BatchResult)
    assert_type(await batch.status(), fastq.BatchStatus | None)
    assert_type(await app.batch(batch.id).wait(timeout=5), fastq.BatchStatus | None)
    assert_type(await batch.on_success(send_email.si("a")), bool)
    assert_type(await batch.failed(), list[str])
    await batch.on_success(index)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(app.enqueue_batch_sync("index", []).cancel_sync(), bool)


async def kits() -> None:
    async with Kit(app, result_ttl=0) as kit:
        assert_type(await kit.drain("emails"), Drained)
        assert_type((await kit.advance(days=7)).success, int)
        assert_type(kit.assert_enqueued(send_email, to="a"), Enqueued)
        kit.kill_worker_at("after_handler", task=send_email)
        kit.kill_worker_at("lunch")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with kit.eager():
            assert_type(await (await send_email.enqueue("a")).result(), bool)
