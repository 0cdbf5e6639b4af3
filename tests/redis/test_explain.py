"""app.explain: each reason for which a job does not run, brought about and named. And app.queues."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

import fastq
from fastq import FastQ
from fastq.broker import commands
from fastq.broker.command import raw
from fastq.broker.commands import Parked
from fastq.broker.embedded import EmbeddedServer
from fastq.job import WorkerCard, encode
from tests.redis.workshop import working


@pytest.fixture
def app(redis_url: str) -> Iterator[FastQ]:
    app = FastQ(redis_url, concurrency=2)

    @app.task(name="send", max_attempts=2, retry=1_000)
    def send(fails: bool = False) -> None:
        if fails:
            raise OSError("no route")

    yield app
    app.close()


def ask(app: FastQ, job_id: str) -> list[str]:
    return [cause.code for cause in app.explain_sync(job_id).causes]


def register(
    app: FastQ, worker: str, *tasks: str, slots: int = 10, lease: int = 60_000, state: str = "running"
) -> None:
    card = WorkerCard("host", 1, slots, int(time.time() * 1_000), "0", 0, list(tasks), state)
    app.run_sync(_one(commands.register(app.keys("default"), worker, lease, encode(card))))


def _one(command: Any) -> Any:
    return (yield command)


def test_a_job_that_nobody_knows(app: FastQ) -> None:
    found = app.explain_sync("nobody")
    assert (found.state, [cause.code for cause in found.causes]) == (None, ["unknown"])
    assert "never enqueued" in str(found)


def test_no_worker_serves_the_queue(app: FastQ) -> None:
    job = app.enqueue_sync("send")
    assert ask(app, job.id) == ["no_worker", "next"]
    register(app, "dead", lease=-1)
    assert ask(app, job.id) == ["no_worker", "next"], "a lease that has run out is no worker"
    register(app, "alive", "send")
    assert ask(app, job.id) == ["next"]


def test_no_worker_knows_the_task(app: FastQ) -> None:
    job, misspelt = app.enqueue_sync("of_another_release"), app.enqueue_sync("sned")
    register(app, "alive", "send")
    assert ask(app, job.id) == ["task_unknown", "next"]
    said = "no live worker of queue default knows task sned - did you mean 'send'?"
    assert said in str(app.explain_sync(misspelt.id))
    register(app, "of_an_older_release")  # does not say what it knows
    assert ask(app, job.id) == ["next"]


def test_nobody_takes_new_jobs(app: FastQ) -> None:
    job = app.enqueue_sync("send")
    register(app, "one", "send", state="quiet")
    register(app, "two", "send", state="draining")
    assert ask(app, job.id) == ["quiet", "next"]
    assert "2 of 2 are draining or quiet" in str(app.explain_sync(job.id))
    register(app, "three", "send")
    assert ask(app, job.id) == ["next"]


def test_the_queue_is_paused(app: FastQ) -> None:
    job = app.enqueue_sync("send")
    register(app, "w", "send")
    assert app.queues.pause_sync()
    found = app.explain_sync(job.id)
    assert [cause.code for cause in found.causes] == ["paused", "next"]
    assert "queue default is paused" in str(found)


def test_it_is_behind_others(app: FastQ) -> None:
    register(app, "w", "send")
    for priority in (5, 5, 8, 10, 2):
        app.options(priority=priority).enqueue_sync("send")
    job = app.enqueue_sync("send")
    found = app.explain_sync(job.id)
    assert [cause.code for cause in found.causes] == ["behind"]
    assert "behind 4 jobs, 2 of them of higher priority" in str(found)


def test_all_slots_are_taken(app: FastQ) -> None:
    register(app, "w", "send", slots=1)
    app.enqueue_sync("send")
    job = app.enqueue_sync("send")
    app.run_sync(_one(commands.reserve(app.keys("default"), "w", 1)))
    assert ask(app, job.id) == ["busy", "next"]


def test_it_is_due_later(app: FastQ, raw: Any) -> None:
    job = app.options(delay=3_600).enqueue_sync("send")
    register(app, "w", "send")
    found = app.explain_sync(job.id)
    assert [cause.code for cause in found.causes] == ["scheduled", "no_scheduler"]
    assert "it is due in 3" in str(found)
    raw.set("fastq:leader", "scheduler", px=60_000)
    assert ask(app, job.id) == ["scheduled"]


def test_it_is_parked(app: FastQ) -> None:
    job = app.enqueue_sync("send")
    register(app, "w", "send")
    q = app.keys("default")
    app.run_sync(_one(commands.reserve(q, "w", 1)))
    app.run_sync(_one(commands.park(q, "w", [Parked(job.id, "stripe/~all", 1.0, 5_000)])))
    found = app.explain_sync(job.id)
    assert [cause.code for cause in found.causes] == ["parked"]
    assert "the limit stripe/~all, looked at again in " in str(found)


async def test_it_waits_for_its_parents(app: FastQ) -> None:
    """Those that have not ended are named, also when a whole group is between it and them."""

    @app.task
    async def part(n: int) -> int:
        if n == 1:
            raise ValueError("broken")
        return n

    @app.task
    async def total(parts: list[int]) -> int:
        return sum(parts)

    @app.task
    async def told(total: int) -> None: ...

    flow = await fastq.chain(fastq.chord([part.s(n) for n in range(8)], total.s()), told.s()).enqueue()
    register(app, "w", "part", "total", "told")
    whole = await app.explain(flow.id)
    assert (
        f"it is a workflow under way: 0 of its 10 jobs have ended; each job of it has an id of its own, {flow.id}.0"
        in str(whole)
    )
    found = await app.explain(f"{flow.id}.9")
    assert (found.state, [cause.code for cause in found.causes]) == ("waiting", ["waiting"])
    assert f"it waits for 8 of its parents in workflow {flow.id}: " in str(found)
    assert f"{flow.id}.0 (under way)" in str(found)
    assert str(found).endswith(" and 3 more")
    last = await app.explain(f"{flow.id}.10")
    assert f"waits for 1 of its parents in workflow {flow.id}: {flow.id}.9 (waiting, too)" in str(last)
    assert await flow.cancel()
    gone = await app.explain(f"{flow.id}.9")
    assert gone.causes[0].code in {"unknown", "waiting"}, "nothing of it will run"
    await app.aclose()


async def test_it_runs_retries_fails_and_ends(app: FastQ) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    @app.task
    async def slow() -> None:
        begun.set()
        await go_on.wait()

    async with working(app) as shop:
        job = await slow.enqueue()
        await begun.wait()
        found = await app.explain(job.id)
        assert [cause.code for cause in found.causes] == ["running"]
        assert shop.name in str(found)
        go_on.set()
        await shop.ended(job)
        assert (await app.explain(job.id)).causes[0].code == "finished"
        failing = await app.enqueue("send", fails=True)
        while (found := await app.explain(failing.id)).causes[0].code != "retry":
            await asyncio.sleep(0.005)
        assert "attempt 1 failed (OSError: no route)" in str(found)
        assert await shop.helper.call(raw("ZADD", app.keys("default").due, 1, failing.id)) == 0
        await shop.ended(failing)
        found = await app.explain(failing.id)
        assert (found.causes[0].code, found.state) == ("failed", "failed")
        assert "after 2 attempts: OSError: no route" in str(found)


# -- queues ------------------------------------------------------------------------------------------


async def test_length_pause_resume_and_purge(app: FastQ) -> None:
    assert await app.queue_length() == 0
    assert await app.queues.info("never_used") is None
    for delay in (0, 0, 60):
        await app.options(delay=delay).enqueue("send")
    assert await app.queue_length() == await app.queues.length("default") == 2
    assert (await app.queues.pause(), await app.queues.pause()) == (True, False)
    info = await app.queues.info()
    assert info is not None
    assert (info.paused, info.scheduled) == (True, 1)
    assert (await app.queues.resume(), await app.queues.resume()) == (True, False)
    assert await app.purge_queue() == 3
    assert await app.queue_length() == 0
    await app.aclose()


def test_the_same_from_blocking_code(app: FastQ) -> None:
    app.options(queue="bulk").enqueue_sync("send")
    assert app.queues.length_sync("bulk") == 1
    assert app.queues.pause_sync("bulk")
    info = app.queues.info_sync("bulk")
    assert info is not None
    assert info.paused
    assert app.queues.resume_sync("bulk")
    assert app.queues.purge_sync("bulk") == 1


def test_the_command(app: FastQ, redis_server: EmbeddedServer) -> None:
    from click.testing import CliRunner

    from fastq.cli.jobs import verbs

    job = app.enqueue_sync("send")
    answer = CliRunner().invoke(verbs["explain"], [job.id, "--redis-url", redis_server.url])
    assert answer.output.splitlines() == [
        f"{job.id}: pending in queue default",
        "  no live worker serves queue default",
        "  it is the next one",
    ]
    unknown = CliRunner().invoke(verbs["explain"], ["nobody", "--json", "--redis-url", redis_server.url])
    assert '"code":"unknown"' in unknown.output
