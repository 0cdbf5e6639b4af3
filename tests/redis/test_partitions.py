"""Queues split into partitions: one queue to producers, workers and operators, several slots to Redis (DESIGN 4)."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

import fastq
from fastq.broker.checker import check
from fastq.broker.command import raw as raw_command
from fastq.broker.doctor import _fleet
from fastq.broker.inspector import Inspector, QueueInfo
from fastq.cli.root import root
from fastq.errors import DuplicateJob, InvalidOption, JobFailed, JobIdReused, QueueFull
from fastq.partitions import partition_for
from fastq.testing.bench import drain
from tests.conftest import eventually_async
from tests.redis.workshop import Workshop, working

PARTS = [f"mail:{number}" for number in range(4)]


@pytest.fixture
def app(redis_url: str) -> Iterator[fastq.FastQ]:
    app = made(redis_url, 4)
    yield app
    app.close()


def made(url: str, partitions: int, **settings: Any) -> fastq.FastQ:
    app = fastq.FastQ(url, queues="mail", default_queue="mail", **settings)
    app.queue("mail", partitions=partitions)
    app.ran = []  # type: ignore[attr-defined]

    @app.task(retry=None, max_attempts=1)
    async def send(number: int) -> int:
        app.ran.append(number)  # type: ignore[attr-defined]
        if number < 0:
            raise ValueError(f"no number {number}")
        return number

    @app.task(unique=fastq.Unique(on_duplicate="raise"))
    async def once(number: int) -> None: ...

    return app


def ran(app: fastq.FastQ) -> list[int]:
    return sorted(app.ran)  # type: ignore[attr-defined]


def lengths(raw: Any, queue: str = "mail") -> dict[str, int]:
    """Where the pending jobs lie: partition -> how many, none left out."""
    names = [queue, *(f"{queue}:{number}" for number in range(8))]
    found = {name: int(raw.llen(f"fastq:{{{name}}}:ready:5")) for name in names}
    return {name: count for name, count in found.items() if count}


def command(url: str, *words: str) -> Any:
    result = CliRunner().invoke(root, [*words, "--redis-url", url, "--json"], catch_exceptions=False)
    return json.loads(result.output)


# -- producers -----------------------------------------------------------------------------------


async def test_jobs_are_spread_and_found_again(app: fastq.FastQ, raw: Any) -> None:
    """Every kind of producer spreads; a job is found by its id alone, by its handle, and by the name of its queue."""
    handles = [await app.enqueue("send", number) for number in range(20)]
    handles += [app.enqueue_sync("send", number) for number in range(20, 40)]
    bulk = await app.tasks["send"].enqueue_many([(number,) for number in range(40, 240)])
    more = app.tasks["send"].enqueue_many_sync([(number,) for number in range(240, 440)])
    assert set(lengths(raw)) == set(PARTS), "nothing lies in the home"
    assert sum(lengths(raw).values()) == 440
    assert raw.smembers("fastq:queues") == {b"mail", *(part.encode() for part in PARTS)}
    for handle in handles:
        assert handle.queue == partition_for("mail", 4, handle.id)
        assert (await handle.status()).state == "pending"  # type: ignore[union-attr]
    for job_id in [*bulk.ids[::20], *more.ids[::20]]:
        for queue in (None, "mail", partition_for("mail", 4, job_id)):
            found = await app.get_status(job_id, queue=queue)
            assert found is not None
            assert found.queue == partition_for("mail", 4, job_id)
    assert await app.get_status("nobody", queue="mail") is None
    await app.aclose()


async def test_a_look_up_by_the_queues_name_asks_one_partition(app: fastq.FastQ, raw: Any) -> None:
    """The id says where: no other partition is asked for a job that is there."""
    job = await app.enqueue("send", 1)
    await app.get_status(job.id, queue="mail")
    before = raw.info("commandstats")
    await app.get_status(job.id, queue="mail")
    after = raw.info("commandstats")
    calls = {
        name: after[name]["calls"] - before.get(name, {"calls": 0})["calls"]
        for name in after
        if name in ("cmdstat_evalsha", "cmdstat_smembers")
    }
    assert calls == {"cmdstat_evalsha": 1} | {name: 0 for name in calls if name != "cmdstat_evalsha"}
    await app.aclose()


async def test_a_chosen_id_is_one_job(app: fastq.FastQ) -> None:
    """The id alone decides where it goes, in every process: there is no second job of an id."""
    first = await app.options(job_id="order-42").enqueue("send", 1)
    second = app.options(job_id="order-42").enqueue_sync("send", 2)
    assert (first.created, second.created, second.queue) == (True, False, first.queue)
    await drain(app)
    assert ran(app) == [1]
    with pytest.raises(JobIdReused):
        await app.options(job_id="order-42").enqueue("send", 3)
    await app.aclose()


async def test_a_unique_key_holds_in_the_whole_queue(app: fastq.FastQ, raw: Any) -> None:
    """F309: the key picks the partition, and the id is made to lead there."""
    jobs = [await app.tasks["once"].enqueue(number) for number in range(40)]
    assert len({job.queue for job in jobs}) == 4
    for number, job in enumerate(jobs):
        assert job.queue == partition_for("mail", 4, job.id), "whoever has the id finds it"
        with pytest.raises(DuplicateJob) as caught:
            await app.tasks["once"].enqueue(number)
        assert caught.value.job_id == job.id
    assert sum(lengths(raw).values()) == 40
    again = [await app.options(idempotency_key=f"k{n % 5}").enqueue("send", n) for n in range(20)]
    assert len({job.id for job in again}) == 5
    assert all(job.queue == partition_for("mail", 4, job.id) for job in again)
    with pytest.raises(InvalidOption, match="split into 4 partitions"):
        await app.options(job_id="mine", idempotency_key="k").enqueue("send", 1)
    await app.aclose()


async def test_a_bound_is_shared_out(redis_url: str) -> None:
    """``max_pending`` of the queue is what its partitions have together, each a like part."""
    app = made(redis_url, 4)
    app.queue("mail", max_pending=40)
    stored = 0
    with pytest.raises(QueueFull):
        for number in range(100):
            await app.enqueue("send", number)
            stored += 1
    assert 10 <= stored <= 40
    info = await app.queues.info("mail")
    assert info is not None
    assert max(part.pending for part in info.partitions) == 10
    await app.aclose()


# -- workers -------------------------------------------------------------------------------------


async def test_a_worker_serves_all_partitions(app: fastq.FastQ, raw: Any) -> None:
    """Backlog, jobs that come while it is idle, results, waiting, events, retries: as of any queue."""
    before = [await app.enqueue("send", number) for number in range(100)]
    async with working(app) as shop:
        events = app.events(queue="mail")
        first = asyncio.ensure_future(anext(aiter(events)))
        assert [await job.result(10) for job in before] == list(range(100))
        for number in range(100, 120):  # one at a time: each finds an idle worker, whatever its partition
            job = await app.enqueue("send", number)
            assert await job.result(10) == number
            status = await app.wait_for(job.id, queue="mail", timeout=10)
            assert status is not None
            assert status.result == number
        assert (await asyncio.wait_for(first, 10)).queue in PARTS
        await events.aclose()  # type: ignore[attr-defined]
        bad = await app.enqueue("send", -1)
        with pytest.raises(JobFailed):
            await bad.result(10)
        assert shop.counts("send", "mail")["success"] == 120, "one series for the queue, not one for each partition"
    assert ran(app) == sorted([*range(120), -1])
    assert list(raw.keys("*running*")) == []


async def test_partitions_take_turns(redis_url: str) -> None:
    """None of them waits for another to be empty: under a backlog, the first jobs that run come from all."""
    app = made(redis_url, 4, concurrency=5, prefetch_max=5)
    jobs = await app.tasks["send"].enqueue_many([(number,) for number in range(2_000)])
    where = {number: partition_for("mail", 4, job_id) for number, job_id in enumerate(jobs.ids)}
    async with working(app):
        await eventually_async(lambda: len(app.ran) >= 400)  # type: ignore[attr-defined]
        shares = Counter(where[number] for number in app.ran[:400])  # type: ignore[attr-defined]
        await eventually_async(lambda: len(app.ran) == 2_000, 30)  # type: ignore[attr-defined]
    assert min(shares[part] for part in PARTS) >= 5, (
        shares
    )  # by chance, in turns of several jobs; in strict order it would be none


async def test_a_worker_of_one_partition(redis_url: str, raw: Any) -> None:
    """``queues="mail:1"``: it takes from that one; what it runs counts as the queue's."""
    app = made(redis_url, 4)
    await app.tasks["send"].enqueue_many([(number,) for number in range(80)])
    mine = lengths(raw)["mail:1"]
    one = made(redis_url, 4)
    one.adopt(msgspec.structs.replace(one.settings, queues="mail:1"))
    async with working(one):
        await eventually_async(lambda: len(one.ran) == mine)  # type: ignore[attr-defined]
        assert lengths(raw).get("mail:1") is None
    assert set(lengths(raw)) == {"mail:0", "mail:2", "mail:3"}
    assert raw.hkeys("fastq:{mail:0}:info") == []
    await app.aclose()


