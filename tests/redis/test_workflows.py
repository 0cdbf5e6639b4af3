"""Workflows run by a real worker: what flows where, and how they end (F115-F121, F-59, F-61)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import fastq
from fastq import FastQ
from fastq.broker import flows
from fastq.cli.workflow import draw
from fastq.errors import InvalidArguments, InvalidOption, JobCancelled, JobFailed, ResultExpired, UnknownTask
from fastq.workflow import MOST_DEPTH
from tests.redis.workshop import working


class Kitchen:
    """An application whose handlers write down what they did."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.app = app = FastQ(url, **{"concurrency": 20, "default_max_attempts": 1} | settings)
        self.ran: list[Any] = []
        self.gate = asyncio.Event()
        self.broken = True
        ran = self.ran

        @app.task
        async def add(a: int, b: int = 1) -> int:
            ran.append(("add", a, b))
            return a + b

        @app.task
        def total(values: list[int]) -> int:
            ran.append(("total", sorted(values)))
            return sum(values)

        @app.task
        async def show(value: Any = None, word: str = "") -> Any:
            ran.append((word, value))
            return value

        @app.task
        async def fail(value: Any = None) -> Any:
            ran.append(("fail", value))
            if self.broken:
                raise ValueError("no salt")
            return 7

        @app.task
        async def hold(value: int) -> int:
            await self.gate.wait()
            return value

        @app.task(result_ttl=0)
        async def quiet(value: int) -> int:
            return value

        @app.task
        async def large() -> str:
            return "x" * 2_000_000

        self.add, self.total, self.show, self.fail, self.hold = add, total, show, fail, hold
        self.quiet, self.large = quiet, large


@pytest.fixture
def kitchen(redis_url: str) -> Kitchen:
    return Kitchen(redis_url)


async def test_what_one_returns_is_the_first_argument_of_the_next(kitchen):
    """F116."""
    async with working(kitchen.app):
        flow = await fastq.chain(kitchen.add.s(1, 2), kitchen.add.s(10), kitchen.add.s(b=100)).enqueue()
        assert await flow.result(10) == 113
        status = await flow.wait(10)
    assert (status.state, status.total, status.success, status.waiting) == ("success", 3, 3, 0)


async def test_a_chain_of_any_iterable(kitchen):
    async with working(kitchen.app):
        flow = await fastq.chain(kitchen.add.s(*((1,) if n == 0 else ())) for n in range(3)).enqueue()
        assert await flow.result(10) == 4


async def test_immutable_signatures_take_nothing(kitchen):
    async with working(kitchen.app):
        flow = await fastq.chain(kitchen.add.s(1, 2), kitchen.add.si(5, 5)).enqueue()
        assert await flow.result(10) == 10


async def test_a_chain_of_calls_by_name_runs_in_sequence(kitchen):
    """F115: as reference 001 spells it; each call gets the arguments that it names."""
    async with working(kitchen.app):
        flow = await kitchen.app.chain(
            [("show", (), {"word": "validate"}), ("show", ("x",), {"word": "pay"}), ("show", (), {"word": "confirm"})]
        )
        await flow.wait(10)
    assert kitchen.ran == [("validate", None), ("pay", "x"), ("confirm", None)]


async def test_a_group_returns_the_list_in_its_order(kitchen):
    """F117."""
    async with working(kitchen.app):
        flow = await fastq.group(kitchen.add.s(i) for i in range(30)).enqueue()
        assert await flow.result(10) == list(range(1, 31))


async def test_a_chord_calls_back_once_with_the_list(kitchen):
    """F118, F-60."""
    async with working(kitchen.app):
        flow = await fastq.chord([kitchen.add.s(i) for i in range(30)], kitchen.total.s()).enqueue()
        assert await flow.result(10) == sum(range(1, 31))
    assert [ran for ran in kitchen.ran if ran[0] == "total"] == [("total", list(range(1, 31)))]


