"""Kit.advance: a week in a test. Delays, retries and schedules come due in their order; what lives for some time ends."""

from __future__ import annotations

import asyncio
import time

import pytest

import fastq
from fastq.broker import scripts
from fastq.broker.greeting import Clock
from fastq.testing import Kit
from fastq.testing.clock import moved

DAY = 86_400


def make_app() -> fastq.FastQ:
    return fastq.FastQ("memory://", default_max_attempts=5)


async def test_delays_and_retries_come_due_in_their_order():
    app, seen = make_app(), []
    kit = Kit(app)

    @app.task(retry=[10, 100, 1_000])
    async def flaky(fails: int) -> int:
        job = app.job()
        seen.append((round(kit.now() - start), f"flaky {job.attempt}"))
        if job.attempt <= fails:
            raise ConnectionError
        return job.attempt

    @app.task
    async def later(name: str) -> None:
        seen.append((round(kit.now() - start), name))

    async with kit:
        start = kit.now()
        job = await flaky.enqueue(3)
        await later.options(delay=5).enqueue("a")
        await later.options(delay=1_200).enqueue("c")
        await later.options(delay=50).enqueue("b")
        await later.options(delay=2 * DAY).enqueue("not yet")
        real = time.monotonic()
        done = await kit.advance(days=1)
        assert time.monotonic() - real < 20
        assert seen == [
            (0, "flaky 1"), (5, "a"), (10, "flaky 2"), (50, "b"), (110, "flaky 3"), (1_110, "flaky 4"), (1_200, "c"),
        ]  # fmt: skip
        assert (done.success, done.retried, done.failed) == (4, 3, 0)
        assert DAY <= kit.now() - start < DAY + 20
        status = await job.status()  # its record has lived for an hour
        assert status is None
        (left,) = kit.enqueued()
        assert left.args == ("not yet",)


async def test_schedules_fire_each_tick_at_its_time():
    app, ticks = make_app(), []
    kit = Kit(app)

    @app.cron("0 4 * * *")
    @app.every(12 * 3_600)
    @app.task
    async def report() -> None:
        ticks.append(round(kit.now()) % DAY // 3_600)

    async with kit:
        done = await kit.advance(days=7)
        assert done.success == len(ticks) == 21
        assert sorted(ticks) == [0] * 7 + [4] * 7 + [12] * 7
        again = await kit.advance(days=1)
        assert again.success == 3
        history = await app.schedules.history(next(name for name in app.periodic if "0 4" in name))
        assert len(history) == 8


async def test_what_lives_for_some_time_ends_also_when_it_was_made_after_a_move():
    """Results, unique keys, locks: by TTL, by instant, before the move and after it."""
    app = make_app()

    @app.task(unique=600)
    async def once(n: int) -> int:
        return n

    async with Kit(app) as kit:
        for _ in range(2):
            job = await once.enqueue(1)
            assert job.created
            assert not (await once.enqueue(1)).created
            await kit.drain()
            assert await job.result() == 1
            async with app.lock("door", timeout=60):
                with pytest.raises(fastq.JobAlreadyRunning):
                    async with app.lock("door"):
                        pass
            await kit.advance(minutes=50)
            assert await job.exists()
            await kit.advance(hours=1)
            assert not await job.exists()
            await kit.advance(days=30)


async def test_time_can_pass_without_anything_being_run():
    app = make_app()

    @app.task(expires=60)
    async def perishable() -> None: ...

    async with Kit(app) as kit:
        job = await perishable.enqueue()
        assert (await kit.advance(minutes=2, run=False)).total == 0
        assert (await kit.drain()).cancelled == 1
        status = await job.status()
        assert status is not None
        assert status.state == "cancelled"


def test_plain_functions_can_move_time():
    app = make_app()

    @app.task
    def add(a: int, b: int) -> int:
        return a + b

    with Kit(app) as kit:
        add.options(delay=3_600).enqueue_sync(1, 2)
        assert kit.advance_sync(minutes=59).total == 0
        assert kit.advance_sync(minutes=1).success == 1
        with pytest.raises(fastq.InvalidOption, match="cannot be moved by -1 seconds"):
            kit.advance_sync(seconds=-1)


def test_scripts_and_clocks_are_those_of_production_before_and_after():
    before = scripts.load, Clock.now_ms, Clock.now_us
    with Kit() as kit:
        kit.drain_sync()
        assert (scripts.load, Clock.now_ms, Clock.now_us) == before
        kit.advance_sync(days=1)
        assert scripts.load is not before[0]
    assert (scripts.load, Clock.now_ms, Clock.now_us) == before
    with Kit() as kit:
        assert abs(kit.now() - time.time()) < 5


@pytest.mark.parametrize("name", scripts.names())
def test_no_script_sees_the_real_time(name: str):
    """A command that takes or gives an instant, and that the moved scripts do not know of, would go unnoticed."""
    text = moved(scripts.expand(name)).partition("\nend\n")[2]
    for word in ("'TIME'", "'PEXPIREAT'", "'EXPIREAT'", "'PEXPIRETIME'", "'EXPIRETIME'", "PXAT", "EXAT"):
        assert f"redis.call({word}" not in text
        assert word in ("'TIME'", "'PEXPIREAT'", "'PEXPIRETIME'") or word not in text


async def test_a_century_of_hours_is_refused_and_a_busy_month_takes_seconds():
    app, count = make_app(), []

    @app.every(3_600)
    @app.task
    async def hourly() -> None:
        count.append(1)

    async with Kit(app) as kit:
        done = await asyncio.wait_for(kit.advance(days=30), 60)
        assert done.success == len(count) == 720