async def test_what_a_worker_holds_goes_back(app: fastq.FastQ, raw: Any) -> None:
    """A worker that stops leaves nothing behind in any partition."""
    gate = asyncio.Event()

    @app.task
    async def slow(number: int) -> None:
        await gate.wait()

    await slow.enqueue_many([(number,) for number in range(40)])
    async with working(app, grace=0.0) as shop:
        await eventually_async(lambda: len(shop.loop.executor.running) == 40)
    assert sum(lengths(raw).values()) == 40
    assert list(raw.keys("*running*")) == []
    await app.aclose()


async def test_a_cancelled_job_is_told(app: fastq.FastQ) -> None:
    """F177, F178: pending or running, by its id alone."""
    job = await app.enqueue("send", 1)
    assert await app.cancel(job.id)
    assert (await app.get_status(job.id)).state == "cancelled"  # type: ignore[union-attr]
    started = asyncio.Event()

    @app.task
    async def slow() -> None:
        started.set()
        await asyncio.sleep(60)

    async with working(app):
        running = await slow.enqueue()
        await asyncio.wait_for(started.wait(), 10)
        assert await app.cancel(running.id, queue="mail", terminate=True)
        status = await app.wait_for(running.id, timeout=10)
        assert status is not None
        assert status.state == "cancelled"
    assert ran(app) == []