async def test_nested(kitchen):
    """F119: chain(chord(...), notify.s(kw=…)), and lists within lists."""
    add, show, total = kitchen.add, kitchen.show, kitchen.total
    async with working(kitchen.app):
        flow = await fastq.chain(
            fastq.chord([add.s(1), fastq.chain(add.s(2), add.s(3))], total.s()), show.s(word="mail")
        ).enqueue()
        assert await flow.result(10) == 8
        nested = await fastq.group(add.s(1), fastq.group(add.s(2), fastq.group()), fastq.chain(add.s(3))).enqueue()
        assert await nested.result(10) == [2, [3, []], 4]
        between = await fastq.chain(
            add.s(1), fastq.group(add.s(10), add.s(20)), fastq.group(show.s(), show.s())
        ).enqueue()
        assert await between.result(10) == [[12, 22], [12, 22]]
    assert ("mail", 8) in kitchen.ran


async def test_fifty_deep(kitchen):
    work: Any = kitchen.add.s(0)
    for _ in range(25):
        work = fastq.chord([work], kitchen.total.s())
    for _ in range(25):
        work = fastq.group(work)
    async with working(kitchen.app):
        value = await (await work.enqueue()).result(20)
    for _ in range(25):
        (value,) = value
    assert value == 1


async def test_a_group_of_nothing_ends_at_once(kitchen):
    """F-59: a group with 0 parents fires at once."""
    async with working(kitchen.app):
        assert await (await fastq.chord([], kitchen.total.s()).enqueue()).result(10) == 0
        assert await (await fastq.chain(kitchen.add.s(1), fastq.group(), kitchen.show.s()).enqueue()).result(10) == []


async def test_a_graph_of_ones_own(kitchen):
    add, show = kitchen.add, kitchen.show
    wf = kitchen.app.workflow("diamond")
    top = wf.add(add.s(1))
    left, right = wf.add(add.s(10), after=[top]), wf.add(add.s(20), after=top)
    wf.add(show.s(word="bottom"), after=[left, right])
    async with working(kitchen.app):
        flow = await wf.enqueue()
        assert await flow.result(10) == [12, 22]
        assert (await flow.status()).name == "diamond"


async def test_a_chain_stops_at_a_failure(kitchen):
    """F121, F-59: what is behind does not run, the workflow has failed, and can be looked at."""
    async with working(kitchen.app):
        flow = await fastq.chain(kitchen.add.s(1), kitchen.fail.s(), kitchen.show.s()).enqueue(
            on_failure=kitchen.show.s(word="error")
        )
        with pytest.raises(JobFailed, match=r"ValueError: no salt"):
            await flow.result(10)
        status = await flow.status()
        assert (status.state, status.success, status.failed, status.skipped) == ("failed", 1, 1, 1)
        job = await kitchen.app.get_status(f"{flow.id}.1")
        assert (job.state, job.error_message) == ("failed", "no salt")
        await kitchen.app.wait_for(f"{flow.id}.failure", queue="default", timeout=10)
    assert kitchen.ran == [("add", 1, 1), ("fail", 2), ("error", flow.id)]


@pytest.mark.parametrize(
    ("on_error", "state", "seen"),
    [("fail", "failed", None), ("continue", "failed", [2, "excuse", 4]), ("ignore", "success", [2, 4])],
)
async def test_a_chord_with_a_failing_header(kitchen, on_error, state, seen):
    """F120, F-59: defined for each policy; the callback is always decided."""
    header = [kitchen.add.s(1), kitchen.fail.s(), kitchen.add.s(3)]
    async with working(kitchen.app):
        flow = await fastq.chord(header, kitchen.show.s(word="back")).enqueue(on_error=on_error)
        status = await flow.wait(10)
    assert (status.state, status.failed) == (state, 1)
    back = [value for word, value in (ran[:2] for ran in kitchen.ran) if word == "back"]
    if seen is None:
        assert back == []
        assert status.skipped == 1
    else:
        excuse = {"job": f"{flow.id}.1", "error": "ValueError: no salt"}
        assert back == [[excuse if value == "excuse" else value for value in seen]]


