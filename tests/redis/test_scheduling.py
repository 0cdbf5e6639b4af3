"""The scheduler's loops on a real Redis, in this process: leadership, promotion, recovery, ticks, pruning (F-32, F-36, F-53..F-58)."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastq
from fastq import config
from fastq.board import Board
from fastq.broker import commands
from fastq.broker.commands import NewJob
from fastq.broker.connection import AsyncConnection
from fastq.broker.inspector import Inspector
from fastq.broker.keys import GlobalKeys
from fastq.broker.planner import Planner
from fastq.broker.timing import Fired
from fastq.broker.url import parse_url
from fastq.cron import Every
from fastq.job import ErrorInfo, WorkerCard, check_id, decode_envelope, decode_error, encode
from fastq.metrics import COUNTERS, WorkerMetrics, aggregate
from fastq.scheduler import maintenance, periodic
from fastq.scheduler.link import LEASE, STANDBY, Leadership, Link, Roster
from fastq.scheduler.maintenance import Promoter, Pruner, Recoverer, Waker
from fastq.scheduler.periodic import MOST, Entry, Ticker
from fastq.scheduler.process import queues_of
from fastq.schedules import declared_by
from fastq.service import Service
from fastq.timetable import decode_definition, job_id
from tests.conftest import MakeServer, connect, eventually_async
from tests.redis.lab import PAD, Lab, envelope
from tests.unit.service_contract import stress_start_stop

HOUR = 3_600_000


class Rig:
    """All loops of one scheduler; none runs until the test starts it. `lease_key` apart: a scheduler that leads for itself."""

    def __init__(self, url: str, app: fastq.FastQ | None = None, lease_key: str = "fastq", **settings: Any) -> None:
        self.settings = config.load(arguments={"url": url, "lease": 1.0, **settings}, environ={}).settings
        self.app = app or fastq.FastQ(url)
        self.app.adopt(self.settings)
        self.board = Board(1)
        slot = self.board.claim("scheduler")
        assert slot is not None
        metrics = WorkerMetrics(slot)
        self.connections = [AsyncConnection.to(parse_url(url)) for _ in range(2)]
        self.link = Link(self.connections[0], metrics)
        self.leadership = Leadership(self.link, GlobalKeys(lease_key), f"s{id(self)}")
        self.roster = Roster(self.leadership, self.link, "fastq", queues_of(self.app))
        self.promoter = Promoter(self.leadership, self.link, self.roster)
        self.waker = Waker(self.leadership, Link(self.connections[1], metrics, quiet=True), self.roster, self.promoter)
        self.roster.on_new = self.promoter.look_again
        self.recoverer = Recoverer(self.leadership, self.link, self.roster, self.settings)
        self.pruner = Pruner(self.leadership, self.link, self.roster, self.settings)
        self.planner = Planner("fastq")
        declared, inspector = declared_by(self.app, "jobs:app"), Inspector("fastq")
        self.ticker = Ticker(
            self.leadership, self.link, self.planner, "jobs:app", declared, inspector, self.app.sealer()
        )

    @property
    def services(self) -> dict[str, Service]:
        parts = (
            self.leadership,
            self.roster,
            self.promoter,
            self.waker,
            self.recoverer,
            self.pruner,
            self.ticker,
        )
        services = {part.service.name: part.service for part in parts}
        return services | {"declare": self.ticker.declaring, "trace": self.ticker.tracer}

    def counted(self, name: str) -> float:
        return aggregate(self.board).counters[name]  # type: ignore[index]

    @asynccontextmanager
    async def running(self, *names: str) -> AsyncIterator[Rig]:
        """As leader, with these loops (default: all)."""
        await self.leadership.step()
        for name in names or self.services:
            await self.services[name].start()
        try:
            yield self
        finally:
            await self.close()

    async def close(self) -> None:
        await asyncio.gather(
            *(service.stop(1.0 if service.name != "wake" else 0.0) for service in self.services.values())
        )
        await self.leadership.give_up()
        await self.waker.close()
        await self.connections[0].close()


@pytest.fixture
def rig(redis_url: str) -> Rig:
    return Rig(redis_url)


def delayed(job: str, delay_ms: int) -> NewJob:
    return NewJob(job, envelope(), delay_ms)


def events(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.getMessage() == event]


# -- every loop is a service ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["lead", "queues", "promote", "wake", "recover", "prune", "periodic", "declare", "trace"]
)
async def test_every_loop_starts_and_stops_in_any_order(rig: Rig, name: str) -> None:
    await rig.leadership.step()
    try:
        await stress_start_stop(lambda: rig.services[name], rounds=15)
    finally:
        await rig.close()


async def test_followers_rest_until_there_is_a_term(rig: Rig, lab: Lab) -> None:
    lab.enqueue(delayed("a", 1))
    await rig.promoter.service.start()
    await rig.promoter.service.settled()
    assert not rig.connections[0].connected
    await rig.leadership.step()  # wakes it
    await eventually_async(lambda: lab.ready() == ["a"])
    await rig.close()


async def test_an_idle_leader_is_no_busy_poll(rig: Rig, lab: Lab) -> None:
    lab.enqueue(delayed("a", HOUR))
    async with rig.running():
        await eventually_async(lambda: rig.roster.service.runs >= 2)
        before, began, runs = (
            lab.raw.info("stats")["total_commands_processed"],
            time.monotonic(),
            rig.roster.service.runs,
        )
        await eventually_async(lambda: rig.roster.service.runs >= runs + 2)
        used = lab.raw.info("stats")["total_commands_processed"] - before
        assert used / (time.monotonic() - began) < 20  # of all loops together, the commands inside scripts counted


# -- leadership ------------------------------------------------------------------------------------


async def test_one_leads_the_others_stand_by(redis_url: str, raw: Any) -> None:
    first, second = Rig(redis_url), Rig(redis_url)
    assert await first.leadership.step() < LEASE / 2
    assert await second.leadership.step() == STANDBY
    assert (first.leadership.leading, second.leadership.leading) == (True, False)
    assert raw.get("fastq:leader").decode() == first.leadership.name
    assert LEASE - 1 < raw.pttl("fastq:leader") / 1_000 <= LEASE
    await first.close()
    assert raw.get("fastq:leader") is None
    await second.leadership.step()
    assert second.leadership.leading
    assert not first.leadership.leading
    await second.close()


async def test_a_lease_taken_over_ends_the_term(redis_url: str, raw: Any, caplog: pytest.LogCaptureFixture) -> None:
    """F-54: whoever was stopped finds out with its next step."""
    rig = Rig(redis_url)
    await rig.leadership.step()
    raw.set("fastq:leader", "other", px=5_000)
    await rig.leadership.step()
    assert not rig.leadership.leading
    assert events(caplog, "leadership lost")
    await rig.close()
    assert raw.get("fastq:leader") == b"other"  # giving up takes nothing from the heir


async def test_trust_ends_before_the_lease(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.leadership.step()
    asked = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: asked + LEASE - 0.9)
    assert not rig.leadership.leading
    monkeypatch.undo()
    await rig.close()


async def test_a_new_term_after_a_lapse_makes_everybody_look_again(rig: Rig) -> None:
    await rig.leadership.step()
    before = rig.leadership.epoch
    await rig.leadership.step()
    assert rig.leadership.epoch == before
    rig.leadership._trusted_until = -math.inf  # as after a stall
    await rig.leadership.step()
    assert rig.leadership.epoch != before
    await rig.close()


# -- queues ----------------------------------------------------------------------------------------


async def test_queues_of_settings_tasks_and_redis_are_served(redis_url: str, raw: Any) -> None:
    app = fastq.FastQ(redis_url)

    @app.task(queue="reports")
    def report() -> None: ...

    raw.sadd("fastq:queues", "bulk", "no queue", "{x}")
    rig = Rig(redis_url, app, queues="critical,default")
    await rig.leadership.step()
    await rig.roster.step()
    assert sorted(rig.roster.queues) == ["bulk", "critical", "default", "reports"]
    raw.delete("fastq:queues")
    await rig.roster.step()
    assert sorted(rig.roster.queues) == ["critical", "default", "reports"]
    await rig.close()


async def test_a_queue_that_comes_is_looked_at(rig: Rig, redis_url: str, raw: Any) -> None:
    async with rig.running():
        late = Lab(redis_url, raw, "late")
        late.enqueue(delayed("a", 50))
        raw.sadd("fastq:queues", "late")
        await eventually_async(lambda: late.ready() == ["a"])
        late.conn.close()


# -- promote ---------------------------------------------------------------------------------------


async def promoted_at(lab: Lab, job: str) -> int:
    """Redis's time when the job was seen to be ready."""
    await eventually_async(lambda: job in lab.ready())
    return lab.now()