async def test_limits_are_those_of_the_queue(redis_url: str) -> None:
    """One limiter for all partitions."""
    app = made(redis_url, 4)
    app.queue("mail", concurrency=1)
    most = now = 0

    @app.task
    async def count() -> None:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.005)
        now -= 1

    bulk = await count.enqueue_many([() for _ in range(20)])
    async with working(app) as shop:
        for job_id in bulk.ids:
            job = fastq.JobHandle(app, job_id, partition_for("mail", 4, job_id))
            assert (await shop.ended(job, 30)).state == "success"
    assert most == 1


# -- workflows, batches, schedules, consumers ----------------------------------------------------


async def test_a_workflow_lies_in_one_partition(app: fastq.FastQ, raw: Any) -> None:
    """F115: its jobs begin and end each other, so they share a slot: that of its id."""
    send = app.tasks["send"]
    flows = [await fastq.chain(send.s(1), send.si(2), send.si(3)).enqueue() for _ in range(12)]
    assert len({flow.queue for flow in flows}) > 1
    assert all(flow.queue == partition_for("mail", 4, flow.id) for flow in flows)
    async with working(app):
        for flow in flows:
            assert await flow.result(10) == 3
            status = await app.get_workflow(flow.id).status()
            assert status is not None
            assert status.state == "success"
            found = await app.get_status(f"{flow.id}.1", queue="mail")
            assert found is not None
            assert found.queue == flow.queue
    assert raw.keys("fastq:{mail}:flow*") == []


