"""How an idle worker is woken: the token and the jobs come in one reply, and what gets lost on the way is found."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastq import FastQ, JobContext, Retry
from fastq.broker.command import raw as command
from fastq.broker.connection import AsyncConnection
from fastq.worker import ticker, waker
from tests.redis.workshop import Workshop, working


class Sent:
    """The scripts that one connection sends, in their order; everything goes through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, connection: AsyncConnection) -> None:
        self.names: list[str] = []
        for name in ("send", "send_all", "post"):
            monkeypatch.setattr(connection, name, self._spied(getattr(connection, name)))

    def _spied(self, method: Any) -> Any:
        def spy(what: Any, *rest: Any, **how: Any) -> Any:
            self.names += [
                command.script or command.args[0] for command in (what if isinstance(what, list) else [what])
            ]
            return method(what, *rest, **how)

        return spy


def make_app(url: str, **settings: Any) -> FastQ:
    return FastQ(url, **{"concurrency": 10, "result_ttl": 0, **settings})


async def blocked(shop: Workshop) -> None:
    """Until the worker waits in Redis."""
    there = command("EXISTS", shop.app.keys("default").jobs)
    while b"blocked_clients:1" not in (await shop.helper.call_many([there, command("INFO", "clients")]))[1]:
        await asyncio.sleep(0.001)


async def armed(shop: Workshop) -> None:
    """Until it does so with a reserve behind the blocking pop."""
    await blocked(shop)
    while not shop.loop._waker.armed:
        await asyncio.sleep(0.001)


def transport_of(shop: Workshop, connection: Any) -> Any:
    """Of a connection; in a cluster, of that to the queue's node."""
    node = connection.place(shop.app.keys("default").jobs)
    wire = (connection if node is None else connection._links[node])._wire
    assert wire is not None
    return wire.transport


