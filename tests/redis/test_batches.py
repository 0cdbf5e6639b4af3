"""``enqueue_batch``: many jobs from any iterable, in steps, with progress, spread over a window (F130, F132)."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from click import UsageError
from click.testing import CliRunner

import fastq
from fastq.batches import BatchResult
from fastq.broker import batches
from fastq.cli.batch import line, verbs
from fastq.cli.session import NotFound
from fastq.errors import BatchClosed, InvalidOption, UnknownBatch, WaitTimeout
from fastq.testing.eager import eagerly
from tests.redis.lab import Lab
from tests.redis.workshop import Workshop, working


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


# -- what belongs together (issue 6.1) ----------------------------------------------------------


class Shop:
    """An application whose handlers write down what they did."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.app = app = fastq.FastQ(url, **{"concurrency": 20, "default_max_attempts": 1} | settings)
        self.called: list[tuple[str, ...]] = []
        self.gate = asyncio.Event()
        called = self.called

        @app.task
        async def work(n: int) -> int:
            if n == 13:
                raise ValueError("bad luck")
            return n

        @app.task(result_ttl=0)
        async def hold(n: int) -> None:
            await self.gate.wait()

        @app.task(result_ttl=0, expires=0.001)
        async def late(n: int) -> None: ...

        @app.task(unique="until_executed")
        async def once(n: int) -> None: ...

        @app.task
        async def tell(*words: str) -> None:
            called.append(words)

        @app.task(queue="elsewhere")
        async def far(batch: str) -> None: ...

        self.tell, self.far = tell, far

    async def settled(self, shop: Workshop, count: int) -> list[tuple[str, ...]]:
        """What was called once nothing is left."""
        while len(self.called) < count or await self.app.queue_length() or shop.loop.executor.running:
            await asyncio.sleep(0.005)
        return sorted(self.called)


@pytest.fixture
def shop(redis_url: str) -> Shop:
    return Shop(redis_url)


async def test_a_batch_that_succeeds(shop: Shop) -> None:
    """Counts, a pushed wait, on_complete and on_success once, and not on_failure; later by its id."""
    calls = {f"on_{which}": shop.tell.s(which) for which in ("complete", "success", "failure")}
    async with working(shop.app) as worker:
        batch = await shop.app.enqueue_batch("work", [(n,) for n in range(10)], batch_size=3, **calls)
        status = await batch.wait(10)
        assert status is not None
        assert (status.state, status.total, status.success, status.pending, status.running) == ("success", 10, 10, 0, 0)
        assert (status.task, status.queue, status.percent, status.incomplete) == ("work", "default", 100.0, False)
        assert status.started_at <= status.filled_at <= status.finished_at
        assert await shop.settled(worker, 2) == [(batch.id, "complete"), (batch.id, "success")]
        again = await shop.app.batch(batch.id).status()
        assert again == status
        assert await shop.app.batch(batch.id, queue="default").wait(10) == status
        assert batch.ids == [f"{batch.id}-{n}" for n in range(10)]
        assert await shop.app.batch("0" * 24).status() is None
        assert await shop.app.batch("0" * 24).wait(1) is None


async def test_a_batch_with_a_failure(shop: Shop) -> None:
    """One dead letter: on_complete and on_failure; a replay changes nothing, and calls nobody again."""
    async with working(shop.app) as worker:
        batch = await shop.app.enqueue_batch(
            "work", [(n,) for n in range(20)], on_failure=shop.tell.si("no"), on_complete=shop.tell.s()
        )
        status = await batch.wait(10)
        assert status is not None
        assert (status.state, status.success, status.failed) == ("failed", 19, 1)
        assert await batch.failed() == [f"{batch.id}-13"]
        assert await shop.settled(worker, 2) == sorted([(batch.id,), ("no",)])
        assert await shop.app.dead.replay() == 1
        replayed = await shop.app.wait_for(f"{batch.id}-13", timeout=10)
        assert replayed is not None
        assert replayed.state == "failed"
        assert await batch.status() == status
        assert len(await shop.settled(worker, 2)) == 2