async def test_a_batch_lies_in_one_partition(app: fastq.FastQ, raw: Any) -> None:
    """F130: its counts are kept where its jobs end."""
    batch = await app.enqueue_batch("send", [(number,) for number in range(50)], on_success=app.tasks["send"].si(999))
    assert list(lengths(raw)) == [partition_for("mail", 4, batch.id)]
    async with working(app):
        status = await app.batch(batch.id, queue="mail").wait(10)
        assert status is not None
        assert (status.state, status.success) == ("success", 50)
        await eventually_async(lambda: 999 in app.ran)  # type: ignore[attr-defined]
    with pytest.raises(InvalidOption, match="a batch lies in one partition"):
        await app.enqueue_batch("once", [(1,)])
    await app.aclose()


async def test_a_schedule_lies_in_the_home(app: fastq.FastQ, raw: Any) -> None:
    """F090: its ticks, and the jobs that it makes, have one place, whatever the number of partitions."""
    await app.schedule("send", cron="0 0 1 1 *", name="yearly", args=(7,))
    job_id = await app.schedules.run_now("yearly")
    assert lengths(raw) == {"mail": 1}
    async with working(app):
        for queue in (None, "mail"):
            status = await app.wait_for(job_id, queue=queue, timeout=10)
            assert status is not None
            assert status.result == 7
    assert await app.unschedule("yearly")
    await app.aclose()


async def test_a_consumer_names_its_partition(app: fastq.FastQ) -> None:
    """F033: one consumer takes from one; that it would miss the others is said."""
    with pytest.raises(InvalidOption, match="'mail:0', 'mail:1' and so on"):
        app.consume("mail")
    await app.tasks["send"].enqueue_many([(number,) for number in range(40)])
    seen = 0
    for part in PARTS:
        async with app.consume(part, prefetch=10) as messages:
            while await messages.process_one(_ack):
                seen += 1
    assert seen == 40
    await app.aclose()


async def _ack(message: Any) -> None: ...


async def test_signed_jobs(redis_url: str) -> None:
    """A-11: what is signed is where the job lies; one that was moved to another partition is a forgery."""
    app = made(redis_url, 4, signing_keys=f"a={'k' * 32}")
    send = app.tasks["send"]
    jobs = [await app.enqueue("send", number) for number in range(10)]
    jobs += [app.options(idempotency_key=f"k{number}").enqueue_sync("send", number) for number in range(10, 20)]
    flow = await fastq.chain(send.s(20), send.si(21)).enqueue()
    batch = await app.enqueue_batch("send", [(22,), (23,)], on_success=send.si(24))
    await app.schedule("send", cron="0 0 1 1 *", name="yearly", args=(25,))
    await drain(app)
    assert ran(app) == list(range(25))
    assert (await flow.status()).state == (await batch.status()).state == "success"  # type: ignore[union-attr]
    moved = await app.enqueue("send", 99)
    there = next(part for part in PARTS if part != moved.queue)
    keys, other = app.keys(moved.queue), app.keys(there)
    data = await app.call(raw_command("HGET", keys.jobs, moved.id))
    await app.call(raw_command("HSET", other.jobs, moved.id, data))
    await app.call(raw_command("RPUSH", other.ready[5], moved.id))
    await app.queues.purge(moved.queue)
    await drain(app)
    assert 99 not in ran(app)
    assert [(letter.queue, letter.reason) for letter in await app.dead.list("mail")] == [(there, "signature")]
    await app.aclose()
    app.close()


async def test_a_partition_that_nobody_serves_is_told(redis_url: str) -> None:
    """A worker of a release before: it knows the queue's own name alone."""
    old, new = made(redis_url, 1), made(redis_url, 4)
    async with working(old):
        await (await old.enqueue("send", 1)).result(10)
        await new.tasks["send"].enqueue_many([(number,) for number in range(40)])
        findings = [f for f in await new.run(_fleet("fastq")) if f.name == "queues"]
        assert [f.message for f in findings] == [
            "nobody serves mail:0, mail:1, mail:2, mail:3, and jobs are pending there"
        ]
    await new.aclose()