async def test_an_idle_worker_gets_the_job_with_the_token(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From enqueue to handler the worker needs no round trip of its own: no reserve is sent after the token."""
    app = make_app(redis_url)
    ran: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

    @app.task
    async def note() -> None:
        ran.set_result(loop.names + waiting.names)

    async with working(app) as shop:
        await armed(shop)
        loop, waiting = Sent(monkeypatch, shop.connection), Sent(monkeypatch, shop.waker)
        await note.enqueue()
        assert await ran == []  # what brought the job had been sent before there was one
        while "settle" not in loop.names:
            await asyncio.sleep(0.001)
        assert set(loop.names) == {"settle"}  # twice when Redis did not know the script yet


async def rounds(shop: Workshop, count: int) -> None:
    """Until so many more pops have ended, and the next one waits."""
    enough = shop.loop._waker.arrivals + count
    async with asyncio.timeout(10):
        while shop.loop._waker.arrivals < enough:
            await asyncio.sleep(0.001)
        await armed(shop)


@pytest.mark.one_server("SCRIPT FLUSH goes to one node")
async def test_scripts_that_go_while_it_waits(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reserve is refused and sent again by its text; nothing came, its loop sleeps on, and it waits on."""
    monkeypatch.setattr(waker, "IDLE_WAIT", 0.05)
    app = make_app(redis_url)
    ran = asyncio.Event()

    @app.task
    async def note() -> None:
        ran.set()

    async with working(app) as shop:
        await armed(shop)
        await rounds(shop, 2)  # that nothing is left over which would have it wait once more
        await shop.helper.call(command("SCRIPT", "FLUSH"))
        await rounds(shop, 2)
        await note.enqueue()
        async with asyncio.timeout(10):
            await ran.wait()


async def test_jobs_of_a_lost_reply_of_the_waiting_reserve_are_found(redis_url: str, raw: Any) -> None:
    """F-33: Redis has handed out the job, and the connection breaks before this worker hears of it."""
    app = make_app(redis_url)
    runs: list[int] = []

    @app.task
    async def note(n: int) -> None:
        runs.append(n)

    async with working(app) as shop:
        await armed(shop)
        transport_of(shop, shop.waker).pause_reading()
        await note.enqueue(1)
        while raw.scard(app.keys("default").running(shop.name)) < 2:  # the worker's own mark, and the job
            await asyncio.sleep(0.001)
        assert runs == []
        shop.waker.drop("cut by the test")
        while not runs:
            await asyncio.sleep(0.001)
        while raw.hlen("fastq:{default}:jobs") > 1:
            await asyncio.sleep(0.005)
        assert shop.slot.busy == 0
    assert runs == [1]


async def test_jobs_that_cannot_be_taken_end_the_worker(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come in a callback of the connection: a bug there must not be the connection's, which would be made anew for ever."""
    app = make_app(redis_url)
    shop = Workshop(app)

    def fail(*_: object) -> None:
        raise RuntimeError("a bug of the worker")

    running = asyncio.create_task(shop.loop.run())
    await armed(shop)
    monkeypatch.setattr(shop.loop, "_take_in", fail)
    await app.enqueue("anything")
    with pytest.raises(RuntimeError, match="a bug of the worker"):
        await asyncio.wait_for(running, 10)
    await shop.helper.close()
    await app.aclose()


async def test_cuts_of_both_connections_lose_and_double_nothing(redis_url: str, raw: Any) -> None:
    """F-33: jobs that come one by one, so that most are taken by the waiting reserve; the connections are cut in turns."""
    app = make_app(redis_url, concurrency=5)
    runs: dict[int, int] = {}

    @app.task
    async def count(n: int) -> None:
        runs[n] = runs.get(n, 0) + 1

    total = 400
    async with working(app) as shop:
        await armed(shop)
        for n in range(total):
            await count.enqueue(n)
            if n % 40 == 20:
                (shop.waker if n % 80 == 20 else shop.connection).drop("cut by the test")
        while len(runs) < total or raw.hlen("fastq:{default}:jobs") > 1:
            await asyncio.sleep(0.005)
    assert set(runs.values()) == {1}


async def test_a_partly_busy_worker_is_sure_of_what_it_holds(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two connections see the count of held jobs at different moments: that alone never makes it ask Redis for the ids."""
    app = make_app(redis_url, concurrency=20)
    gate, ran = asyncio.Event(), 0

    @app.task
    async def wait() -> None:
        await gate.wait()

    @app.task
    async def note() -> None:
        nonlocal ran
        ran += 1

    async with working(app) as shop:
        await wait.enqueue_many([()] * 5)
        while shop.loop._runs.free > 15:
            await asyncio.sleep(0.001)
        sent = Sent(monkeypatch, shop.connection)
        for _ in range(40):
            await asyncio.gather(*(note.enqueue() for _ in range(8)), *(note.enqueue() for _ in range(3)))
        while ran < 440:
            await asyncio.sleep(0.001)
        gate.set()
        assert "resume" not in sent.names


async def test_what_comes_to_a_quiet_worker_goes_back_at_once(redis_url: str, raw: Any) -> None:
    """F241: told to take nothing new while its reserve waits in Redis, it gives the job to others, uncharged."""
    app = make_app(redis_url)
    runs: list[str] = []

    @app.task
    async def note() -> None:
        runs.append("ran")

    async with working(app) as shop:
        await armed(shop)
        shop.loop.set_quiet(True)
        await note.enqueue()
        while raw.llen("fastq:{default}:ready:5") != 1 or raw.scard(app.keys("default").running(shop.name)) > 1:
            await asyncio.sleep(0.001)
        assert runs == []
        shop.loop.set_quiet(False)
        while not runs:
            await asyncio.sleep(0.001)


async def test_more_queues_than_slots_are_not_hoarded(redis_url: str, raw: Any) -> None:
    """One slot, three queues, one long job in each: the two that do not run stay where another worker finds them."""
    app = make_app(redis_url, concurrency=1, queues="a,b,c")
    gate = asyncio.Event()

    @app.task
    async def wait() -> None:
        await gate.wait()

    async with working(app) as shop:
        await blocked(shop)
        for queue in "abc":
            await wait.options(queue=queue).enqueue()
        while not shop.loop.executor.running:
            await asyncio.sleep(0.001)
        assert sum(raw.llen(f"fastq:{{{queue}}}:ready:5") for queue in "abc") == 2
        gate.set()
        while sum(raw.hlen(f"fastq:{{{queue}}}:jobs") for queue in "abc") > 3:
            await asyncio.sleep(0.005)


async def test_a_job_that_comes_back_before_the_reply_to_its_outcome_runs_once_more(redis_url: str, raw: Any) -> None:
    """I2: an outcome lets its job run again at once, and the waiting reserve brings it before the outcome's own reply is there.

    The reply is about the run before: it must not make this worker forget that it holds the job, or it would find it a
    second time, and run it beside itself.
    """
    app = make_app(redis_url, concurrency=5)
    first, second = asyncio.Event(), asyncio.Event()
    runs: list[int] = []

    @app.task(max_attempts=9)
    async def again(job: JobContext) -> None:
        runs.append(job.attempt)
        if job.attempt == 1:
            await first.wait()
            raise Retry(delay=0)
        await second.wait()

    @app.task
    async def other() -> None:
        return None

    async with working(app) as shop:
        await shop.ended(await other.enqueue())  # Redis knows the scripts from now on
        await armed(shop)
        await again.enqueue()
        while not runs:
            await asyncio.sleep(0.001)
        await armed(shop)
        transport = transport_of(shop, shop.connection)
        transport.pause_reading()
        first.set()
        while len(runs) < 2:
            await asyncio.sleep(0.001)
        transport.resume_reading()
        for _ in range(5):
            await shop.ended(await other.enqueue())
        assert runs == [1, 2]
        second.set()
    assert runs == [1, 2]
    assert raw.hlen("fastq:{default}:jobs") == 0


async def test_an_idle_worker_looks_at_deadlines_as_soon_as_it_has_one(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rests long between two ticks; a job that comes meanwhile is interrupted in time nevertheless."""
    monkeypatch.setattr(ticker, "until_beat", lambda: 3_600.0)
    app = make_app(redis_url)
    ended: list[str] = []

    @app.task(timeout=0.05, max_attempts=1)
    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("interrupted")

    async with working(app) as shop:
        await armed(shop)
        for n in range(3):
            await forever.enqueue()
            while len(ended) <= n:
                await asyncio.sleep(0.005)