async def test_a_job_is_ready_when_it_is_due(rig: Rig, lab: Lab) -> None:
    """F-58: to the millisecond on an idle machine; 100 ms are the promise."""
    async with rig.running("lead", "promote", "wake"):
        for delay in (30, 200, 700):
            due = lab.now() + delay
            lab.enqueue(delayed(f"j{delay}", delay))
            late = await promoted_at(lab, f"j{delay}") - due
            assert 0 <= late <= 100
    assert rig.counted("promoted") == 3


async def test_a_new_head_of_the_due_set_wakes_the_scheduler(rig: Rig, lab: Lab) -> None:
    async with rig.running("lead", "promote", "wake"):
        lab.enqueue(delayed("far", HOUR))
        await eventually_async(lambda: rig.promoter._due and min(rig.promoter._due.values()) > time.monotonic() + 60)
        lab.enqueue(delayed("near", 100))
        due = lab.now() + 100
        assert await promoted_at(lab, "near") - due <= 100


async def test_a_notice_during_a_look_is_not_lost(rig: Rig, lab: Lab) -> None:
    await rig.leadership.step()
    look = asyncio.create_task(rig.promoter._look(list(rig.roster.queues.values())))
    await asyncio.sleep(0)  # the look is under way
    rig.promoter.notice("default")
    await look
    lab.enqueue(delayed("a", 1))
    await eventually_async(lambda: lab.now() > lab.value("due")[0][1])
    rig.promoter._look_at = math.inf
    rig.promoter._epoch = rig.leadership.epoch
    await rig.promoter.step()
    assert lab.ready() == ["a"]
    await rig.close()