# -- operators -----------------------------------------------------------------------------------


async def test_an_operator_sees_one_queue(app: fastq.FastQ, redis_url: str) -> None:
    """F189: totals under its name, a line for each partition when it is named, and ``mail:2`` wherever a queue can be named."""
    await app.tasks["send"].enqueue_many([(number,) for number in range(60)])
    await app.options(delay=3_600).enqueue("send", 1)
    whole = command(redis_url, "queues", "ls")
    assert [(info["name"], info["pending"], info["scheduled"]) for info in whole] == [("mail", 60, 1)]
    parts = whole[0]["partitions"]
    assert [part["name"] for part in parts] == PARTS
    assert sum(part["pending"] for part in parts) == 60
    assert all(part["pending"] for part in parts)
    one = command(redis_url, "status", "mail:2")["queues"]
    assert [(info["name"], info["pending"]) for info in one] == [("mail:2", parts[2]["pending"])]
    table = CliRunner().invoke(root, ["status", "mail", "--redis-url", redis_url]).output
    assert [line.split()[0] for line in table.splitlines()[1:6]] == ["mail", *PARTS]
    assert await app.queue_length("mail") == 60
    assert len(command(redis_url, "jobs", "ls", "mail", "-n", "200")) == 60
    assert len(command(redis_url, "jobs", "ls", "mail:1", "-n", "200")) == parts[1]["pending"]
    pages = [command(redis_url, "jobs", "ls", "mail", "-n", "25", "--offset", str(at)) for at in (0, 25, 50, 75)]
    ids = [job["id"] for page in pages for job in page]
    assert (len(ids), len(set(ids))) == (60, 60)
    await app.aclose()


async def test_pause_resume_purge(app: fastq.FastQ, redis_url: str, raw: Any) -> None:
    """F186: the queue's name means all of it."""
    await app.tasks["send"].enqueue_many([(number,) for number in range(40)])
    assert await app.queues.pause("mail")
    assert not await app.queues.pause("mail")
    async with working(app):
        assert (await app.queues.info("mail")).paused  # type: ignore[union-attr]
        await app.enqueue("send", 100)
        await asyncio.sleep(0.1)  # nothing can be waited for: nothing happens
        assert ran(app) == []
        assert await app.queues.resume("mail")
        assert not await app.queues.resume("mail")
        await eventually_async(lambda: len(app.ran) == 41)  # type: ignore[attr-defined]
    assert await app.queues.pause(task="send")
    assert await app.queues.resume(task="send")
    await app.tasks["send"].enqueue_many([(number,) for number in range(40)])
    before = lengths(raw)
    assert await app.queues.purge("mail:1") == before.pop("mail:1")
    assert lengths(raw) == before, "one partition, and no other"
    assert await app.queues.purge("mail") == sum(before.values())
    assert lengths(raw) == {}
    await app.aclose()


async def test_dead_letters(app: fastq.FastQ, redis_url: str) -> None:
    """F297: one dead-letter queue, the latest first whatever its partition; replay and purge by id, or all of it."""
    jobs = [await app.enqueue("send", -1 - number) for number in range(30)]
    await drain(app)
    letters = await app.dead.list("mail", limit=200)
    assert {letter.id for letter in letters} == {job.id for job in jobs}
    assert [x.failed_at for x in letters] == sorted((x.failed_at for x in letters), reverse=True)
    paged = [x.id for at in range(0, 30, 7) for x in await app.dead.list("mail", offset=at, limit=7)]
    assert paged == [x.id for x in letters]
    assert [group.count for group in await app.dead.groups("mail")] == [30]
    shown = await app.run(app.inspector.dead_show(jobs[0].id, "mail"))
    assert shown is not None
    assert shown.queue == jobs[0].queue
    chosen = [job.id for job in jobs[:8]]
    assert await app.dead.replay("mail", ids=[*chosen, "nobody"]) == 8
    assert command(redis_url, "dlq", "replay", "mail", *chosen)["missing"] == chosen
    assert await app.dead.replay("mail", limit=12) == 12
    assert await app.dead.purge("mail", ids=[job.id for job in jobs]) == 10
    await drain(app)
    assert await app.dead.replay("mail", error="ValueError", limit=100) == 20
    assert await app.dead.purge("mail") == 0
    await app.aclose()


