"""Bounded queues: what becomes of one job too many, by the script and by those who enqueue."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

import fastq
from fastq import FastQ
from fastq.broker import commands
from fastq.broker.commands import Bound, NewJob, Parked, Refused
from fastq.errors import DuplicateJob, QueueFull, TaskDefinitionError
from fastq.job import decode_record
from tests.redis.lab import FAR, Lab, envelope
from tests.redis.workshop import working

RAISE, DROP = "raise", "drop_oldest"


def command(lab: Lab, most: int, *jobs: str | NewJob, when: str = RAISE, priority: int = 5, sequence: int = 1) -> Any:
    new = [NewJob(job, envelope(priority)) if isinstance(job, str) else job for job in jobs]
    return commands.enqueue(lab.q, priority, "bounded", sequence, new, Bound(most, when, 60_000))


# -- the script -----------------------------------------------------------------------------------------


def test_as_many_as_there_is_room_for(lab: Lab) -> None:
    lab.enqueue("a")
    first, second = lab.twice(command(lab, 3, "b", "c", "d", "e"))
    assert first == second == [Refused(2, "full", b""), Refused(3, "full", b"")]
    assert lab.ready() == ["a", "b", "c"]
    assert lab.jobs() == {"a", "b", "c"}


def test_what_was_refused_for_several_reasons_is_said_again(lab: Lab) -> None:
    """A lost reply: nobody waits for an id that was never stored."""
    unique = [NewJob(name, envelope(), unique="k") for name in "uv"]
    later = NewJob("later", envelope(), FAR)
    first, second = lab.twice(command(lab, 2, *unique, "a", "b", later, "a", "c"))
    assert first == [
        Refused(1, "unique", b"u"),
        Refused(3, "full", b""),
        Refused(5, "exists", b""),
        Refused(6, "full", b""),
    ]
    assert second == first
    assert lab.ready() == ["u", "a"]
    assert [name for name, _ in lab.value("due")] == ["later"]


def test_only_pending_jobs_count(lab: Lab) -> None:
    lab.take("running", "parked")
    lab.call(commands.park(lab.q, "w", [Parked("parked", "x/~all", 1, FAR)]))
    lab.enqueue(NewJob("later", envelope(), FAR))
    lab.enqueue("cancelled", "low", priority=0)
    assert lab.call(commands.cancel(lab.q, "cancelled", ["w"], b"", 0)) == "cancelled"
    assert lab.call(command(lab, 2, "a", "b")) == [Refused(1, "full", b"")]


def test_the_oldest_of_the_lowest_priority_goes(lab: Lab) -> None:
    """Its record, its unique key and those who wait for it go as those of any cancelled job."""
    lab.enqueue("high", priority=10)
    lab.enqueue("ghost", NewJob("low", envelope(0), unique="k"), priority=0)
    lab.enqueue("normal")
    lab.call(commands.cancel(lab.q, "ghost", [], b"", 0))
    lab.call(commands.follow(lab.q, "told:1", ["low"], FAR))
    again = NewJob("again", envelope(), unique="k")
    assert lab.twice(command(lab, 2, "a", again, when=DROP)) == ([], [])
    assert lab.ready() == ["high", "a", "again"]
    assert lab.value("unique") == {"k": b"again"}
    assert lab.value("awaited") is None
    assert lab.value("ghosts") is None
    (bucket,) = [name for name in list(lab.keys()) if name.startswith("done:")]
    records = {name: decode_record(data) for name, data in lab.value(bucket).items()}
    assert set(records) == {"low", "normal"}
    assert {record.state for record in records.values()} == {"cancelled"}
    assert "max_pending" in str(records["low"].error)


def test_nothing_goes_for_a_job_of_lower_priority(lab: Lab) -> None:
    lab.enqueue("high", priority=10)
    assert lab.call(command(lab, 1, "a", when=DROP)) == [Refused(0, "full", b"")]
    assert lab.call(command(lab, 1, "b", when=DROP, priority=10, sequence=2)) == []
    assert lab.ready() == ["b"]


def test_a_batch_larger_than_the_queue(lab: Lab) -> None:
    """The last ones stay."""
    assert lab.call(command(lab, 2, *"abcde", when=DROP)) == []
    assert lab.ready() == ["d", "e"]


# -- for those who enqueue ------------------------------------------------------------------------------


@pytest.fixture
def app(redis_url: str) -> Iterator[FastQ]:
    app = FastQ(redis_url, queues="small,default", enqueue_timeout=0.3)
    yield app
    app.close()


def small(app: FastQ, **options: Any) -> Any:
    app.queue("small", **options)

    @app.task(queue="small")
    async def work(n: int) -> int:
        return n

    return work


async def test_one_too_many_is_an_error(app: FastQ) -> None:
    """The others are stored, in their order; other queues have no bound."""
    work = small(app, max_pending=3)
    with pytest.raises(QueueFull, match=r"'small'.*max_pending") as caught:
        await work.enqueue_many([(n,) for n in range(5)])
    assert caught.value.enqueued == 3
    with pytest.raises(QueueFull, match="was not stored"):
        await work.enqueue(9)
    with pytest.raises(QueueFull):
        work.enqueue_sync(9)
    with pytest.raises(QueueFull):
        work.enqueue_many_sync([(9,)])
    assert await app.queue_length("small") == 3
    await work.options(delay=60).enqueue(1)
    await work.options(queue="default").enqueue(1)
    first = await work.options(queue="default", unique="until_executed").enqueue(7)
    assert first.created
    await app.aclose()


async def test_a_bound_counts_from_when_it_is_declared(app: FastQ) -> None:
    """Also for an event loop that has enqueued to the queue before."""

    @app.task(queue="small")
    async def work(n: int) -> None: ...

    await work.enqueue(1)
    app.queue("small", max_pending=1)
    with pytest.raises(QueueFull):
        await work.enqueue(2)
    with pytest.raises(QueueFull):
        work.enqueue_sync(3)
    await app.aclose()


async def test_a_duplicate_needs_no_room(app: FastQ) -> None:
    work = small(app, max_pending=1)
    once = work.options(unique="until_executed")
    first = await once.enqueue(1)
    assert (await once.enqueue(1)).id == first.id
    with pytest.raises(QueueFull):
        await once.enqueue(2)
    with pytest.raises(DuplicateJob):
        await work.options(unique=fastq.Unique(on_duplicate="raise")).enqueue(1)
    await app.aclose()


async def test_the_caller_waits_for_room(app: FastQ) -> None:
    """Back-pressure: 60 jobs through a queue of 5, none lost, and never more than 5 pending."""
    app.adopt(msgspec.structs.replace(app.settings, enqueue_timeout=10.0))
    done: list[int] = []
    app.queue("small", max_pending=5, when_full="wait")

    @app.task(queue="small")
    async def work(n: int) -> None:
        done.append(n)

    lengths: list[int] = []

    async def watch() -> None:
        while len(done) < 60:
            lengths.append(await app.queue_length("small"))
            await asyncio.sleep(0.001)

    many = asyncio.create_task(work.enqueue_many([(n,) for n in range(30)]))
    each = asyncio.create_task(_one_by_one(work, range(30, 45)))
    thread = threading.Thread(target=lambda: work.enqueue_many_sync([(n,) for n in range(45, 60)]))
    thread.start()
    async with working(app):
        await asyncio.wait_for(watch(), 20)
    assert (await many).created == 30
    await each
    thread.join(10)
    assert sorted(done) == list(range(60))
    assert max(lengths) <= 5
    await app.aclose()


async def _one_by_one(work: Any, numbers: range) -> None:
    for n in numbers:
        await work.enqueue(n)


async def test_nobody_waits_for_ever(app: FastQ) -> None:
    work = small(app, max_pending=1, when_full="wait")
    await work.enqueue(1)
    with pytest.raises(QueueFull):
        await work.enqueue(2)
    with pytest.raises(QueueFull):
        work.enqueue_sync(3)
    assert app.queue_length_sync("small") == await app.queue_length("small") == 1
    assert app.purge_queue_sync("small") == 1
    assert app.queue_length_sync("small") == 0
    await app.aclose()


async def test_the_newest_jobs_stay(app: FastQ) -> None:
    work = small(app, max_pending=2, when_full="drop_oldest")
    jobs = [await work.enqueue(n) for n in range(4)]
    assert [(await job.status()).state.value for job in jobs] == ["cancelled"] * 2 + ["pending"] * 2
    explained = await app.explain(jobs[0].id)
    assert explained.causes[0].code == "finished"
    assert "max_pending" in explained.causes[0].text
    async with working(app):
        assert await jobs[3].result(timeout=5) == 3
    await app.aclose()


@pytest.mark.parametrize(
    "options",
    [
        {"max_pending": 0},
        {"max_pending": True},
        {"max_pending": 1.5},
        {"max_pending": 5, "when_full": "explode"},
        {"when_full": "wait"},
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(TaskDefinitionError, match="queue 'small'"):
        FastQ("redis://nowhere").queue("small", **options)


def test_a_library_brings_its_bound() -> None:
    library, app = fastq.Tasks(), FastQ("redis://nowhere")
    library.queue("small", max_pending=5)
    app.include(library)
    assert app.bound("small") == Bound(5, "raise", 3_600_000)
    assert app.bound("default") is None
    with pytest.raises(TaskDefinitionError, match="another max_pending"):
        app.queue("small", max_pending=6)


async def test_a_workflow_learns_of_a_dropped_job(app: FastQ) -> None:
    work = small(app, max_pending=1, when_full="drop_oldest")
    flow = await fastq.chain(work.s(1), work.s()).enqueue()
    await work.enqueue(2)
    status = await flow.status()
    assert (status.state, status.cancelled, status.skipped) == ("failed", 1, 1)
    await app.aclose()
