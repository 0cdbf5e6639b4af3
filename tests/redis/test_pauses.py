"""Paused tasks: park.lua, unpause.lua and unpark_due.lua, and what workers and operators make of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import fastq
from fastq import FastQ
from fastq.broker import commands, doctor
from fastq.broker.commands import Parked
from fastq.broker.pauses import Pause, paused, suspend_task, unpause
from fastq.errors import InvalidOption
from fastq.job import WorkerCard, encode
from tests.conftest import eventually_async
from tests.redis.lab import Lab
from tests.redis.workshop import Workshop, working

P = Pause("t")


def park(lab: Lab, *ids: str) -> None:
    lab.call(commands.park(lab.q, "w", [Parked(name, P.name, 1 + n, 2_000) for n, name in enumerate(ids)]))


# -- the scripts ----------------------------------------------------------------------------------------


def test_a_paused_job_waits_until_the_pause_is_over(lab: Lab) -> None:
    """Nobody looks after it before; then the first one is the first again."""
    assert lab.call(suspend_task(lab.q, P))
    assert not lab.call(suspend_task(lab.q, P))
    lab.take("a", "b", "c")
    park(lab, "a", "b", "c")
    assert lab.value("parked") == [(P.name, 10**15)]
    assert lab.call(commands.unpark_due(lab.q)).moved == 0
    lab.enqueue("d")
    assert lab.call(unpause(lab.q, P, 2)) == (True, 2, 1)
    assert lab.call(unpause(lab.q, P, 2)) == (False, 1, 0)
    assert lab.call(unpause(lab.q, P, 2)) == (False, 0, 0)
    assert lab.ready() == ["c", "a", "b", "d"]
    assert not lab.raw.exists(lab.q.parked, lab.q.parked_of, lab.q.paused_tasks)
    assert lab.value("wake") == ["1"]


def test_a_worker_that_learns_of_the_end_late(lab: Lab) -> None:
    """It parks what is not paused any more: the scheduler sends it back at once, all of it."""
    lab.take("a", "b")
    park(lab, "a", "b")
    assert lab.value("parked") == [(P.name, lab.near())]
    assert lab.call(commands.unpark_due(lab.q)).moved == 2
    assert lab.ready() == ["a", "b"]
    assert lab.value("parked") is None


def test_who_resumes_dies_half_way(lab: Lab) -> None:
    lab.call(suspend_task(lab.q, P))
    lab.take("a", "b", "c")
    park(lab, "a", "b", "c")
    lab.call(unpause(lab.q, P, 1))
    assert lab.call(commands.unpark_due(lab.q)).moved == 2
    assert sorted(lab.ready()) == ["a", "b", "c"]


def test_paused_again_before_all_were_back(lab: Lab) -> None:
    lab.call(suspend_task(lab.q, P))
    lab.take("a", "b")
    park(lab, "a", "b")
    lab.call(unpause(lab.q, P, 1))
    lab.call(suspend_task(lab.q, P))
    assert lab.call(commands.unpark_due(lab.q)).moved == 0
    assert lab.value("parked") == [(P.name, 10**15)]


def test_what_cannot_be_read_is_no_pause(lab: Lab) -> None:
    lab.call(suspend_task(lab.q, P))
    lab.raw.hset(lab.q.paused_tasks, "odd", b"\xc1")
    assert lab.call(paused(lab.q)) == [P]


def test_names() -> None:
    """One pause, one name; a limiter cannot have it."""
    assert Pause("send").name == "~paused/send"
    assert Pause("x" * 200).name.startswith("~paused/~")
    one, same, other = Pause("t", {"a": 1, "b": 2}), Pause("t", {"b": 2, "a": 1}), Pause("t", {"a": 1})
    assert one.name == same.name
    assert len({one.name, other.name, Pause("t").name, Pause("u", {"a": 1}).name}) == 4


# -- workers and operators ------------------------------------------------------------------------------


class Shop:
    def __init__(self, url: str) -> None:
        self.app = FastQ(url, queues="default,mail")
        self.ran: list[Any] = []

        @self.app.task(queue="mail")
        async def send(to: str, tenant: int = 0) -> None:
            self.ran.append((to, tenant))

        @self.app.task
        async def other() -> None:
            self.ran.append("other")

        self.send, self.other = send, other

    async def parked(self, queue: str = "mail") -> int:
        info = await self.app.queues.info(queue)
        return info.parked if info else 0


@pytest.fixture
def shop(redis_url: str) -> Iterator[Shop]:
    shop = Shop(redis_url)
    yield shop
    shop.app.close()


async def test_a_paused_task(shop: Shop) -> None:
    """Known to a worker before its first job; the other tasks of the queue go on; nothing is charged or lost."""
    queues = shop.app.queues
    assert await queues.pause(task=shop.send)
    assert not await queues.pause(task="send")
    jobs = [await shop.send.enqueue(f"{n}") for n in range(20)]
    free = await shop.other.options(queue="mail").enqueue()
    async with working(shop.app) as worker:
        assert (await ended(worker, free)).state == "success"
        await eventually_async(lambda: _is(shop.parked(), 20))
        assert shop.ran == ["other"]
        status = await jobs[0].status()
        assert (status.state, status.limit, status.attempts) == ("parked", "~paused/send", 0)
        told = await shop.app.explain(jobs[0].id)
        assert (told.causes[0].code, told.causes[0].text) == ("paused", "task send is paused")
        assert "parked" not in {cause.code for cause in told.causes}
        assert await queues.paused_tasks() == {"mail": [Pause("send")]}
        assert await queues.resume(task=shop.send)
        assert not await queues.resume(task=shop.send)
        for job in jobs:
            assert (await ended(worker, job)).state == "success"
    assert sorted(shop.ran[1:]) == sorted((f"{n}", 0) for n in range(20))
    assert await queues.paused_tasks() == {}
    await shop.app.aclose()


async def test_some_calls_of_a_task(shop: Shop) -> None:
    """By an argument's value, a default included; a worker that runs already learns of it within a second."""
    queues = shop.app.queues
    async with working(shop.app) as worker:
        first = await shop.send.enqueue("first", 42)
        assert (await ended(worker, first)).state == "success"
        assert queues.pause_sync("mail", task="send", where={"tenant": 42})
        assert queues.pause_sync("mail", task="send", where={"tenant": 0, "to": "b"})
        await eventually_async(lambda: bool(worker.loop._turnstile._paused))
        held = [
            await shop.send.enqueue("a", 42),
            await shop.send.enqueue(to="c", tenant=42),
            await shop.send.enqueue("b"),
        ]
        free = [await shop.send.enqueue("a", 43), await shop.send.enqueue("c"), await shop.send.enqueue("b", 1)]
        for job in free:
            assert (await ended(worker, job)).state == "success"
        await eventually_async(lambda: _is(shop.parked(), 3))
        told = await shop.app.explain(held[1].id)
        assert told.causes[0].text == "task send where tenant=42 is paused"
        assert (await shop.app.cancel(held[1].id)) is True
        assert queues.resume_sync("mail", task="send", where={"tenant": 42})
        assert (await ended(worker, held[0])).state == "success"
        assert await shop.parked() == 1
        assert queues.resume_sync("mail", task="send", where={"to": "b", "tenant": 0})
        assert (await ended(worker, held[2])).state == "success"
        await eventually_async(lambda: not worker.loop._turnstile._paused)
        assert worker.loop._turnstile.limited == {}
    assert queues.paused_tasks_sync() == {}
    await shop.app.aclose()