async def test_an_empty_batch_is_a_success_at_once(shop: Shop) -> None:
    async with working(shop.app) as worker:
        batch = await shop.app.enqueue_batch("work", [], on_success=shop.tell.s())
        status = await batch.status()
        assert status is not None
        assert (status.state, status.total, status.percent) == ("success", 0, 100.0)
        assert await shop.settled(worker, 1) == [(batch.id,)]


async def test_what_expires_or_leaves_no_trace_is_no_success(shop: Shop) -> None:
    """An expired job with result_ttl=0 leaves nothing, and yet its batch knows that it did not run."""
    batch = await shop.app.enqueue_batch("late", [(n,) for n in range(5)])
    await asyncio.sleep(0.01)
    async with working(shop.app):
        status = await batch.wait(10)
    assert status is not None
    assert (status.state, status.cancelled, status.success) == ("failed", 5, 0)


async def test_what_was_there_before_does_not_count(shop: Shop) -> None:
    await shop.app.enqueue("once", 1)
    batch = await shop.app.enqueue_batch("once", [(1,), (2,), (2,), (3,)])
    assert (batch.total, batch.enqueued) == (4, 2)
    async with working(shop.app):
        status = await batch.wait(10)
    assert status is not None
    assert (status.state, status.total, status.success) == ("success", 2, 2)


async def test_cancel_ends_all_of_it(shop: Shop) -> None:
    """Pending jobs at once, running ones as their handlers are interrupted; on_complete, and neither of the others."""
    calls = {f"on_{which}": shop.tell.s(which) for which in ("complete", "success", "failure")}
    async with working(shop.app) as worker:
        batch = await shop.app.enqueue_batch("hold", [(n,) for n in range(200)], **calls)
        while (status := await batch.status()) is None or not status.running:
            await asyncio.sleep(0.005)
        assert status.pending + status.running == 200
        assert await batch.cancel(terminate=True)
        status = await batch.wait(10)
        assert status is not None
        assert (status.state, status.cancelled, status.total) == ("cancelled", 200, 200)
        assert await shop.settled(worker, 1) == [(batch.id, "complete")]
        assert not await batch.cancel() or (await batch.status()) == status


async def test_a_faulty_item_ends_the_filling(shop: Shop) -> None:
    """The batch is incomplete: what it has runs, and it ends as failed whatever comes of that."""

    def items() -> Iterator[Any]:
        yield from [(1,), (2,)]
        yield ("three",)

    async with working(shop.app) as worker:
        with pytest.raises(fastq.InvalidArguments) as caught:
            await shop.app.enqueue_batch(
                "work", items(), batch_size=2, on_failure=shop.tell.s(), on_success=shop.tell.s()
            )
        note = caught.value.__notes__[0]
        batch = shop.app.batch(note.split()[1])
        status = await batch.wait(10)
        assert status is not None
        assert (status.state, status.total, status.success, status.incomplete) == ("failed", 2, 2, True)
        assert await shop.settled(worker, 1) == [(batch.id,)]


async def test_a_producer_that_died_leaves_a_batch_that_can_be_seen_and_ended(shop: Shop, lab: Lab) -> None:
    """It is filling, and complete for nobody, until somebody says that no more is coming."""
    known: list[str] = []

    class Died(BaseException):
        """As SIGKILL, nothing is done about it."""

    class Endless:
        def __iter__(self) -> Iterator[tuple[int]]:
            yield from ((n,) for n in range(4))
            known.extend(name for name, _ in lab.value("groups"))
            filling.close_for_nobody()
            raise Died

    class Filling:
        def close_for_nobody(self) -> None:
            """Nobody closes: what the producer would say at its end is lost."""
            shop.app.run = lost  # type: ignore[method-assign]

    async def lost(operation: Any) -> None:
        operation.close()

    filling, run = Filling(), shop.app.run
    async with working(shop.app) as worker:
        with pytest.raises(Died):
            await shop.app.enqueue_batch("work", Endless(), batch_size=2, on_complete=shop.tell.s())
        shop.app.run = run  # type: ignore[method-assign]
        batch = shop.app.batch(known[0])
        while (status := await batch.status()) is None or status.success < 4:
            await asyncio.sleep(0.005)
        assert (status.state, status.final, status.filled_at is not None) == ("filling", False, True)
        assert not shop.called
        with pytest.raises(WaitTimeout):
            await batch.wait(0.05)
        assert await batch.close()
        status = await batch.wait(10)
        assert status is not None
        assert (status.state, status.incomplete) == ("failed", True)
        assert await shop.settled(worker, 1) == [(batch.id,)]
        assert not await batch.close()


