"""Bulk enqueue: the next group is made while Redis takes the last one in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from fastq import FastQ
from fastq.errors import InvalidArguments, QueueFull

READY = "fastq:{default}:ready:5"
GROUP = 2_000


@pytest.fixture
def app(redis_url: str) -> Iterator[FastQ]:
    app = FastQ(redis_url)
    yield app
    app.close()


async def test_a_group_is_stored_while_the_next_one_is_made(app: FastQ, raw: Any) -> None:
    """The generator of the third group sees the first one in Redis already."""
    stored: list[int] = []

    @app.task
    async def take(n: int) -> None: ...

    def numbers() -> Iterator[tuple[int]]:
        for n in range(3 * GROUP):
            if n == 2 * GROUP:
                stored.append(raw.llen(READY))
            yield (n,)

    bulk = await take.enqueue_many(numbers())
    assert (bulk.total, bulk.created, len(set(bulk.ids))) == (3 * GROUP, 3 * GROUP, 3 * GROUP)
    assert stored[0] >= GROUP
    assert raw.llen(READY) == 3 * GROUP
    first = raw.lrange(READY, 0, -1)
    assert [each.decode() for each in first] == bulk.ids  # in the order of the calls
    await app.aclose()


async def test_what_was_sent_before_a_faulty_item_is_stored(app: FastQ, raw: Any) -> None:
    """Whoever catches the error finds the whole groups before it in Redis, and nothing of its own group."""

    @app.task
    async def take(n: int) -> None: ...

    items: list[Any] = [(n,) for n in range(2 * GROUP + 500)]
    items[2 * GROUP + 100] = ("not a number",)
    with pytest.raises(InvalidArguments, match="'n'"):
        await take.enqueue_many(items)
    assert raw.llen(READY) == 2 * GROUP
    await app.aclose()


async def test_a_bounded_queue_says_how_many_it_took(app: FastQ, raw: Any) -> None:
    """Its groups go one after the other: for those of the next one there may be no room."""
    app.queue("default", max_pending=2_500)

    @app.task
    async def take(n: int) -> None: ...

    with pytest.raises(QueueFull) as caught:
        await take.enqueue_many((n,) for n in range(3 * GROUP))
    assert caught.value.enqueued == raw.llen(READY) == 2_500
    await app.aclose()


async def test_a_cancelled_bulk_leaves_nothing_behind(app: FastQ, raw: Any) -> None:
    """No future that nobody reads, no job half written; the application goes on."""

    @app.task
    async def take(n: int) -> None: ...

    async def items() -> Any:
        for n in range(10 * GROUP):
            if n % GROUP == 0:
                await asyncio.sleep(0)
            yield (n,)

    bulk = asyncio.create_task(take.enqueue_many(items()))
    while raw.llen(READY) < GROUP:
        await asyncio.sleep(0)
    bulk.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bulk
    job = await take.enqueue(1)
    assert raw.hexists("fastq:{default}:jobs", job.id)
    assert raw.llen(READY) == raw.hlen("fastq:{default}:jobs")
    await app.aclose()