async def test_a_job_in_line_is_explained(shop: Shop) -> None:
    await shop.app.queues.pause(task="send")
    job = await shop.send.enqueue("a")
    assert (await shop.app.explain(job.id)).causes[0].text == "task send is paused"
    await shop.app.aclose()


async def test_a_task_with_limits_of_its_own(redis_url: str) -> None:
    app = FastQ(redis_url)
    ran: list[int] = []

    @app.task(rate_limit="1000/s")
    async def limited(n: int) -> None:
        ran.append(n)

    await app.queues.pause(task=limited)
    jobs = [await limited.enqueue(n) for n in range(3)]
    async with working(app) as worker:
        await eventually_async(lambda: _is(_parked(app), 3))
        await app.queues.resume(task=limited)
        for job in jobs:
            assert (await ended(worker, job)).state == "success"
        assert set(worker.loop._turnstile.limited) == {"limited"}
    assert sorted(ran) == [0, 1, 2]
    await app.aclose()


async def test_a_job_that_waits_for_its_limit_when_the_pause_begins(redis_url: str) -> None:
    """It has its turn while its task is paused: it is put aside instead, and what it was granted goes back."""
    app, ran = FastQ(redis_url, log_level="error"), []

    @app.task(rate_limit="4/s burst 1", concurrency=1)
    async def limited(n: int) -> None:
        ran.append(n)

    async with working(app) as worker:
        first = await limited.enqueue(1)
        assert await first.result(10) is None
        job = await limited.enqueue(2)  # a quarter of a second from now
        await eventually_async(lambda: bool(worker.loop._turnstile._waiting))
        assert await app.queues.pause(task=limited)
        await worker.loop._pauses.look()
        await eventually_async(lambda: not worker.loop._turnstile._waiting)
        await eventually_async(lambda: _is_parked(app, job))
        assert ran == [1]
        assert [cause.code for cause in (await app.explain(job.id)).causes] == ["paused"]
        assert await app.queues.resume(task=limited)
        await worker.loop._pauses.look()
        await eventually_async(lambda: _is_over(worker, job))
        assert await (await limited.enqueue(3)).result(10) is None, "the slot that it was granted is free"
    assert ran == [1, 2, 3]