async def test_why_a_job_does_not_run(app: fastq.FastQ) -> None:
    """Asked for by its id; what stands before it is what stands before it in its partition."""
    job = await app.enqueue("send", 1)
    found = await app.explain(job.id, queue="mail")
    assert (found.queue, found.causes[0].code) == (job.queue, "no_worker")
    await app.queues.pause("mail")
    assert (await app.explain(job.id)).causes[0].code == "paused"
    await app.aclose()


async def test_tags_reach_all_partitions(app: fastq.FastQ) -> None:
    """Whatever they are in."""
    for number in range(20):
        await app.options(tags=["tenant:42"]).enqueue("send", number)
    assert await app.cancel_tag("tenant:42", queue="mail") == 20
    await app.aclose()


async def test_check_looks_into_partitions(app: fastq.FastQ, raw: Any) -> None:
    """I1 of every partition, and one that nobody has announced."""
    await app.tasks["send"].enqueue_many([(number,) for number in range(40)])
    found = await app.run(check("fastq", ["mail"]))
    assert (found.jobs, found.queues, found.faults) == (40, 5, [])
    raw.srem("fastq:queues", "mail:3")
    raw.lpop("fastq:{mail:2}:ready:5")
    codes = {(fault.queue, fault.code) for fault in (await app.run(check("fastq"))).faults}
    assert codes == {("mail:3", "unannounced"), ("mail:2", "lost")}
    found = await app.run(check("fastq", repair=True))
    assert {fault.state for fault in found.faults} == {"repaired"}
    assert raw.sismember("fastq:queues", "mail:3")
    assert sum(lengths(raw).values()) == 40
    await app.aclose()


# -- another number ------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 8), (8, 3), (4, 1)])
async def test_the_number_changes_and_nothing_is_lost(before: int, after: int, redis_url: str, raw: Any) -> None:
    """What was enqueued under another number is found by its id, and run by workers of the new one."""
    old, new = made(redis_url, before), made(redis_url, after)
    jobs = [await old.enqueue("send", number) for number in range(60)]
    jobs += [await new.enqueue("send", number) for number in range(60, 120)]
    for job in jobs[::7]:
        for app in (old, new):
            for queue in (None, "mail"):
                found = await app.get_status(job.id, queue=queue)
                assert found is not None
                assert (found.queue, found.state) == (job.queue, "pending")
    new.listed = frozenset(name.decode() for name in raw.smembers("fastq:queues"))  # as worker/process.py does
    async with working(new) as shop:
        assert {await shop_result(shop, job) for job in jobs} == set(range(120))
    assert ran(new) == list(range(120))
    for app in (old, new):
        await app.aclose()


async def shop_result(shop: Workshop, job: Any) -> int:
    status = await shop.ended(job)
    return int(status.result)


def test_totals_are_those_of_home_and_partitions(redis_url: str, raw: Any) -> None:
    """Jobs of before the split count, and a process that knows nothing of partitions sees them."""
    for number in (1, 4):
        app = made(redis_url, number)
        app.tasks["send"].enqueue_many_sync([(n,) for n in range(30)])
        app.close()
    stranger = fastq.FastQ(redis_url)
    info: QueueInfo | None = stranger.run_sync(Inspector("fastq").queue("mail"))
    assert info is not None
    assert info.pending == 60
    assert sum(part.pending for part in info.partitions) == 30
    stranger.close()
