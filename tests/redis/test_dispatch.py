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
    """F201, F202, F203: register, @registry.handler, has_handler, get_handler, list_handlers, dispatch, JobResult."""
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
    """F204: UnknownJobError, JobTimeoutError; a handler's own TimeoutError stays its own."""
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
    """F205, F220, F221: WorkerRunner.start() returns an awaitable task, stop(grace_seconds=10); a failed result is a failed run."""
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


async def test_one_handler_for_all_names(redis_url: str) -> None:
    """F206: if and elif on the name; an unknown one fails, and is retried by the default policy or dies."""
    app, done = fastq.FastQ(redis_url, default_max_attempts=1), []

    async def handle(job: fastq.Message) -> None:
        if job.name == "send_email":
            done.append(f"mail to {job.payload['to']}")
        elif job.name == "generate_report":
            done.append(f"report {job.payload['report_id']}")
        else:
            raise ValueError(f"Unknown job type: {job.name}")

    for name, payload in (("send_email", {"to": "ann"}), ("generate_report", {"report_id": 7}), ("dance", {})):
        await app.enqueue(name, **payload)
    assert [await app.process_one(handle) for _ in range(4)] == [True, True, True, False]
    assert done == ["mail to ann", "report 7"]
    (dead,) = await app.dead.list("default")
    assert (dead.task, dead.error_type, dead.error_message) == ("dance", "ValueError", "Unknown job type: dance")
    await app.aclose()


async def test_a_table_of_handlers_that_take_the_payload(redis_url: str) -> None:
    """F207: the user's own dict of functions; what the message carries fits them."""
    app, paid = fastq.FastQ(redis_url, default_max_attempts=1), []
    handlers: dict[str, Any] = {}

    def register_handler(name: str) -> Any:
        return lambda function: handlers.setdefault(name, function)

    @register_handler("process_payment")
    async def process_payment(payload: dict[str, Any]) -> None:
        paid.append(payload["payment_id"])

    async def dispatch(job: fastq.Message) -> None:
        handler = handlers.get(job.name)
        if not handler:
            raise ValueError(f"No handler for job: {job.name}")
        await handler(job.payload)

    await app.enqueue("process_payment", payment_id="p-1")
    other = await app.enqueue("other")
    while await app.process_one(dispatch):
        pass
    assert paid == ["p-1"]
    with pytest.raises(fastq.JobFailed, match="No handler for job: other"):
        await other.result(10)
    await app.aclose()


async def test_dispatches_are_counted_under_a_prefix_of_ones_own() -> None:
    """F200: processed by status, duration, failures by type; the same prefix twice is one set of metrics."""
    prometheus = pytest.importorskip("prometheus_client")
    registry, again = fastq.JobRegistry(metric_prefix="shop_jobs"), fastq.JobRegistry(metric_prefix="shop_jobs")

    @registry.handler("pay")
    async def pay(job: Any) -> fastq.JobResult:
        if job.payload.get("broken"):
            raise ConnectionError("away")
        return fastq.JobResult(success=job.payload["amount"] > 0, message="")

    again.register("pay", pay)
    await registry.dispatch(Job("pay", amount=1))
    await again.dispatch(Job("pay", amount=1))
    await registry.dispatch(Job("pay", amount=0))
    with pytest.raises(ConnectionError):
        await registry.dispatch(Job("pay", broken=True))
    with pytest.raises(fastq.UnknownJobError):
        await registry.dispatch(Job("made up by somebody"))

    def value(name: str, **labels: str) -> float | None:
        found: float | None = prometheus.REGISTRY.get_sample_value(f"shop_jobs_{name}", {"job_name": "pay"} | labels)
        return found

    assert (value("processed_total", status="success"), value("processed_total", status="failure")) == (2, 2)
    assert (value("failures_total", error_type="ConnectionError"), value("failures_total", error_type="JobResult")) == (
        1,
        1,
    )
    assert value("duration_seconds_count") == 4
    assert "made up" not in prometheus.generate_latest().decode()
    with pytest.raises(fastq.TaskDefinitionError, match="metric_prefix='shop jobs' cannot begin"):
        fastq.JobRegistry(metric_prefix="shop jobs")


async def test_without_prometheus_nothing_is_counted_and_all_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """F200, F211: the library is optional."""
    import sys

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    registry = fastq.JobRegistry(metric_prefix="bare_jobs")
    registry.register("ok", lambda job: 1)
    assert (await registry.dispatch(Job("ok"))).success


async def test_handlers_are_called_with_made_jobs() -> None:
    """F064: a job of a test's own, for a handler of a registry or of a task."""
    from fastq.testing import make_job, make_message, told

    message = make_message("send_email", {"to": "a@b"}, id="1", attempt=2, enqueued_at=1_700_000_000.0)
    shown = (message.id, message.name, message.payload, message.attempt, message.enqueued_at)
    assert shown == ("1", "send_email", {"to": "a@b"}, 2, 1_700_000_000.0)
    assert (await make_registry().dispatch(message)).message == "Email sent to a@b"
    assert message.settled == ""
    await message.nack(requeue=True, delay=30)
    assert (message.settled, message.outcome) == ("nack", {"requeue": True, "delay": 30, "error": ""})
    with pytest.raises(AssertionError, match="settled twice: nack, then ack"):
        await message.ack()
    with pytest.raises(TypeError):
        make_message("send_email", {"to": object()})

    app = fastq.FastQ("redis://nobody.invalid")

    @app.task
    async def send(to: str, job: fastq.JobContext) -> int:
        await job.progress(1, 2, message=to)
        if job.attempt == job.max_attempts:
            raise fastq.Fail("last one")
        return job.retries

    job = make_job("send", attempt=3, max_attempts=4)
    assert await send("ann", job=job) == 2  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    progress = told(job)
    assert progress is not None
    assert (progress.current, progress.total, progress.message) == (1, 2, "ann")
    with pytest.raises(fastq.Fail, match="last one"):
        await send("ann", job=make_job(attempt=4, max_attempts=4))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert make_job(cancelled=True).cancelled
    assert told(make_job()) is None
