"""job.spawn: a running job adds to its workflow; once, whatever dies."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import fastq
from fastq import FastQ
from fastq.broker import flows
from fastq.cli.workflow import draw
from fastq.errors import FastQError, InvalidArguments, InvalidOption
from fastq.workflow import spawning
from tests.redis.workshop import working


class Forest:
    """Handlers that add to the workflow they are in."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.app = app = FastQ(url, concurrency=20, default_max_attempts=2, **settings)
        self.runs: list[Any] = []
        self.said: list[BaseException] = []
        self.gate = asyncio.Event()
        forest = self

        @app.task
        async def crawl(number: int, job: fastq.JobContext) -> int:
            forest.runs.append(number)
            for link in (2 * number, 2 * number + 1) if number < 8 else ():
                await job.spawn(crawl.s(link), join=True)
            if number == 3 and forest.runs.count(3) == 1:
                raise fastq.Retry("the first run fails behind its additions", delay=0)
            return number

        @app.task
        async def total(values: list[int]) -> int:
            return sum(values)

        @app.task
        async def add(work: str, job: fastq.JobContext) -> list[str]:
            made = {
                "chord": lambda: fastq.chord([leaf.s(n) for n in range(3)], total.s()),
                "wide": lambda: fastq.group(leaf.s(n) for n in range(1_000)),
                "fails": lambda: fail.s(),
                "wrong": lambda: leaf.s("x"),
                "no work": lambda: 7,
                "empty": lambda: fastq.group(),
            }[work.removesuffix(" joined")]
            try:
                return await job.spawn(made(), join=work.endswith("joined"))  # type: ignore[arg-type]
            except FastQError as error:
                forest.said.append(error)
                return []

        @app.task
        def named(word: str, job: fastq.JobContext) -> int:
            for key in (word, "b", word):
                job.spawn_sync(leaf.s(1), key=key)
            return len(word)

        @app.task
        async def leaf(number: int) -> int:
            forest.runs.append(("leaf", number))
            return number

        @app.task(max_attempts=1)
        async def fail() -> None:
            raise ValueError("rotten")

        @app.task
        async def late(job: fastq.JobContext) -> None:
            await forest.gate.wait()
            try:
                await job.spawn(leaf.s(1))
            except FastQError as error:
                forest.said.append(error)

        self.crawl, self.total, self.add, self.named, self.late, self.leaf = crawl, total, add, named, late, leaf


@pytest.fixture
def forest(redis_url: str) -> Forest:
    return Forest(redis_url)


async def test_a_header_that_grows(forest):
    """What joins is waited for, at any depth; a run that fails behind its additions does not add them twice."""
    async with working(forest.app):
        flow = await fastq.chord([forest.crawl.s(1)], forest.total.s()).enqueue()
        assert await flow.result(20) == sum(range(1, 16))
        status = await flow.wait(10)
    assert (status.state, status.total, status.success) == ("success", 16, 16)
    assert sorted(forest.runs) == sorted([*range(1, 16), 3])


async def test_what_is_added_beside_is_waited_for_by_the_end_alone(forest):
    async with working(forest.app):
        flow = await fastq.chain(forest.add.s("chord"), forest.leaf.si(9)).enqueue()
        assert await flow.result(20) == 9
        status = await flow.wait(10)
        keys = forest.app.keys("default")
        found = await forest.app.run(flows.view(keys, flow.id))
        children = await forest.app.run(flows.edges(keys, flow.id, len(found.letters)))
        ids = await forest.app.wait_for(f"{flow.id}.0")
    assert (status.state, status.total) == ("success", 6)
    assert ids.result == [f"{flow.id}.{node}" for node in (2, 3, 4, 6)]
    assert draw(found, children) == [
        "add  [0]  success",
        "leaf  [1]  success",
        "    ├ leaf ×3  [2-4]  success  added by 0",
        "  ├ total  [6]  success",
    ]


async def test_an_addition_that_fails_counts(forest):
    async with working(forest.app):
        flow = await fastq.group(forest.add.s("fails")).enqueue()
        status = await flow.wait(20)
    assert (status.state, status.total, status.success, status.failed) == ("failed", 2, 1, 1)


