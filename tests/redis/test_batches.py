"""``enqueue_batch``: many jobs from any iterable, in steps, with progress, spread over a window (F130, F132)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

import fastq
from fastq.batches import BatchResult
from fastq.errors import InvalidOption
from tests.redis.lab import Lab


@pytest.fixture
def app(redis_url: str) -> Iterator[fastq.FastQ]:
    app = fastq.FastQ(redis_url)

    @app.task
    def send(user: int, content: str = "") -> None: ...

    yield app
    app.close()


async def test_a_batch_of_keywords(app: fastq.FastQ, lab: Lab) -> None:
    """F130: items of keyword arguments; .total and .enqueued; progress after each step."""
    told: list[tuple[int, int]] = []

    def tell(result: BatchResult) -> None:
        told.append((result.total, result.enqueued))

    items = [{"user": n, "content": "x"} for n in range(25)]
    result = await app.enqueue_batch("send", items, batch_size=10, progress=tell)
    assert (result.total, result.enqueued) == (25, 25)
    assert told == [(10, 10), (20, 20), (25, 25)]
    assert lab.ready() == result.ids
    await app.aclose()


def test_a_generator_is_taken_step_by_step(app: fastq.FastQ, lab: Lab) -> None:
    """F132: never more than one step in memory; what comes before a faulty item is stored."""
    taken: list[int] = []

    def users() -> Iterator[tuple[int]]:
        for n in range(30):
            taken.append(n)
            yield (n,)

    seen: list[int] = []
    result = app.enqueue_batch_sync(
        "send", users(), batch_size=7, progress=lambda _: seen.append(len(taken)), ids=False
    )
    assert (result.total, result.enqueued, result.ids) == (30, 30, [])
    assert seen == [7, 14, 21, 28, 30]
    with pytest.raises(fastq.InvalidArguments):
        app.enqueue_batch_sync("send", [(1,), (2,), ("three",)], batch_size=2)
    assert len(lab.jobs()) == 32


async def test_jobs_are_spread_evenly_over_a_window(app: fastq.FastQ, lab: Lab) -> None:
    result = await app.enqueue_batch("send", [(n,) for n in range(10)], spread=1_000)
    due = dict(lab.value("due"))
    assert lab.ready() == result.ids[:1]
    times = [due[job] for job in result.ids[1:]]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(99_000 <= gap <= 101_000 for gap in gaps)
    await app.aclose()


async def test_what_cannot_be_done_is_told_first(app: fastq.FastQ, lab: Lab) -> None:
    for options in ({"batch_size": 0}, {"batch_size": 10_001}, {"spread": -1}):
        with pytest.raises(InvalidOption):
            await app.enqueue_batch("send", [(1,)], **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="give a list"):
        await app.enqueue_batch("send", iter([(1,)]), spread=5)
    with pytest.raises(InvalidOption, match="mappings"):
        await app.enqueue_batch("send", ["x"])  # type: ignore[list-item]
    assert lab.keys() == {}
    await app.aclose()