async def test_a_batch_that_was_ended_takes_no_more(shop: Shop, lab: Lab) -> None:
    def items() -> Iterator[tuple[int]]:
        yield from ((n,) for n in range(3))
        assert shop.app.batch(lab.value("groups")[0][0]).close_sync()
        yield (4,)

    with pytest.raises(BatchClosed, match="takes no more"):
        await shop.app.enqueue_batch("work", items(), batch_size=3)
    assert len(lab.jobs()) == 3
    await shop.app.aclose()
    shop.app.close()


async def test_callbacks_may_come_late(shop: Shop) -> None:
    """One that is named after the end is enqueued at once; one that has missed its end, never; there is one of each."""
    async with working(shop.app) as worker:
        batch = await shop.app.enqueue_batch("work", [(1,)])
        await batch.wait(10)
        assert await batch.on_complete(shop.tell.s("complete"))
        assert await batch.on_success(shop.tell.s("success"))
        assert not await batch.on_failure(shop.tell.s("failure"))
        assert await shop.settled(worker, 2) == [(batch.id, "complete"), (batch.id, "success")]
        with pytest.raises(InvalidOption, match="another on_complete"):
            await batch.on_complete(shop.tell.s("again"))
        with pytest.raises(InvalidOption, match="queue 'default'"):
            await batch.on_failure(shop.far.s())
        with pytest.raises(InvalidOption, match="not 'tell'"):
            await batch.on_failure("tell")  # type: ignore[arg-type]
        with pytest.raises(UnknownBatch):
            await shop.app.batch("0" * 24).on_complete(shop.tell.s())
        await shop.app.enqueue_batch("work", [], on_complete=shop.far.options(queue="default").s())


def test_blocking_code_does_the_same(shop: Shop) -> None:
    """From a thread beside the worker: enqueue, wait, status, callbacks, cancel."""
    told: list[Any] = []

    def client() -> None:
        batch = shop.app.enqueue_batch_sync("work", [(n,) for n in range(15)], on_complete=shop.tell.s())
        told.extend(
            (batch.wait_sync(10), batch.status_sync(), batch.failed_sync(), batch.on_failure_sync(shop.tell.s()))
        )
        held = shop.app.enqueue_batch_sync("hold", [(n,) for n in range(3)])
        told.extend((held.cancel_sync(terminate=True), held.wait_sync(10), held.close_sync()))

    async def main() -> None:
        async with working(shop.app) as worker:
            await asyncio.to_thread(client)
            await shop.settled(worker, 2)

    asyncio.run(main())
    done, status, failed, called, cancelled, held, closed = told
    assert done == status
    assert (done.state, done.success, failed) == ("failed", 14, [f"{done.id}-13"])
    assert (called, cancelled, held.state, held.cancelled, closed) == (True, True, "cancelled", 3, False)


async def test_jobs_of_no_batch_are_not_looked_at(shop: Shop, lab: Lab) -> None:
    """While no batch and no workflow lives, settling costs the same commands as ever: one look at `groups`."""
    async with working(shop.app) as worker:
        before = lab.raw.info("commandstats")
        handles = [await shop.app.enqueue("work", 1) for _ in range(3)]
        for handle in handles:
            await worker.ended(handle)
        after = lab.raw.info("commandstats")
    for word in ("bitfield", "hincrby"):
        assert after.get(f"cmdstat_{word}", {}).get("calls", 0) == before.get(f"cmdstat_{word}", {}).get("calls", 0)