async def test_a_failed_one_is_sent_on(kitchen):
    """workflow.retry(): from the failed jobs; what has succeeded does not run again."""
    async with working(kitchen.app):
        flow = await fastq.chord([kitchen.add.s(1), kitchen.fail.s()], kitchen.total.s()).enqueue()
        assert (await flow.wait(10)).state == "failed"
        kitchen.broken = False
        assert await flow.retry() == 1
        assert await flow.result(10) == 9
        assert await flow.retry() == 0
    assert [ran[0] for ran in kitchen.ran] == ["add", "fail", "fail", "total"]


async def test_a_dead_letter_that_is_replayed_changes_no_workflow(kitchen):
    """A replay runs the job; the workflow that has ended stays as it is, and nothing runs twice."""
    async with working(kitchen.app):
        flow = await fastq.chain(kitchen.fail.s(), kitchen.show.s(word="next")).enqueue()
        assert (await flow.wait(10)).state == "failed"
        kitchen.broken = False
        assert await kitchen.app.dead.replay(ids=[f"{flow.id}.0"]) == 1
        job = await kitchen.app.wait_for(f"{flow.id}.0", queue="default", timeout=10)
        assert job.state == "success"
        assert (await flow.status()).state == "failed"
    assert "next" not in [ran[0] for ran in kitchen.ran]


async def test_cancel_goes_down(kitchen):
    async with working(kitchen.app):
        flow = await fastq.chord([kitchen.hold.s(i) for i in range(30)], kitchen.total.s()).enqueue()
        assert await flow.cancel(terminate=True)
        with pytest.raises(JobCancelled):
            await flow.result(10)
        status = await flow.status()
        assert (status.state, status.active, status.cancelled, status.skipped) == ("cancelled", 0, 30, 1)
        assert not await flow.cancel()


async def test_a_workflow_is_asked_for_by_its_id_as_a_job_is(redis_url):
    """get_status, wait_for and cancel take a workflow's id, whatever its queue."""
    kitchen = Kitchen(redis_url, queues="other")
    app = kitchen.app
    async with working(app):
        flow = await fastq.group(kitchen.hold.s(1), kitchen.add.s(2)).enqueue(name="two", queue="other")
        while (status := await app.get_status(flow.id)) is None or status.progress.current < 1:
            await asyncio.sleep(0.01)
        assert (status.queue, status.state, status.task, status.progress.total) == ("other", "running", "two", 2)
        assert await app.cancel(flow.id, terminate=True)
        ended = await app.wait_for(flow.id, timeout=10)
        assert ended.state == "cancelled"
        status = await app.get_status(flow.id)
        assert (status.state, status.progress.current) == ("cancelled", 2)
        assert not await app.cancel(flow.id)
        assert await app.get_status("0" * 24) is None


async def test_one_that_waits_is_cancelled(kitchen):
    """app.cancel of a job that waits for its parents: it and what is behind it do not run; the workflow ends as with a failure."""
    flow = await fastq.chain(kitchen.show.s(1), kitchen.show.si(2), kitchen.show.si(3)).enqueue()
    assert await kitchen.app.cancel(f"{flow.id}.1") is True
    assert await kitchen.app.cancel(f"{flow.id}.1") is False, "once"
    status = await kitchen.app.get_status(f"{flow.id}.1")
    assert (status.state, status.task) == ("cancelled", "show")
    assert (await flow.status()).state == "running"
    async with working(kitchen.app):
        ended = await flow.wait(10)
        assert (ended.state, ended.success, ended.cancelled, ended.skipped) == ("failed", 1, 1, 1)
        assert await kitchen.app.cancel(f"{flow.id}.2") is False, "nobody will run it"


async def test_one_that_waits_is_cancelled_in_a_group_that_goes_on(kitchen):
    """on_error="ignore": the callback gets the results of the others, once; also of one cancelled while its parent runs."""
    line = fastq.chain(kitchen.show.s(5), kitchen.show.si(6))
    flow = await fastq.chord([kitchen.show.s(1), line, kitchen.show.s(2)], kitchen.show.s(word="sum")).enqueue(
        on_error="ignore"
    )
    statuses = {n: await kitchen.app.get_status(f"{flow.id}.{n}") for n in range(6)}
    waiting = min(n for n, status in statuses.items() if status is not None and status.state == "waiting")
    assert await kitchen.app.cancel(f"{flow.id}.{waiting}")
    async with working(kitchen.app):
        ended = await flow.wait(10)
        assert (ended.state, ended.cancelled) == ("success", 1)
        assert await flow.result(10) == [1, 2]


