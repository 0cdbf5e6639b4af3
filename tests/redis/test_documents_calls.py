"""What the documents that users come from do when they enqueue and ask, in fastq's own words."""

from __future__ import annotations

import json
from typing import Any

import pytest

import fastq
from tests.redis.workshop import working


@pytest.fixture
def app(redis_url: str) -> fastq.FastQ:
    return fastq.FastQ(redis_url, log_level="error", queues="critical,default,bulk")


async def test_blocking_code_enqueues_with_a_delay_and_gets_a_handle(app: fastq.FastQ) -> None:
    """F062, F066: the handle has the id; the job is due when it was said to be."""

    @app.task
    def remind(who: str) -> str:
        return who

    import asyncio

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