async def test_lost_wake_tokens_cost_a_look_only(rig: Rig, lab: Lab) -> None:
    async with rig.running("lead", "promote"):  # nobody takes the tokens
        await eventually_async(lambda: rig.promoter.service.runs >= 1)
        lab.enqueue(delayed("a", 10))
        await eventually_async(lambda: lab.ready() == ["a"], timeout=3)


async def test_an_error_of_one_queue_stays_with_it(redis_url: str, raw: Any, caplog: pytest.LogCaptureFixture) -> None:
    raw.set("fastq:{bad}:due", "x")
    rig = Rig(redis_url, queues="bad,good")
    good = Lab(redis_url, raw, "good")
    async with rig.running():
        good.enqueue(delayed("a", 10))
        await eventually_async(lambda: good.ready() == ["a"], timeout=3)
        good.enqueue(delayed("b", 10))
        await eventually_async(lambda: good.ready() == ["a", "b"], timeout=3)
    assert [said["queue"] for said in events(caplog, "queue skipped")] == ["bad"]  # once
    good.conn.close()
    raw.delete("fastq:{bad}:due")


# -- recover ---------------------------------------------------------------------------------------


def card(lease: int = 0) -> bytes:
    return encode(WorkerCard("host-a", 1, 10, 0, "0.1", lease))


def lose(lab: Lab, *ids: str, worker: str = "h.1.x") -> None:
    """A worker that holds these jobs and whose lease has run out."""
    lab.take(*ids, worker=worker)
    lab.raw.hset(lab.q.info, worker, card())
    lab.raw.zadd(lab.q.workers, {worker: lab.now() - 1})