async def test_a_job_behind_others_is_waiting(kitchen):
    async with working(kitchen.app):
        flow = await fastq.chain(kitchen.hold.s(1), kitchen.add.s(1)).enqueue()
        waiting = await kitchen.app.get_status(f"{flow.id}.1", queue="default")
        assert (waiting.state, waiting.task) == (fastq.JobState.WAITING, "add")
        following = asyncio.create_task(kitchen.app.wait_for(f"{flow.id}.1", queue="default", timeout=10))
        kitchen.gate.set()
        assert (await following).result == 2
        assert await flow.result(10) == 2


async def test_a_result_that_cannot_be_kept_is_a_failure(kitchen):
    async with working(kitchen.app):
        flow = await fastq.chain(kitchen.large.s(), kitchen.show.s()).enqueue()
        with pytest.raises(JobFailed, match="was not kept"):
            await flow.result(10)


async def test_results_are_pinned_until_they_are_taken(kitchen):
    """F-61: a task without records of its own hands its result on all the same; later it is a clear error."""
    async with working(kitchen.app):
        flow = await fastq.chain(kitchen.quiet.s(5), kitchen.show.s()).enqueue(result_ttl=1)
        assert await flow.result(10) == 5
        assert await kitchen.app.get_status(f"{flow.id}.0", queue="default") is None


async def test_inputs_that_are_gone_are_a_clear_error(kitchen, raw):
    """F-61."""
    app = kitchen.app
    async with working(app):
        flow = await fastq.chain(kitchen.add.s(1), kitchen.hold.s()).enqueue()
        await app.wait_for(f"{flow.id}.0", queue="default", timeout=10)
        await flow.cancel(terminate=True)
        await flow.wait(10)
        lost = await fastq.chain(kitchen.add.s(1), kitchen.fail.s()).enqueue()
        await lost.wait(10)
        raw.delete(app.keys("default").flow(lost.id), app.keys("default").flow_states(lost.id))
        await app.dead.replay(ids=[f"{lost.id}.1"])
        status = await app.wait_for(f"{lost.id}.1", queue="default", timeout=10)
        assert "have expired" in status.error_message
        with pytest.raises(ResultExpired):
            await lost.result(10)


async def test_it_is_drawn_as_a_tree(kitchen):
    """fastq workflow ID: neighbours that are alike share a line, what comes together is not indented."""
    add, app = kitchen.add, kitchen.app
    async with working(app):
        header = [*(add.s(i) for i in range(3)), kitchen.fail.si()]
        flow = await fastq.chain(add.s(1), fastq.chord(header, kitchen.total.s())).enqueue()
        await flow.wait(10)
        keys = app.keys("default")
        found = await app.run(flows.view(keys, flow.id))
        children = await app.run(flows.edges(keys, flow.id, len(found.letters)))
    assert draw(found, children) == [
        "add  [0]  success",
        "  ├ add ×3  [1-3]  success",
        "  ├ fail  [4]  failed",
        "total  [6]  skipped",
    ]


async def test_nothing_stays_when_its_time_is_over(kitchen, raw):
    async with working(kitchen.app):
        flow = await fastq.group(kitchen.add.s(i) for i in range(3)).enqueue(result_ttl=60)
        await flow.wait(10)
    names = [key for key in raw.keys("*") if flow.id.encode() in key]
    assert len(names) == 2
    assert all(0 < raw.pttl(key) <= 60_000 for key in names)
    assert not raw.exists(kitchen.app.keys("default").groups)