async def _is_parked(app: FastQ, job: fastq.JobHandle[Any]) -> bool:
    status = await job.status()
    return status is not None and status.state == "parked"


async def _is_over(worker: Workshop, job: fastq.JobHandle[Any]) -> bool:
    """The scheduler's part: should the worker have taken it before it heard of the end of the pause."""
    await worker.helper.call(commands.unpark_due(worker.app.keys("default")))
    status = await job.status()
    return status is not None and status.state.final


# -- the command line -----------------------------------------------------------------------------------


@pytest.fixture
def command(redis_url: str) -> Any:
    """`fastq queues …`: exit code and output."""
    from click.testing import CliRunner

    from fastq.cli.queues import verbs

    def run(*words: str) -> tuple[int, str]:
        answer = CliRunner().invoke(verbs["queues"], [*words, "--redis-url", redis_url])
        return answer.exit_code, answer.output.strip()

    return run


def test_a_task_is_paused_from_the_command_line(redis_url: str, command: Any) -> None:
    code, told = command("pause", "--task", "send")
    assert (code, told) == (1, "Error: there is no queue yet: nothing could be paused")
    app = FastQ(redis_url)
    job = app.enqueue_sync("send", 7)
    app.options(queue="bulk").enqueue_sync("send", 7)
    assert command("pause", "--task", "send") == (0, "task send: paused")
    assert command("pause", "--task", "send") == (0, "task send: was paused already")
    assert app.queues.paused_tasks_sync() == {"default": [Pause("send")], "bulk": [Pause("send")]}
    assert "task send is paused" in str(app.explain_sync(job.id))
    assert command("ls")[1].splitlines()[-1] == "task send: paused in bulk, default"
    findings = app.run_sync(doctor._fleet("fastq"))
    fixes = [finding.fix for finding in findings if "task send is paused" in finding.message]
    assert fixes == ["fastq queues resume bulk --task send", "fastq queues resume default --task send"]
    assert command("resume", "bulk", "--task", "send") == (0, "task send in bulk: resumed")
    assert app.queues.paused_tasks_sync() == {"default": [Pause("send")]}
    assert command("resume", "--task", "send", "--json") == (0, '{"queue":null,"changed":true,"task":"send"}')
    assert app.queues.paused_tasks_sync() == {}
    app.close()