async def test_many_at_once(forest):
    async with working(forest.app):
        flow = await fastq.chord([forest.add.s("wide joined")], forest.leaf.si(0)).enqueue()
        status = await flow.wait(30)
    assert (status.state, status.total) == ("success", 1_002)
    assert len(forest.runs) == 1_001
    assert forest.runs[-1] == ("leaf", 0)


async def test_keys_name_additions(forest):
    """F-60: two of one name are one; spawn_sync."""
    async with working(forest.app):
        flow = await fastq.group(forest.named.s("a")).enqueue()
        status = await flow.wait(20)
    assert (status.state, status.total) == ("success", 3)


@pytest.mark.parametrize(
    ("work", "error", "match"),
    [
        ("wrong", InvalidArguments, "leaf"),
        ("no work", InvalidOption, "spawn takes"),
        ("chord joined", InvalidOption, "no group whose list"),
    ],
)
async def test_what_cannot_be_added_is_said(forest, work, error, match):
    async with working(forest.app):
        flow = await fastq.chain(forest.add.s(work), forest.leaf.si(1)).enqueue()
        status = await flow.wait(20)
    assert (status.state, status.total) == ("success", 2)
    assert isinstance(forest.said[0], error)
    with pytest.raises(error, match=match):
        raise forest.said[0]


async def test_nothing_can_be_added_outside_of_a_workflow_or_to_one_that_is_cancelled(forest):
    async with working(forest.app):
        job = await forest.late.enqueue()
        flow = await fastq.group(forest.late.s()).enqueue()
        await asyncio.sleep(0)
        while (await forest.app.get_status(f"{flow.id}.0")).state != "running":
            await asyncio.sleep(0.01)
        await flow.cancel()
        forest.gate.set()
        assert (await flow.wait(20)).state in ("cancelled", "success")
        await job.result(10)
    said = " ".join(map(str, forest.said))
    assert len(forest.said) == 2
    assert "is no part of a workflow" in said
    assert "has ended, or was cancelled" in said


async def test_what_is_added_is_signed(redis_url):
    forest = Forest(redis_url, signing_keys="k1=" + "0" * 64)
    async with working(forest.app):
        flow = await fastq.chain(forest.add.s("chord"), forest.leaf.si(9)).enqueue()
        status = await flow.wait(20)
    assert (status.state, status.success) == ("success", 6)


async def test_a_group_of_nothing(forest):
    async with working(forest.app):
        flow = await fastq.chord([forest.add.s("empty joined")], forest.leaf.si(5)).enqueue()
        assert await flow.result(20) == 5


async def test_an_attempt_may_die_at_any_command(forest):
    """The next one finds the room that was made, and what was written; it may also want something else (F-60)."""
    app, keys = forest.app, forest.app.keys("default")
    first, other = fastq.chord([forest.leaf.s(n) for n in range(3)], forest.total.s()), fastq.group(forest.leaf.s(7))
    for cut in range(6):
        for again in (first, other):
            flow = await fastq.group(forest.leaf.s(n) for n in range(2)).enqueue()
            operation = spawning(keys, f"{flow.id}.1", "1", first, join=True)
            reply, step = None, 0
            while step < cut:
                try:
                    command = operation.send(reply)
                except StopIteration:
                    break
                reply, step = await app.run(_one(command)), step + 1
            ids = await app.run(spawning(keys, f"{flow.id}.1", "1", again, join=True))
            assert ids == await app.run(spawning(keys, f"{flow.id}.1", "1", again, join=True))
            async with working(app):
                status = await flow.wait(20)
                assert status.state == "success"
                assert await flow.result() == [0, 1, 3 if len(ids) > 1 else [7]]


def _one(command: Any) -> Any:
    return (yield command)


async def test_a_workflow_has_its_bounds(forest, monkeypatch):
    monkeypatch.setattr("fastq.workflow.MOST_NODES", 6)
    async with working(forest.app):
        flow = await fastq.chain(forest.add.s("chord"), forest.leaf.si(9)).enqueue()
        assert await flow.result(20) == 9
    assert "more than 6" in str(forest.said[0])
