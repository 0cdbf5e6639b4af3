"""Tags: written before their jobs, cancelled in steps, forgotten with them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import fastq
from fastq.broker import tags
from fastq.broker.commands import NewJob
from tests.redis.lab import Lab
from tests.redis.workshop import working

DAY_MS = 86_400_000


@pytest.fixture
def app(redis_url: str) -> fastq.FastQ:
    return fastq.FastQ(redis_url, log_level="error", concurrency=5)


def test_the_script_writes_ids_down_for_a_while(lab: Lab) -> None:
    assert lab.twice(tags.tag(lab.q, "t", ["a", "b"], 1_000)) == (2, 2)
    assert 0 < lab.raw.pttl(lab.q.tag("t")) <= 1_000
    assert lab.call(tags.tag(lab.q, "t", ["c"], 60_000)) == 3
    assert lab.call(tags.tag(lab.q, "t", ["d"], 1_000)) == 4
    assert lab.raw.pttl(lab.q.tag("t")) > 50_000, "never shortened"


def test_entries_of_jobs_that_are_gone_are_dropped(lab: Lab) -> None:
    """10,000 jobs with one tag, ten of which live: the set follows, whatever lives longest."""
    lab.enqueue(*(NewJob(f"live{n}", b"x") for n in range(10)))
    old = lab.now() - 120_000
    lab.raw.zadd(lab.q.tag("t"), {f"live{n}": old for n in range(10)} | {f"gone{n}": old for n in range(5_000)})
    sizes = [lab.call(tags.tag(lab.q, "t", [f"new{n}.{i}" for i in range(100)], 60_000)) for n in range(50)]
    assert sizes[-1] < 6_000, "of twice what a call adds, those that are gone go: without that it would be 10,010"
    left = {member.decode() for member in lab.raw.zrange(lab.q.tag("t"), 0, -1)}
    assert {f"live{n}" for n in range(10)} <= left
    assert {f"new49.{i}" for i in range(100)} <= left, "they may be on their way"


async def test_all_jobs_of_a_tag_are_cancelled(app: fastq.FastQ, raw: Any) -> None:
    """In every queue and state: pending, scheduled, running; those without the tag go on; workers may be away."""
    started, ended = asyncio.Event(), []

    @app.task
    async def work(how: str = "") -> None:
        if how == "hold":
            started.set()
            await asyncio.Event().wait()
        ended.append(how)

    tagged = work.options(tags=["tenant:42", "import"])
    jobs = [await tagged.enqueue("a"), await work.options(tags=["tenant:42"], delay=60).enqueue("b")]
    jobs += [await work.options(tags=["tenant:42"], queue="bulk").enqueue("c")]
    other, sync = (
        await work.options(tags=["tenant:43"]).enqueue("kept"),
        await asyncio.to_thread(tagged.enqueue_sync, "d"),
    )
    bulk = await tagged.enqueue_many([(f"e{n}",) for n in range(1_200)])
    by_name = await app.options(tags=["tenant:42"]).enqueue("work", "f")
    assert raw.zcard("fastq:{default}:tag:tenant:42") == 1_204
    assert raw.pttl("fastq:{default}:tag:tenant:42") > 30 * DAY_MS
    assert await app.cancel_tag("import", queue="bulk") == 0
    assert await app.cancel_tag("tenant:42") == 1_205
    assert await app.cancel_tag("tenant:42") == 0, "each job once"
    assert not raw.exists("fastq:{default}:tag:tenant:42")
    for job_id in [job.id for job in (*jobs, sync, by_name)] + bulk.ids[:3]:
        status = await app.get_status(job_id)
        assert status is not None
        assert status.state == "cancelled"
    async with working(app) as shop:
        await other.result(10)
        held = await tagged.enqueue("hold")
        await started.wait()
        assert await asyncio.to_thread(app.cancel_tag_sync, "import", terminate=True) == 1
        assert (await shop.ended(held)).state == "cancelled"
    assert ended == ["kept"]


async def test_jobs_without_tags_know_nothing_of_them(app: fastq.FastQ, raw: Any) -> None:
    """No key, no command more."""
    before = raw.info("commandstats")
    job = await app.enqueue("work")
    await app.options(tags=[]).enqueue("work")
    assert not raw.keys("*:tag:*")
    for name in ("cmdstat_zadd", "cmdstat_zrandmember"):
        assert raw.info("commandstats").get(name) == before.get(name)
    assert await app.cancel_tag("nobody") == 0
    assert (await job.status()).state == "pending"  # type: ignore[union-attr]
    await app.aclose()


@pytest.mark.parametrize(
    "wrong", ["tenant", ["with space"], [""], ["x" * 101], [7], 7, [f"t{n}" for n in range(11)], ["*{a}"]], ids=str
)
async def test_what_is_no_tag(app: fastq.FastQ, raw: Any, wrong: Any) -> None:
    with pytest.raises(fastq.InvalidOption, match="tag"):
        await app.options(tags=wrong).enqueue("work")
    assert raw.dbsize() == 0
    await app.aclose()


async def test_a_job_of_a_workflow_has_none(app: fastq.FastQ) -> None:
    @app.task
    async def work() -> None: ...

    with pytest.raises(fastq.InvalidOption, match="tags is no option of a job of a workflow"):
        work.options(tags=["a"]).s()
    with pytest.raises(fastq.InvalidOption, match="tag"):
        await app.cancel_tag("two words")
    await app.aclose()