async def test_jobs_of_a_lost_worker_are_ready_again(rig: Rig, lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lose(lab, "a", "b")
    lab.take("c", worker="alive")
    async with rig.running("lead", "recover"):
        await eventually_async(lambda: sorted(lab.ready()) == ["a", "b"])
    assert lab.value("deliveries") == {"a": b"1", "b": b"1"}
    assert lab.value("running:h.1.x") is None
    assert lab.value("running:alive") == {PAD, "c"}
    assert rig.counted("recovered") == 2
    (said,) = events(caplog, "worker lost, its lease ran out")
    assert (said["worker"], said["host"], said["recovered"], said["poisoned"]) == ("h.1.x", "host-a", 2, 0)


async def test_a_job_whose_workers_keep_dying_is_poison(redis_url: str, lab: Lab) -> None:
    """F-07: after max_deliveries it is a dead letter that says so."""
    rig = Rig(redis_url, max_deliveries=2)
    async with rig.running("lead", "recover"):
        lose(lab, "a")
        await eventually_async(lambda: lab.ready() == ["a"])
        lab.register("h.2.y")
        assert lab.reserve(1, "h.2.y").deliveries == [1]
        lab.raw.zadd(lab.q.workers, {"h.2.y": lab.now() - 1})
        await eventually_async(lambda: lab.value("dead"))
    error = decode_error(lab.value("dead:errors")["a"])
    assert error == ErrorInfo("poison", "WorkerLost", error.message, "", 0, error.failed_at, "h")
    assert "died 2 times" in error.message
    assert "h.2.y" in error.message
    assert lab.started <= error.failed_at <= lab.now()
    assert rig.counted("poisoned") == 1


async def test_a_worker_that_extends_at_the_last_moment_keeps_its_jobs(
    rig: Rig, lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    """Between the look and the call: the script looks at the lease again."""
    lab.take("a")
    await rig.leadership.step()
    await rig.recoverer._recover(lab.q, "w")
    assert lab.value("running:w") == {PAD, "a"}
    assert not events(caplog, "worker lost, its lease ran out")
    await rig.close()


async def test_many_jobs_of_many_workers_come_back_in_batches(rig: Rig, lab: Lab) -> None:
    for worker in range(150):
        lose(lab, *(f"{worker}-{n}" for n in range(3)), worker=f"h.{worker}.x")
    lose(lab, *(f"big-{n}" for n in range(450)), worker="h.big.x")
    async with rig.running("lead", "recover"):
        await eventually_async(lambda: len(lab.ready()) == 900)
    assert lab.value("workers") is None
    assert lab.value("info") is None


async def test_a_lease_is_recovered_when_it_runs_out_not_at_the_next_look(redis_url: str, lab: Lab) -> None:
    rig = Rig(redis_url, lease=15)  # a look each 3 s
    async with rig.running("lead", "recover"):
        rig.recoverer._not_before.clear()
        await eventually_async(lambda: rig.recoverer.service.runs >= 1)
        rig.recoverer._not_before.clear()
        lab.take("a")
        end = lab.now() + 600
        lab.raw.zadd(lab.q.workers, {"w": end})
        rig.recoverer.service.wake()
        await eventually_async(lambda: lab.ready() == ["a"])
        assert lab.now() - end < 300


async def test_nobody_is_recovered_before_one_heartbeat_of_a_new_term(rig: Rig, lab: Lab) -> None:
    """F-32: the new leader cannot know whether workers were able to extend."""
    lose(lab, "a")
    await rig.leadership.step()
    began = time.monotonic()
    wait = await rig.recoverer.step()
    assert wait == pytest.approx(rig.settings.lease / 3, abs=0.05)
    assert lab.ready() == []
    await rig.recoverer.service.start()
    await eventually_async(lambda: lab.ready() == ["a"])
    assert time.monotonic() - began >= rig.settings.lease / 3
    await rig.close()


@pytest.mark.parametrize("stood_still", ["this process, or Redis", "Redis's clock was set forward"])
async def test_nobody_is_recovered_after_a_silence(
    rig: Rig, lab: Lab, stood_still: str, caplog: pytest.LogCaptureFixture
) -> None:
    """F-32, F-36: workers get the time of one heartbeat after it."""
    lose(lab, "a")
    await rig.leadership.step()
    await rig.recoverer.step()
    rig.recoverer._not_before.clear()
    ours = stood_still.startswith("this")
    back, set_forward = (2, 0) if ours else (0, HOUR / 1_000)
    for place, (term, local, remote) in rig.recoverer._seen.items():
        rig.recoverer._seen[place] = term, local - back, remote - set_forward
    await rig.recoverer.step()
    assert lab.ready() == []
    assert events(caplog, "redis or scheduler stood still, workers are given time")
    rig.recoverer._not_before.clear()
    await rig.recoverer.step()
    assert lab.ready() == ["a"]
    await rig.close()


async def test_a_redis_that_stood_still_for_two_leases_costs_no_duplicate(make_server: MakeServer) -> None:
    """F-32: SIGSTOP of the server; the worker's monitor extends as soon as it can."""
    server = make_server()
    with connect(server.url) as raw:
        lab, rig = Lab(server.url, raw), Rig(server.url, lease=1.5)
        lab.register("w", 1_500)
        lab.enqueue("a")
        lab.reserve(1)
        extensions = itertools.count()
        keeper = AsyncConnection(parse_url(server.url))

        async def extend() -> float:
            (kept,) = await keeper.call(commands.extend(lab.q, 1_500, ["w"]))
            assert kept
            next(extensions)
            return 0.5

        async with rig.running("lead", "recover"), Service("extend", extend):
            await eventually_async(lambda: rig.recoverer.service.runs >= 3)
            server.pause()
            stopped = time.monotonic()
            await eventually_async(lambda: time.monotonic() > stopped + 3.0)
            server.resume()
            runs = rig.recoverer.service.runs
            await eventually_async(lambda: rig.recoverer.service.runs >= runs + 4)
            assert lab.value("running:w") == {PAD, "a"}
            assert lab.ready() == []
        await keeper.close()
        lab.conn.close()


async def test_a_lease_far_ahead_is_brought_back(rig: Rig, lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """F-36: Redis's clock was an hour ahead when the worker died, then it was set back."""
    lose(lab, "a")
    lab.raw.zadd(lab.q.workers, {"h.1.x": lab.now() + HOUR})
    async with rig.running("lead", "recover"):
        await eventually_async(lambda: lab.ready() == ["a"], timeout=5)
    assert events(caplog, "leases ended too far ahead, redis's clock was set back")


async def test_a_worker_with_a_longer_lease_keeps_it(rig: Rig, lab: Lab) -> None:
    """F-36: a card may say how long the lease is; without it the scheduler's own setting counts."""
    lab.register("said", HOUR)
    lab.raw.hset(lab.q.info, "said", card(lease=30_000))
    lab.register("unsaid", HOUR)
    lab.raw.hset(lab.q.info, "unsaid", b"\xc1")
    await rig.leadership.step()
    await rig.recoverer.step()
    ends = dict(lab.value("workers"))
    now = lab.now()
    assert 29_000 < ends["said"] - now <= 30_000
    assert 0 < ends["unsaid"] - now <= 1_000
    await rig.close()


WORKERS = ("w1", "w2", "w3")


@pytest.mark.parametrize("seed", range(5))
def test_no_running_set_without_its_worker(lab: Lab, seed: int) -> None:
    """The recoverer looks at `workers` only: no order of calls may leave a running set that is not in it, or lose a job."""
    rng, made = random.Random(seed), 0
    for _ in range(150):
        worker = rng.choice(WORKERS)
        match rng.randrange(7):
            case 0:
                lab.register(worker)
            case 1:
                lab.enqueue(*(f"j{made + n}" for n in range(5)))
                made += 5
            case 2:
                lab.reserve(rng.randrange(6), worker)
            case 3:
                held = [m.decode() for m in lab.raw.smembers(lab.q.running(worker)) if m != PAD.encode()]
                lab.settle(worker, released=held[:2])
            case 4:
                lab.recover(worker, charge="all", max_deliveries=10_000, limit=rng.choice([1, 2, 200]))
            case 5:
                lab.raw.zadd(lab.q.workers, {worker: lab.now() - 1}, xx=True)
                lab.recover(worker, expired=True, charge="all", max_deliveries=10_000, limit=rng.choice([1, 200]))
            case _:
                lab.call(commands.extend(lab.q, 60_000, WORKERS))
        sets = {key.decode().rpartition(":")[2] for key in lab.raw.keys(lab.q.base + "running:*")}
        assert sets == {member.decode() for member in lab.raw.zrange(lab.q.workers, 0, -1)}
        running = [m.decode() for w in sets for m in lab.raw.smembers(lab.q.running(w)) if m != PAD.encode()]
        assert sorted(running + lab.ready()) == sorted(lab.jobs())
        assert len(lab.jobs()) == made


# -- ticks -----------------------------------------------------------------------------------------


def beating(url: str, interval: float = 0.1, **options: Any) -> fastq.FastQ:
    app = fastq.FastQ(url)

    @app.every(interval, name="beat", **options)
    @app.task(priority=8, expires=60)
    def beat() -> None: ...

    return app


def again(rig: Rig) -> None:
    """Every schedule is looked at in the next step."""
    for entry in rig.ticker.agenda:
        entry.due = 0.0
        rig.ticker.agenda.put(entry)


def ticks_of(lab: Lab, schedule: str = "beat") -> list[int]:
    return sorted(int(job.rpartition("@")[2]) for job in lab.ready() if job.startswith(schedule))


async def test_a_new_schedule_begins_with_its_next_tick(redis_url: str, lab: Lab) -> None:
    rig = Rig(redis_url, beating(redis_url))
    async with rig.running("lead", "periodic"):
        await eventually_async(lambda: len(ticks_of(lab)) >= 3)
        ticks = ticks_of(lab)
    assert ticks[0] > lab.started
    assert ticks == list(range(ticks[0], ticks[0] + 100 * len(ticks), 100))
    assert rig.counted("fired") == len(ticks_of(lab))
    assert lab.raw.smembers("fastq:queues") == {b"default"}


async def test_the_job_of_a_tick(redis_url: str, lab: Lab) -> None:
    app = fastq.FastQ(redis_url)

    @app.every(0.1, name="nightly run", args=(7,), kwargs={"name": "x"})
    @app.task(queue="reports", priority=8, expires=60)
    def report(number: int, name: str) -> None: ...

    reports = Lab(redis_url, lab.raw, "reports")
    async with Rig(redis_url, app).running("lead", "periodic"):
        await eventually_async(reports.ready)
    name = reports.ready()[0]
    tick = int(name.rpartition("@")[2])
    job = decode_envelope(reports.value("jobs")[name])
    assert name == job_id("nightly run", tick)
    assert (job.task, job.priority, job.attempt) == ("report", 8, 0)
    assert report.arguments.decode(job.body) == ((7, "x"), {})
    assert job.extra is not None
    assert (job.extra.schedule, job.extra.due_at) == ("nightly run", tick)
    assert tick <= job.enqueued_at <= lab.now()
    assert job.extra.expires_at == job.enqueued_at + 60_000
    assert reports.value("wake") == ["1"]
    reports.conn.close()


async def test_two_schedulers_that_both_lead_fire_each_tick_once(redis_url: str, lab: Lab) -> None:
    """F-54: a partition or a SIGSTOP may leave two that believe it; fire.lua lets one of them through."""
    one, two = (
        Rig(
            redis_url, beating(redis_url, misfire="all"), lease_key=f"fastq:{key}"
        )  # also when the machine stands still
        for key in ("one", "two")
    )
    async with one.running("lead", "periodic"), two.running("lead", "periodic"):
        await eventually_async(lambda: len(ticks_of(lab)) >= 15)
    ticks = ticks_of(lab)
    assert ticks == list(range(ticks[0], ticks[0] + 100 * len(ticks), 100))
    assert one.counted("fired") + two.counted("fired") == len(ticks)


async def test_a_repeated_call_fires_once(redis_url: str, lab: Lab) -> None:
    rig = Rig(redis_url, beating(redis_url))
    await rig.leadership.step()
    await rig.ticker.declare()
    lab.raw.hdel(lab.q.ticks, "beat")
    (data,) = lab.value("schedules").values()
    made = decode_definition(data)
    assert made is not None
    entry = Entry(lab.q, made, data, Every(0.1))
    assert lab.twice(entry.fire(1_000.0, 1_000_100)) == (Fired.ENQUEUED, Fired.BEFORE)
    await rig.close()
    assert ticks_of(lab) == [1_000_000]


@pytest.mark.parametrize(
    ("misfire", "missed_seconds", "fired"),
    [
        ("skip", 3_600, 1),  # the newest is at most 60 s late
        ("once", 3_600, 1),
        ("all", 90, 9),
        ("all", 3_600, MOST),  # capped: the newest ones
    ],
)
async def test_missed_ticks(
    redis_url: str, lab: Lab, misfire: Any, missed_seconds: int, fired: int, caplog: pytest.LogCaptureFixture
) -> None:
    """F-55: by the policy of the schedule, and logged."""
    rig = Rig(redis_url, beating(redis_url, 10, misfire=misfire))
    now = lab.now()
    last = (now // 10_000) * 10_000 - missed_seconds * 1_000
    lab.raw.hset(lab.q.ticks, "beat", last)
    await rig.leadership.step()
    await rig.ticker.step()
    ticks = ticks_of(lab)
    newest = lab.now() // 10_000 * 10_000
    assert ticks[-1] == newest
    assert ticks == list(range(newest - (len(ticks) - 1) * 10_000, newest + 1, 10_000))
    assert len(ticks) in {fired, fired + (misfire == "all" and fired < MOST and newest > now)}
    (said,) = events(caplog, "ticks missed")
    assert (said["schedule"], said["misfire"]) == ("beat", misfire)
    await rig.ticker.step()
    assert ticks_of(lab) == ticks
    await rig.close()


async def test_ticks_that_are_too_old_are_skipped(redis_url: str, lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """F-55: skip: more than a minute late is too late; said once, not with every step."""
    interval = next(
        i for i in (5_000, 7_001) if lab.now() / 1_000 % i > 120
    )  # its last tick is two minutes ago at least
    rig = Rig(redis_url, beating(redis_url, interval, misfire="skip"))
    lab.raw.hset(lab.q.ticks, "beat", 1_000)
    await rig.leadership.step()
    await rig.ticker.step()
    await rig.ticker.step()
    assert len(events(caplog, "ticks missed")) == 1
    assert (
        ticks_of(lab) == []
    )  # this week's tick was more than a minute ago (unless this runs on a Thursday, 00:00 UTC)
    await rig.close()


async def test_a_tick_that_redis_refuses_is_tried_again(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """F-23: out of memory; later ticks do not overtake the refused one."""
    server = make_server()
    with connect(server.url) as raw:
        lab = Lab(server.url, raw)
        raw.hset(lab.q.ticks, "beat", lab.now() // 100 * 100 - 1_000)
        rig = Rig(server.url, beating(server.url, misfire="all"))
        raw.config_set("maxmemory", 1)
        async with rig.running("lead", "periodic"):
            await eventually_async(lambda: events(caplog, "queue skipped"))
            assert ticks_of(lab) == []
            raw.config_set("maxmemory", 0)
            await eventually_async(lambda: len(ticks_of(lab)) > 12)
        ticks = ticks_of(lab)
        assert ticks == list(range(ticks[0], ticks[0] + 100 * len(ticks), 100))
        assert ticks[0] <= lab.started
        lab.conn.close()


async def test_a_tick_that_is_refused_again_and_again_is_told_once(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is fired meanwhile: the log does not say so."""
    server = make_server()
    with connect(server.url) as raw:
        lab = Lab(server.url, raw)
        rig = Rig(server.url, beating(server.url, misfire="skip"))
        async with rig.running("lead", "periodic"):
            await eventually_async(lambda: ticks_of(lab))
            raw.config_set("maxmemory", 1)
            await eventually_async(lambda: rig.counted("redis_errors") >= 4)
        (said,) = events(caplog, "ticks missed")
        assert said["due"] == 1
        lab.conn.close()


async def test_a_later_tick_does_not_overtake_a_refused_one(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F-23: memory is short for one call only, in the middle of making up for three ticks."""
    server = make_server()
    with connect(server.url) as raw:
        lab, rig = Lab(server.url, raw), Rig(server.url, beating(server.url, 10, misfire="all"))
        newest = lab.now() // 10_000 * 10_000
        raw.hset(lab.q.ticks, "beat", newest - 30_000)
        await rig.leadership.step()
        ask, calls = rig.link.ask, itertools.count()

        async def short_of_memory(asked: Any) -> list[Any]:
            number = next(calls)  # 0 learns, 1 fires the first tick, 2 the second
            raw.config_set("maxmemory", 1 if number == 2 else 0)
            return await ask(asked)

        monkeypatch.setattr(rig.link, "ask", short_of_memory)
        await rig.ticker.step()
        assert ticks_of(lab) == [newest - 20_000]
        again(rig)  # RETRY is over
        await rig.ticker.step()
        assert ticks_of(lab)[:3] == [newest - 20_000, newest - 10_000, newest]
        await rig.close()
        lab.conn.close()


async def test_a_new_term_asks_how_far_the_heir_has_come(
    redis_url: str, lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(redis_url, beating(redis_url, 10, misfire="all"))
    newest = lab.now() // 10_000 * 10_000
    lab.raw.hset(lab.q.ticks, "beat", newest - 10_000)
    await rig.leadership.step()
    await rig.ticker.step()
    (entry,) = rig.ticker.agenda
    entry.last, entry.due = newest / 1_000 - 3_600, newest / 1_000 - 3_590  # we led an hour ago; others fired since
    rig.leadership._trusted_until = -math.inf
    await rig.leadership.step()
    await rig.ticker.step()
    assert not events(caplog, "ticks missed")
    assert len(ticks_of(lab)) in {1, 2}
    await rig.close()


class Moody:
    """A user's own schedule."""

    def __init__(self, *answers: float | Exception) -> None:
        self.answers = answers

    def next(self, after: Any) -> float:
        answer = self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def previous(self, before: Any) -> float:
        return self.next(before)

    def explain(self) -> str:
        return "moody"


@pytest.mark.parametrize("schedule", [Moody(ZeroDivisionError("mine")), Moody(0.0)])
async def test_a_broken_schedule_is_set_aside(
    redis_url: str, lab: Lab, schedule: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = beating(redis_url)
    app.periodic["moody"] = app.periodic["beat"]._replace(name="moody", schedule=schedule)
    rig = Rig(redis_url, app)
    async with rig.running("lead", "periodic"):
        await eventually_async(lambda: len(ticks_of(lab)) >= 3)
    assert [said["schedule"] for said in events(caplog, "schedule failed")] == ["moody"]
    assert ticks_of(lab, "moody") == []


async def test_a_last_tick_that_is_no_number_is_set_aside(
    redis_url: str, lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    lab.raw.hset(lab.q.ticks, "beat", "text")
    rig = Rig(redis_url, beating(redis_url))
    await rig.leadership.step()
    await rig.ticker.step()
    assert await rig.ticker.step() == periodic.NAP
    assert len(events(caplog, "schedule failed")) == 1
    await rig.close()


async def test_the_next_ticks_are_known(redis_url: str, lab: Lab) -> None:
    rig = Rig(redis_url, beating(redis_url, 60))
    await rig.leadership.step()
    await rig.ticker.step()
    assert rig.ticker.upcoming == [("beat", Every(60).next(lab.now() / 1_000))]
    await rig.close()


async def test_nothing_is_scheduled(rig: Rig) -> None:
    await rig.leadership.step()
    assert await rig.ticker.step() == periodic.NAP
    await rig.close()


def test_arguments_that_do_not_fit_are_told_before_anything_runs(redis_url: str) -> None:
    app = fastq.FastQ(redis_url)

    @app.every(1, name="beat", kwargs={"nam": "x"})
    @app.task
    def beat(name: str) -> None: ...

    with pytest.raises(fastq.InvalidArguments, match="nam"):
        declared_by(app, "jobs:app")


@given(name=st.text(min_size=1, max_size=300), tick=st.integers(0, 10**14))
def test_the_id_of_a_tick_is_an_id(name: str, tick: int) -> None:
    assert check_id(job_id(name, tick)).endswith(f"@{tick}")


def test_ids_of_names_that_look_alike_differ() -> None:
    names = ["a b", "a_b", "a*b", "a@b", "report */5 * * * *", "report */6 * * * *", "x" * 90, "x" * 91, "ü", "ö"]
    assert len({job_id(name, 1) for name in names}) == len(names)
    assert job_id("nightly", 1_000) == "nightly@1000"


# -- prune -----------------------------------------------------------------------------------------


def bury(lab: Lab, ages_ms: Iterable[int]) -> None:
    now = lab.now()
    for n, age in enumerate(ages_ms):
        lab.raw.zadd(lab.q.dead, {f"d{n}": now - age})
        lab.raw.hset(lab.q.dead_jobs, f"d{n}", envelope())
        lab.raw.hset(lab.q.dead_errors, f"d{n}", b"error")


async def test_old_traces_are_pruned(redis_url: str, lab: Lab) -> None:
    rig = Rig(redis_url, dead_max_age=60)
    bury(lab, [61_000, 62_000, 59_000])
    lab.raw.hset(lab.q.producers, mapping={"busy": lab.now() * 1_000, "idle": (lab.now() - HOUR - 1_000) * 1_000})
    lab.raw.zadd(lab.q.done, {"1000:1": lab.now() - 1, "1000:2": lab.now() + HOUR})
    await rig.leadership.step()
    assert await rig.pruner.step() == maintenance.PRUNE
    assert [member for member, _ in lab.value("dead")] == ["d2"]
    assert set(lab.value("dead:jobs")) == set(lab.value("dead:errors")) == {"d2"}
    assert set(lab.value("producers")) == {"busy"}
    assert [member for member, _ in lab.value("done")] == ["1000:2"]
    assert rig.counted("pruned") == 4
    await rig.close()


async def test_a_round_of_pruning_is_bounded_and_goes_on(rig: Rig, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "PRUNE_CALLS", 2)
    monkeypatch.setattr(maintenance, "PRUNE_BATCH", 100)
    old = (lab.now() - 2 * HOUR) * 1_000
    lab.raw.hset(lab.q.producers, mapping={f"p{n}": old for n in range(1_000)})
    await rig.leadership.step()
    left = [1_000]
    while left[-1] and len(left) < 10:
        await rig.pruner.step()
        left.append(lab.raw.hlen(lab.q.producers))
    assert 3 <= len(left) < 9
    assert left[-1] == 0
    assert sorted(set(left), reverse=True) == left
    await rig.close()


def test_every_counter_is_one_of_the_table() -> None:
    assert {"promoted", "fired", "recovered", "poisoned", "pruned", "round_trips", "redis_errors", "reconnects"} <= set(
        COUNTERS
    )


# -- outages ---------------------------------------------------------------------------------------


async def test_an_outage_is_told_once_and_survived(make_server: MakeServer, caplog: pytest.LogCaptureFixture) -> None:
    """F-17: Redis restarts; every loop resumes, nothing that was due meanwhile is lost."""
    caplog.set_level(logging.INFO)
    server = make_server(appendonly=True)
    with connect(server.url) as raw:
        lab = Lab(server.url, raw)
        rig = Rig(server.url, beating(server.url, misfire="all"))
        async with rig.running():
            await eventually_async(lambda: ticks_of(lab))
            lab.enqueue(delayed("due", 300))
            server.shutdown()
            await eventually_async(lambda: rig.counted("redis_errors") >= 5)
            server.start()
            fresh = connect(server.url)
            back = Lab(server.url, fresh)
            await eventually_async(lambda: "due" in back.ready())
            count = len(ticks_of(back))
            await eventually_async(lambda: len(ticks_of(back)) > count + 3)
            ticks = ticks_of(back)
        assert ticks == list(range(ticks[0], ticks[0] + 100 * len(ticks), 100))
        assert len(events(caplog, "redis unavailable, retrying")) == 1
        assert len(events(caplog, "redis is back")) == 1
        assert rig.counted("reconnects") >= 1
        fresh.close()
        for each in (lab, back):
            each.conn.close()