async def test_eager_jobs_are_a_batch_of_their_own(shop: Shop, lab: Lab) -> None:
    """fastq.testing: they run where they are enqueued, and so do the callbacks; nothing is left in Redis."""
    with eagerly(shop.app):
        batch = await shop.app.enqueue_batch(
            "work", [(1,), (2,)], on_success=shop.tell.s(), on_failure=shop.tell.s("no")
        )
    assert (batch.enqueued, shop.called) == (2, [(batch.id,)])
    assert lab.keys() == {}


# -- fastq batch ----------------------------------------------------------------------------------


def batch_verb(lab: Lab, *words: str) -> Any:
    """`fastq batch` on this server."""
    return CliRunner().invoke(verbs["batch"], [*words, "--redis-url", lab.url], standalone_mode=False)


async def test_the_command_line_tells_and_ends(shop: Shop, lab: Lab) -> None:
    """A list of what is under way, one batch with its bar, --close and --cancel; the exit status says how it ended."""
    assert batch_verb(lab).output == "no batch is under way\n"
    first = await shop.app.enqueue_batch("work", [(n,) for n in range(4)])
    second = shop.app.batch("f" * 24, queue="default")
    fields = {"task": "work", "ttl": 60_000}
    await shop.app.run(batches.open_(lab.q, second.id, fields, b"fastq:queues", 0))
    lab.raw.hset(lab.q.batch(second.id), "started", 1)
    listed = batch_verb(lab).output
    assert re.search(rf"{first.id}  default  work  running +4 +4 +0 +0 +0 +0 ", listed)
    assert re.search(rf"{second.id}  default  work  filling ", listed)
    one = batch_verb(lab, first.id).output.splitlines()
    assert one[1] == f"[{'.' * 30}]   0%  running  0 of 4"
    assert one[2] == "4 jobs pending, 0 running"
    assert "if its producer died" in batch_verb(lab, second.id).output
    closed = batch_verb(lab, second.id, "--close")
    assert (closed.return_value, "incomplete" in closed.output) == (0, True)
    assert batch_verb(lab, second.id).return_value == 1
    told = batch_verb(lab, first.id, "--cancel", "--json")
    assert (told.return_value, json.loads(told.output)["state"]) == (0, "cancelled")
    for words, error in ((["--watch"], UsageError), (["0" * 24], NotFound)):
        assert isinstance(batch_verb(lab, *words).exception, error)
    assert f"{first.id}  " not in batch_verb(lab).output
    await shop.app.aclose()


async def test_the_command_line_watches(shop: Shop, lab: Lab) -> None:
    """--watch ends with the batch."""
    async with working(shop.app):
        batch = await shop.app.enqueue_batch("hold", [(n,) for n in range(3)])
        watching = asyncio.create_task(asyncio.to_thread(batch_verb, lab, batch.id, "--watch"))
        while not lab.raw.info("commandstats").get("cmdstat_sscan"):
            await asyncio.sleep(0.005)
        shop.gate.set()
        answer = await watching
        assert answer.exception is None, answer
    assert (answer.return_value, answer.output.splitlines()[1]) == (0, f"[{'#' * 30}] 100%  success  3 of 3")


def test_one_line() -> None:
    status = fastq.BatchStatus(
        id="", queue="", task="", state="running", total=1_000, success=400, failed=20, cancelled=80
    )
    assert line(status, 50.0).endswith("50%  running  500 of 1,000, 20 failed, 80 cancelled, 50/s, 10.0s left")
    filling = fastq.BatchStatus(id="", queue="", task="", state="filling", total=10)
    assert line(filling, 0.0).endswith("0%  filling  0 of 10+, 0/s")
