"""report.lua, and what handlers tell through it: progress and log lines (F159, F160, F161)."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

import fastq
from fastq.broker import commands
from fastq.broker.connection import AsyncConnection
from fastq.broker.url import parse_url
from fastq.worker import reports
from tests.conftest import eventually_async
from tests.redis.lab import Lab
from tests.redis.workshop import working


def report(lab: Lab, job: str, progress: bytes = b"", *lines: str, worker: str = "w", most: int = 3) -> bool:
    return lab.call(commands.report(lab.q, worker, job, progress, 60_000, most, lines))


def test_progress_is_kept_and_expires(lab: Lab) -> None:
    lab.take("a")
    assert lab.twice(commands.report(lab.q, "w", "a", b"half", 60_000, 0, [])) == (True, True)
    assert lab.value("progress:a") == b"half"
    assert 0 < lab.raw.pttl(lab.q.progress("a")) <= 60_000
    assert report(lab, "a", b"all")
    assert lab.value("progress:a") == b"all"


def test_who_does_not_hold_the_job_says_nothing_of_it(lab: Lab) -> None:
    """A worker that lost its lease does not overwrite what the next one says."""
    lab.take("a")
    lab.register("v")
    assert not report(lab, "a", b"stale", worker="v")
    assert lab.value("progress:a") is None
    lab.settle(succeeded=["a"])
    assert not report(lab, "a", b"late")
    assert lab.value("progress:a") is None


def test_the_last_lines_are_kept(lab: Lab) -> None:
    lab.take("a")
    assert report(lab, "a", b"", "1", "2")
    assert report(lab, "a", b"", "3", "4")
    lab.settle(succeeded=["a"])
    assert not report(lab, "a", b"", "5")  # those of the last half second come after the end
    assert lab.value("logs:a") == ["3", "4", "5"]
    assert 0 < lab.raw.pttl(lab.q.logs("a")) <= 60_000


def test_an_id_with_colons_has_keys_of_the_table(lab: Lab) -> None:
    lab.take("tenant:7/a@b=c+d")
    report(lab, "tenant:7/a@b=c+d", b"half", "line")  # the leak check looks at the names


def test_watchers_are_told(lab: Lab) -> None:
    lab.take("a")
    lab.raw.hset(lab.q.awaited, "a", "!")
    lab.raw.pexpire(lab.q.awaited, 60_000)
    report(lab, "a", b"half")
    report(lab, "a", b"", "only a line")
    assert [fields for _, fields in lab.raw.xrange(lab.q.events)] == [{b"progress": b"a"}]


def make_app(url: str, **settings: Any) -> fastq.FastQ:
    return fastq.FastQ(url, log_level="error", **settings)


async def status_of(job: fastq.JobHandle[Any]) -> fastq.JobStatus:
    status = await job.status()
    assert status is not None
    return status


async def test_progress_of_a_coroutine(redis_url: str) -> None:
    app, go_on = make_app(redis_url), asyncio.Event()

    @app.task
    async def count(job: fastq.JobContext) -> int:
        await job.progress(3, 12, message="rows", table="users")
        await go_on.wait()
        return 12

    async with working(app):
        job = await count.enqueue()
        await eventually_async(lambda: _has_progress(job))
        status = await status_of(job)
        said = status.progress
        assert said is not None
        assert (said.current, said.total, said.percent, said.message) == (3, 12, 25.0, "rows")
        assert (said.state, said.meta, said.attempt) == ("PROGRESS", {"table": "users"}, 1)
        assert abs(said.at - time.time()) < 60
        shown = json.loads(json.dumps(status.to_dict()))["progress"]
        assert (shown["percent"], shown["table"], shown["message"]) == (25.0, "users", "rows")
        go_on.set()
        assert await job.result(10) == 12
        status = await status_of(job)
        assert status.progress == said
        assert status.to_dict()["progress"] is None  # F165: only while it runs


async def _has_progress(job: fastq.JobHandle[Any]) -> bool:
    return (await status_of(job)).progress is not None


async def test_a_state_of_ones_own_from_a_thread(redis_url: str) -> None:
    """F159: update_state in a plain function."""
    import threading

    app, go_on = make_app(redis_url), threading.Event()

    @app.task
    def upload(job: fastq.JobContext) -> None:
        job.update_state("UPLOADING", {"current": 1, "total": 4, "file": "a.png"})
        go_on.wait(10)

    async with working(app):
        job = await upload.enqueue()
        await eventually_async(lambda: _has_progress(job))
        said = (await status_of(job)).progress
        go_on.set()
        assert said is not None
        assert (said.state, said.percent, said.meta) == ("UPLOADING", 25.0, {"file": "a.png"})
        await job.result(10)


@pytest.mark.one_server("counts commands")
async def test_progress_is_written_rarely_and_the_latest_wins(redis_url: str, raw: Any) -> None:
    """100,000 calls are a few writes, and the last call is one of them."""
    app, go_on, told = make_app(redis_url), asyncio.Event(), asyncio.Event()

    @app.task
    async def count(job: fastq.JobContext) -> None:
        for n in range(100_000):
            job.progress(n + 1, 100_000)
        told.set()
        await go_on.wait()

    async with working(app):
        raw.config_resetstat()
        job = await count.enqueue()
        await told.wait()
        await eventually_async(lambda: _is_at(job, 100_000))
        writes = raw.info("commandstats")["cmdstat_set"]["calls"]
        assert writes <= 3
        go_on.set()
        await job.result(10)


async def _is_at(job: fastq.JobHandle[Any], current: float) -> bool:
    said = (await status_of(job)).progress
    return said is not None and said.current == current


async def test_a_thread_may_report_as_fast_as_it_can(redis_url: str, raw: Any) -> None:
    """The loop is woken for a write, not for a call."""
    app = make_app(redis_url)

    @app.task
    def count(job: fastq.JobContext) -> None:
        for n in range(50_000):
            job.progress(n + 1, 50_000)

    async with working(app) as shop:
        scheduled: list[object] = []
        schedule = shop.loop._reports._schedule
        shop.loop._reports._schedule = lambda job: (scheduled.append(job), schedule(job))  # type: ignore[method-assign,func-returns-value]
        job = await count.enqueue()
        await job.result(30)
        assert 1 <= len(scheduled) <= 20


async def test_awaiting_progress_lets_others_run(redis_url: str) -> None:
    """A loop that only reports can be stopped by its timeout."""
    app = make_app(redis_url)

    @app.task(timeout=0.2, max_attempts=1)
    async def endless(job: fastq.JobContext) -> None:
        while True:
            await job.progress(1)

    async with working(app):
        with pytest.raises(fastq.JobFailed, match="ran longer than its timeout"):
            await (await endless.enqueue()).result(10)


async def test_what_cannot_be_told_is_the_handlers_error(redis_url: str) -> None:
    app = make_app(redis_url)

    @app.task(max_attempts=1)
    async def strange(what: str, job: fastq.JobContext) -> None:
        match what:
            case "object":
                job.progress(1, thing=object())
            case "large":
                job.progress(1, text="x" * 20_000)
            case _:
                job.progress("half")  # type: ignore[arg-type]

    async with working(app):
        for what, message in {
            "object": "cannot be told: Encoding",
            "large": "more than 16,384",
            "": "cannot be told",
        }.items():
            with pytest.raises(fastq.JobFailed, match=message) as caught:
                await (await strange.enqueue(what)).result(10)
            assert caught.value.type_name == "InvalidOption"


async def test_redis_away_does_not_hurt_the_handler(redis_url: str) -> None:
    app = make_app(redis_url)
    nowhere = AsyncConnection(parse_url("redis://127.0.0.1:1/0"))

    @app.task
    async def count(job: fastq.JobContext) -> int:
        await job.progress(1, 2)
        return 2

    async with working(app) as shop:
        shop.loop._reports._connection = nowhere
        assert await (await count.enqueue()).result(10) == 2


async def test_lines_of_a_job(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last ones that it wrote, of this job alone; from a thread, too; none where the setting is off."""
    monkeypatch.setattr(reports, "INTERVAL", 0.01)
    app = make_app(redis_url, job_log_lines=3)

    @app.task
    async def chatty(name: str, job: fastq.JobContext) -> None:
        for n in range(5):
            job.log.warning("%s %d", name, n)

    @app.task
    def blocking(job: fastq.JobContext) -> None:
        job.log.error("from a thread")

    async with working(app):
        one, other = await chatty.enqueue("one"), await chatty.enqueue("other")
        thread = await blocking.enqueue()
        await asyncio.gather(one.result(10), other.result(10), thread.result(10))
        for job, name in ((one, "one"), (other, "other")):
            await eventually_async(lambda job=job: job.logs())
            lines = await job.logs()
            assert [line.split(" ", 1)[1] for line in lines] == [f"WARNING {name} {n}" for n in (2, 3, 4)]
            assert lines[0][:2] == "20"
        await eventually_async(thread.logs)
        assert (await thread.logs())[0].endswith("ERROR from a thread")
        assert await asyncio.to_thread(thread.logs_sync) == await thread.logs()


async def test_no_lines_by_default(redis_url: str) -> None:
    app = make_app(redis_url)

    @app.task
    async def chatty(job: fastq.JobContext) -> None:
        job.log.warning("hello")

    async with working(app):
        job = await chatty.enqueue()
        await job.result(10)
        assert await job.logs() == []


async def test_what_bound_tasks_know(redis_url: str) -> None:
    """F168: the id, the retries so far, and how many there may be."""
    app, seen = make_app(redis_url), []

    @app.task(max_retries=2, retry=0.001)
    async def flaky(job: fastq.JobContext) -> None:
        seen.append((job.id, job.retries, job.max_retries))
        raise OSError

    async with working(app) as shop:
        job = await flaky.enqueue()
        await shop.ended(job)
        assert seen == [(job.id, n, 2) for n in range(3)]