def test_calls_with_one_argument_are_paused_from_the_command_line(redis_url: str, command: Any) -> None:
    """A value is JSON where it can be: 42 is a number, a name is text."""
    app = FastQ(redis_url)
    app.enqueue_sync("send", tenant_id=42)
    where = ("--task", "send", "--where", "tenant_id=42", "--where", "region=eu", "--where", "tags=[1]")
    assert command("pause", "default", *where) == (
        0, "task send where tenant_id=42, region='eu', tags=[1] in default: paused",
    )  # fmt: skip
    pauses = app.queues.paused_tasks_sync()["default"]
    assert pauses == [Pause("send", {"tenant_id": 42, "region": "eu", "tags": [1]})]
    assert command("resume", "--task", "send") == (0, "task send: was not paused"), "another pause than that one"
    assert command("resume", *where)[1].endswith(": resumed")
    for wrong in (["--where", "tenant_id=42"], ["--task", "send", "--where", "tenant"], []):
        code, told = command("pause", *wrong)
        assert code == 2, told
        assert "NAME=VALUE" in told or "name a QUEUE, or a --task" in told
    app.close()


async def test_a_queue_may_be_paused_before_its_first_job(redis_url: str, raw: Any) -> None:
    """Everybody sees it, and nothing is left of one that never was paused."""
    app = FastQ(redis_url)
    assert not await app.queues.resume("typo")
    assert not await app.queues.resume("typo", task="send")
    assert raw.keys("*typo*") == []
    assert await app.queues.pause("new")
    assert await app.queues.pause("newer", task="send")
    assert [info.name for info in await app.run(app.inspector.overview())] == ["new", "newer"]
    info = await app.queues.info("new")
    assert info is not None
    assert info.paused
    await app.aclose()


def test_a_paused_task_that_no_worker_knows_is_told(redis_url: str, command: Any) -> None:
    app = FastQ(redis_url)
    app.enqueue_sync("send", 7)
    card = WorkerCard("host", 1, 10, 0, "0", 0, ["send"])
    app.run_sync(_only(commands.register(app.keys("default"), "w", 60_000, encode(card))))
    assert command("pause", "--task", "sned") == (
        0, "task sned: paused\nfastq: no live worker knows task sned - did you mean 'send'?",
    )  # fmt: skip
    assert command("pause", "--task", "send") == (0, "task send: paused")
    app.close()


def _only(one: Any) -> Any:
    return (yield one)


async def test_what_makes_no_sense(shop: Shop) -> None:
    with pytest.raises(InvalidOption, match="which task"):
        await shop.app.queues.pause(where={"tenant": 1})
    with pytest.raises(InvalidOption, match="no argument 'tenannt'"):
        await shop.app.queues.pause(task="send", where={"tenannt": 1})
    with pytest.raises(InvalidOption, match="cannot be compared"):
        await shop.app.queues.pause(task="send", where={"tenant": object()})
    with pytest.raises(fastq.InvalidQueueName):
        await shop.app.queues.pause("no queue", task="send")
    await shop.app.aclose()


async def ended(worker: Workshop, job: Any) -> Any:
    """With a scheduler: a worker that learns of the end of a pause late parks jobs until then."""

    async def over() -> bool:
        await worker.helper.call(commands.unpark_due(worker.app.keys(job.queue)))
        return (await job.status()).state.final

    await eventually_async(over)
    return await job.status()


async def _is(count: Any, expected: int) -> bool:
    return (await count) == expected


async def _parked(app: FastQ) -> int:
    info = await app.queues.info()
    return info.parked if info else 0