def test_what_cannot_be_a_workflow_is_told_where_it_is_written(kitchen):
    add = kitchen.add
    with pytest.raises(InvalidArguments):
        fastq.chain(add.s("x")).enqueue_sync()
    with pytest.raises(InvalidArguments):  # no room for another argument
        fastq.chain(add.s(1), add.s(1, 2)).enqueue_sync()
    with pytest.raises(InvalidOption, match="at least one"):
        fastq.chain().enqueue_sync()
    with pytest.raises(InvalidOption, match="made of task"):
        fastq.group([add])
    with pytest.raises(InvalidOption, match="no option"):
        add.options(delay=5).s(1)
    with pytest.raises(InvalidOption, match="on_error"):
        fastq.chain(add.s(1)).enqueue_sync(on_error="explode")
    with pytest.raises(InvalidOption, match="give queue="):
        fastq.group(add.s(1), add.options(queue="other").s(2)).enqueue_sync()
    with pytest.raises(InvalidOption, match="it is one call"):
        fastq.chain(add.s(1)).enqueue_sync(on_failure=fastq.chain(add.s(1)))
    with pytest.raises(UnknownTask):
        kitchen.app.chain_sync([("no name",)])
    deep: Any = add.s(1)
    for _ in range(MOST_DEPTH + 1):
        deep = fastq.group(deep)
    with pytest.raises(InvalidOption, match="deep"):
        deep.enqueue_sync()


async def test_limits_see_none_for_what_comes_later(redis_url):
    """A job whose first argument another one fills in, behind a limit with a key."""
    kitchen = Kitchen(redis_url)

    @kitchen.app.task(rate_limit="100/s", limit_key=lambda value, who="": who or str(value))
    async def limited(value: int, who: str = "") -> int:
        return value + 1

    async with working(kitchen.app):
        flow = await fastq.chain(kitchen.add.s(1), limited.s(who="me"), limited.s()).enqueue()
        assert await flow.result(10) == 4


async def test_middlewares_retries_and_snoozes(kitchen):
    """A retry and a snooze keep what the job takes from the one before it."""
    tries: list[int] = []

    @kitchen.app.task(max_attempts=3, retry=0)
    async def stubborn(value: int, job: fastq.JobContext) -> int:
        tries.append(value)
        if len(tries) == 1:
            raise OSError("once")
        if len(tries) == 2:
            job.snooze(0)
        return value * 2

    kitchen.app.middleware(fastq.Middleware())
    async with working(kitchen.app) as shop:
        flow = await fastq.chain(kitchen.add.s(1), stubborn.s()).enqueue()
        ending = asyncio.create_task(flow.result(10))
        while not ending.done():
            await shop.promote()
            await asyncio.sleep(0.01)
        assert ending.result() == 4
    assert tries == [2, 2, 2]


async def test_the_next_job_pays_for_nothing_that_is_large(kitchen, raw):
    """Results by reference: the envelope of a callback does not grow with its header."""
    sizes = []
    for count in (2, 200):
        flow = await fastq.chord([kitchen.add.s(i) for i in range(count)], kitchen.total.s()).enqueue()
        sizes.append(len(raw.hget(kitchen.app.keys("default").flow(flow.id), f"e{count + 1}")))
    assert sizes[1] - sizes[0] <= 2  # the number of its gather
    await kitchen.app.purge_queue()
    await kitchen.app.aclose()


async def test_an_immutable_callback_and_two_calls_of_the_same_id(kitchen):
    """on_failure with .si gets what it names; app.group and app.chord by name."""
    async with working(kitchen.app):
        flow = await kitchen.app.chord([("add", (1, 2)), ("add", (3,))], kitchen.total.s())
        assert await flow.result(10) == 7
        named = await kitchen.app.chord([("add", (1,))], kitchen.app.signature("total", immutable=False))
        assert await named.result(10) == 2
        again = kitchen.app.get_workflow(named.id)
        assert (await again.status()).success == 2
        assert await (await kitchen.app.group([("add", (1,)), ("add", (2,))])).result(10) == [2, 3]


async def test_a_purged_queue_ends_its_workflows(kitchen):
    """F-59: nothing waits for jobs that are gone."""
    flow = await fastq.chord([kitchen.add.s(i) for i in range(5)], kitchen.total.s()).enqueue()
    assert await kitchen.app.purge_queue() == 5
    status = await flow.wait(10)
    assert (status.state, status.cancelled, status.skipped) == ("failed", 5, 1)
    await kitchen.app.aclose()
