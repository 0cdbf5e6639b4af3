"""Unique and idempotent tasks as users meet them: a real worker, real callers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

import fastq
from fastq import FastQ, Unique
from fastq.errors import DuplicateJob, InvalidOption, TaskDefinitionError
from tests.conftest import eventually_async
from tests.redis.workshop import working

runs: Counter[Any] = Counter()


@pytest.fixture
def app(redis_url: str) -> FastQ:
    runs.clear()
    return FastQ(redis_url, concurrency=10)


# -- keys ---------------------------------------------------------------------------------------------


async def test_the_same_arguments_are_the_same_call_however_they_are_given(app: FastQ) -> None:
    @app.task(unique="until_executed")
    async def send(to: str, subject: str = "hi") -> None: ...

    first = await send.enqueue("a")
    for same in (send.enqueue("a", "hi"), send.enqueue("a", subject="hi"), send.enqueue(to="a")):
        job = await same
        assert (job.id, job.created) == (first.id, False)
    assert (await app.enqueue("send", "a")).id == first.id
    assert (await send.enqueue("a", "bye")).created
    await app.aclose()


async def test_only_the_chosen_arguments_count(app: FastQ) -> None:
    @app.task(unique=Unique(by="user"))
    async def by_name(user: int, why: str) -> None: ...

    @app.task(unique=Unique(by=lambda arguments: arguments["user"] % 10))
    async def by_function(user: int, why: str) -> None: ...

    assert (await by_name.enqueue(1, "x")).id == (await by_name.enqueue(1, "y")).id
    assert (await by_name.enqueue(2, "x")).created
    assert (await by_function.enqueue(1, "x")).id == (await by_function.enqueue(11, "y")).id
    assert (await by_function.enqueue(2, "x")).created, "another task, another key"
    await app.aclose()


async def test_a_call_may_be_unique_where_the_task_is_not_and_the_other_way_round(app: FastQ) -> None:
    @app.task
    async def plain(n: int) -> None: ...

    @app.task(unique=True)
    async def once(n: int) -> None: ...

    assert (await plain.options(unique=True).enqueue(1)).created
    assert not (await plain.options(unique=True).enqueue(1)).created
    assert (await plain.enqueue(1)).created
    assert (await once.enqueue(1)).created
    assert not (await once.enqueue(1)).created
    assert (await once.options(unique=None).enqueue(1)).created
    assert (await app.options(unique=60).enqueue("elsewhere", a=1)).created
    assert not (await app.options(unique=60).enqueue("elsewhere", a=1)).created
    await app.aclose()


def test_blocking_code_and_bulk(app: FastQ) -> None:
    @app.task(unique=True)
    def once(n: int) -> None: ...

    first = once.enqueue_sync(1)
    assert once.enqueue_sync(1).id == first.id
    bulk = once.enqueue_many_sync([(1,), (2,), (2,)])
    assert (bulk.total, bulk.created) == (3, 1)
    assert bulk.ids == [first.id, bulk.ids[1], bulk.ids[1]]
    app.close()


# -- what a duplicate gets ---------------------------------------------------------------------------------


async def test_a_duplicate_is_an_error_for_those_who_want_it(app: FastQ) -> None:
    @app.task(unique=Unique(on_duplicate="raise"))
    async def once(n: int) -> None: ...

    job = await once.enqueue(1)
    with pytest.raises(DuplicateJob, match=r"'once'.*has the same unique key") as caught:
        await once.enqueue(1)
    assert caught.value.job_id == job.id
    with pytest.raises(DuplicateJob):
        await once.enqueue_many([(2,), (1,)])
    await app.aclose()


async def test_the_last_arguments_win_when_a_duplicate_replaces(app: FastQ) -> None:
    seen: list[str] = []

    @app.task(unique=Unique(by="user", on_duplicate="replace"))
    async def save(user: int, text: str) -> None:
        seen.append(text)

    job = await save.enqueue(1, "first")
    again = await save.enqueue(1, "last")
    assert (again.id, again.created) == (job.id, False)
    async with working(app) as shop:
        await shop.ended(job)
    assert seen == ["last"]


async def test_a_debounced_job_runs_once_after_the_last_call(app: FastQ) -> None:
    seen: list[int] = []

    @app.task(unique=Unique(by="user", debounce=0.2))
    async def rebuild(user: str, n: int) -> None:
        seen.append(n)

    async with working(app) as shop:
        jobs = [await rebuild.enqueue("u", n) for n in range(20)]
        assert len({job.id for job in jobs}) == 1
        status = await jobs[0].status()
        assert status is not None
        assert status.state == "scheduled"
        await shop.ended(jobs[0])
        assert seen == [19]
        assert (await rebuild.enqueue("u", 20)).created
        await app.cancel((await rebuild.enqueue("u", 21)).id)


async def test_until_it_is_started_a_job_that_runs_does_not_keep_the_next_one_out(app: FastQ) -> None:
    """The keep-last mode: one that runs, one that waits with the latest arguments."""
    started, go_on = asyncio.Event(), asyncio.Event()
    seen: list[int] = []

    @app.task(unique=Unique("until_started", by=(), on_duplicate="replace"))
    async def sync(n: int) -> None:
        seen.append(n)
        started.set()
        await go_on.wait()

    async with working(app) as shop:
        first = await sync.enqueue(1)
        await started.wait()
        shop.loop.set_quiet(True)
        second = await sync.enqueue(2)
        third = await sync.enqueue(3)
        assert (second.created, third.id) == (True, second.id)
        assert second.id != first.id
        shop.loop.set_quiet(False)
        go_on.set()
        await shop.ended(third)
    assert seen == [1, 3]


async def test_a_throttle_lets_one_call_through_in_its_time(app: FastQ, raw: Any) -> None:
    @app.task(unique=30)
    async def report() -> None:
        runs["report"] += 1

    async with working(app) as shop:
        job = await report.enqueue()
        await shop.ended(job)
        assert not (await report.enqueue()).created
        for key in raw.keys("*:unique:ttl:*"):
            raw.delete(key)
        await shop.ended(await report.enqueue())
    assert runs["report"] == 2


# -- idempotent ------------------------------------------------------------------------------------------------


async def test_concurrent_duplicates_execute_once_and_all_get_the_first_result(app: FastQ) -> None:
    """F306, F312."""

    @app.task(idempotent=86_400)
    async def charge(order: str, amount: float) -> str:
        runs[order] += 1
        await asyncio.sleep(0.05)
        return f"charged {amount} for {order}"

    other = FastQ(app.settings.url)  # another process's application, with its own connections
    other.include(app)
    app.attached = app
    async with working(app) as shop:
        jobs = await asyncio.gather(*(charge.enqueue("o-1", amount=9.5) for _ in range(50)))
        jobs += [await other.enqueue("charge", "o-1", 9.5), await asyncio.to_thread(charge.enqueue_sync, "o-1", 9.5)]
        assert len({job.id for job in jobs}) == 1
        assert sum(job.created for job in jobs) == 1
        for job in jobs:
            assert (await shop.ended(job)).result == "charged 9.5 for o-1"
        late = await charge.enqueue("o-1", 9.5)
        assert (late.created, (await shop.ended(late)).result) == (False, "charged 9.5 for o-1")
        await other.aclose()
        app.close()
    assert runs == {"o-1": 1}


async def test_a_key_of_the_callers_own(app: FastQ) -> None:
    """F305, F312: the key decides, not the arguments."""

    @app.task
    async def charge(order: str, amount: float) -> float:
        runs[order] += 1
        return amount

    key = fastq.make_idempotency_key("charge", ("o-1",), {"amount": 9.5})
    async with working(app) as shop:
        first = await charge.options(idempotency_key=key).enqueue("o-1", amount=9.5)
        await shop.ended(first)
        again = await charge.options(idempotency_key=key).enqueue("o-1", amount=10.0)
        assert (again.id, (await shop.ended(again)).result) == (first.id, 9.5)
        assert runs["o-1"] == 1
        assert (await charge.enqueue("o-1", amount=9.5)).created


async def test_the_result_is_kept_as_long_as_the_key(app: FastQ, raw: Any) -> None:
    @app.task(idempotent=7 * 86_400, result_ttl=60)
    async def charge() -> int:
        return 7

    async with working(app) as shop:
        await shop.ended(await charge.enqueue())
        (bucket,) = raw.zrange("fastq:{default}:done", 0, -1)
        assert int(bucket.partition(b":")[0]) == 7 * 86_400_000


def test_the_idempotency_key_of_the_document() -> None:
    """F305: `idem:` and the SHA-256 of sorted JSON, as reference 004 writes it."""
    import hashlib
    import json

    payload = json.dumps({"task": "charge", "args": ("o-1",), "kwargs": {"amount": 9.5}}, sort_keys=True)
    assert fastq.make_idempotency_key("charge", ("o-1",), {"amount": 9.5}) == (
        f"idem:{hashlib.sha256(payload.encode()).hexdigest()}"
    )
    assert fastq.make_idempotency_key("t", (1,), {"a": 1, "b": 2}) == fastq.make_idempotency_key(
        "t", [1], {"b": 2, "a": 1}
    )
    assert fastq.make_idempotency_key("t", ({1},)).startswith("idem:")


async def test_a_worker_that_dies_does_not_make_a_second_run_for_a_duplicate(app: FastQ, raw: Any) -> None:
    """F312 over a lost lease: the job is run again, being the same job, and no duplicate is stored meanwhile."""
    begun = asyncio.Event()

    @app.task(idempotent=True)
    async def charge(order: str) -> str:
        runs[order] += 1
        begun.set()
        if runs[order] == 1:
            await asyncio.sleep(60)
        return "charged"

    async with working(app, grace=0.0) as shop:
        job = await charge.enqueue("o")
        await begun.wait()
        raw.zrem("fastq:{default}:workers", shop.name)  # as if its host were gone
        from fastq.broker.commands import recover

        options: dict[str, Any] = {"charge": "all", "max_deliveries": 3, "dead_max": 9}
        await shop.helper.call(recover(app.keys("default"), shop.name, expired=False, **options))
        again = await charge.enqueue("o")
        assert (again.id, again.created) == (job.id, False)
        assert (await shop.ended(job)).result == "charged"
        assert await eventually_async(lambda: runs["o"] == 2)


# -- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unique": "until_excuted"}, "did you mean 'until_executed'"),
        ({"unique": 0}, "unique=0 must be a number of seconds"),
        ({"unique": True, "idempotent": 60}, "choose one"),
        ({"idempotent": "soon"}, "idempotent='soon' must be"),
    ],
)
def test_a_task_that_cannot_be_unique_like_that(app: FastQ, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskDefinitionError, match=message):

        @app.task(**options)
        async def task() -> None: ...


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": 60, "on_duplicate": "replace"}, "nothing to replace"),
        ({"until": 60, "debounce": 5}, "nothing to replace"),
        ({"on_duplicate": "drop"}, "on_duplicate='drop' is not one of"),
        ({"at_most": 5}, "at_most is for debounce"),
        ({"debounce": -1}, "debounce=-1 must be"),
    ],
)
def test_a_rule_that_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        Unique(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unique": Unique(by="usr")}, "unique by 'usr'.*did you mean 'user'"),
        ({"unique": Unique(by=lambda arguments: object())}, "cannot be encoded"),
        ({"idempotency_key": ""}, "idempotency_key='' is not a text"),
        ({"idempotency_key": "k", "unique": True}, "choose one"),
    ],
)
async def test_a_call_that_cannot_be_unique_like_that(app: FastQ, options: Mapping[str, Any], message: str) -> None:
    @app.task
    async def task(user: int) -> None: ...

    with pytest.raises(InvalidOption, match=message):
        await task.options(**options).enqueue(1)


# -- while running -------------------------------------------------------------------------------------------------


async def test_any_number_may_wait_but_one_at_a_time_runs(app: FastQ) -> None:
    """F311: a run is never overlapped by another one with the same arguments; others go on beside it."""
    now: Counter[int] = Counter()
    most: Counter[int] = Counter()

    @app.task(unique=Unique("while_running", by="account"))
    async def sync(account: int, why: str) -> None:
        now[account] += 1
        most[account] = max(most[account], now[account])
        runs[account] += 1
        await asyncio.sleep(0.02)
        now[account] -= 1

    async with working(app) as shop:
        jobs = [await sync.enqueue(account, why) for why in "abc" for account in (1, 2)]
        assert all(job.created for job in jobs)
        for job in jobs:
            assert (await shop.ended(job, 30)).state == "success"
    assert (most, runs) == ({1: 1, 2: 1}, {1: 3, 2: 3})


async def test_while_running_is_for_tasks(app: FastQ) -> None:
    with pytest.raises(TaskDefinitionError, match="give one of both"):

        @app.task(unique="while_running", concurrency=3)
        async def both() -> None: ...

    @app.task
    async def plain() -> None: ...

    with pytest.raises(InvalidOption, match="an option of a task"):
        await plain.options(unique="while_running").enqueue()
    with pytest.raises(InvalidOption, match="lets every job in"):
        Unique("while_running", on_duplicate="raise")
