"""Workers are killed, at random moments and at named ones; every job is done (F-01, F-02, F-03)."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from fastq.broker.keys import PAD
from tests.conftest import eventually
from tests.process.fleet import PATIENCE, Fleet, Kill, Story, percentile
from tests.sound import assert_sound, checked

MakeFleet = Callable[..., Fleet]
Figure = Callable[[str], None]

SCALE = int(os.environ.get("CHAOS_SCALE", "1"))
"""So many times the jobs and kills; `make chaos` sets it."""


def left_in(client: Any) -> dict[str, int]:
    """What a queue still holds, apart from the workers' own pads."""
    queue = "fastq:{default}"
    jobs = sum(not name.startswith(b"~") for name in client.hkeys(f"{queue}:jobs"))
    ready = sum(client.llen(f"{queue}:ready:{priority}") for priority in range(11))
    counts = {
        "jobs": jobs, "ready": ready, "due": client.zcard(f"{queue}:due"), "dead": client.zcard(f"{queue}:dead"),
        "deliveries": client.hlen(f"{queue}:deliveries"),
    }  # fmt: skip
    return {name: n for name, n in counts.items() if n}


AT_REST = """
for _, held in ipairs(redis.call('KEYS', 'fastq:{default}:running:*')) do
  for _, job in ipairs(redis.call('SMEMBERS', held)) do if job ~= ARGV[1] then return 0 end end
end
for priority = 0, 10 do if redis.call('EXISTS', 'fastq:{default}:ready:' .. priority) == 1 then return 0 end end
return redis.call('ZCARD', 'fastq:{default}:due') == 0 and 1 or 0
"""


def at_rest(client: Any) -> bool:
    """Whether nothing waits, nobody holds a job, and so nothing more will happen to those that are there: at one moment."""
    return bool(client.eval(AT_REST, 0, PAD))


class KillRun:
    """Jobs are run while workers are killed: one after each ``1 / (kills + 1)`` of the jobs."""

    def __init__(self, fleet: Fleet, client: Any, dice: random.Random, *, jobs: int, kills: int) -> None:
        self.fleet = fleet
        self.client = client
        self.dice = dice
        self.keys = [f"k{n}" for n in range(jobs)]
        self.milestones = [jobs * n // (kills + 1) for n in range(1, kills + 1)]
        self.kills: list[Kill] = []

    def run(self) -> Story:
        ids = self.fleet.enqueue_many("once", ((key, 0.005) for key in self.keys))
        names = dict(zip(ids, self.keys, strict=True))
        for milestone in self.milestones:
            eventually(lambda wanted=milestone: len(self.fleet.story().done) >= wanted, PATIENCE)
            victim = self.dice.choice(self.fleet.until_serving(1))
            self.kills.append(self.fleet.kill_holding(victim, self.client, names))
        return self.fleet.story()


def test_random_kills_of_workers(
    make_fleet: MakeFleet, redis_url: str, raw: Any, dice: random.Random, figure: Figure
) -> None:
    """F-01: under a living supervisor nothing is lost, only what was in flight runs again, and within a second."""
    fleet = make_fleet(redis_url, workers=3, concurrency=2).serving(plant="hardy")
    run = KillRun(fleet, raw, dice, jobs=4_000 * SCALE, kills=15 * SCALE)
    run.run()
    story = fleet.until_done(run.keys)
    eventually(lambda: left_in(raw) == {}, PATIENCE)
    assert_sound(redis_url)
    assert story.lost(run.keys) == set()
    assert story.unexplained(run.kills) == []
    again, flying, waits = story.repeated(), story.in_flight(run.kills), story.recoveries(run.kills)
    figure(
        f"{len(run.kills)} kills, {len(run.keys)} jobs, 0 lost, {len(again)} run again of {flying} in flight; restart of "
        f"the interrupted p50 {percentile(waits, 0.5):.3f} s, p99 {percentile(waits, 0.99):.3f} s, max {max(waits):.3f} s"
    )
    assert len(again) <= flying
    assert percentile(waits, 0.99) <= 1.0
    assert len(fleet.logged("worker died, jobs handed back", end="signal SIGKILL")) == len(run.kills)
    assert fleet.stop() == 0
    assert raw.keys("*:running:*") == []


@pytest.mark.parametrize("point", ["after_reserve", "before_settle", "after_settle"])
def test_crashes_between_reserve_and_settle(make_fleet: MakeFleet, redis_url: str, raw: Any, point: str) -> None:
    """F-02, F-03: the worker dies at the worst lines; nothing is lost, and only what had to run again does."""
    fleet = make_fleet(redis_url, workers=2, concurrency=10).start(plant=point)
    keys = [f"k{n}" for n in range(300)]
    names = dict(zip(fleet.enqueue_many("once", ((key, 0.005) for key in keys)), keys, strict=True))
    story = fleet.until_done(keys)
    eventually(lambda: left_in(raw) == {}, PATIENCE)
    crashes = [json.loads(path.read_text()) for path in fleet.folder.glob(f"crash-{point}-*")]
    assert len(crashes) == 3
    dead = {crash["pid"] for crash in crashes}
    for crash in crashes:
        concerned = {names[job] for job in crash["jobs"]}
        began_there = {e.key for e in story.of("s") if e.pid == crash["pid"]}
        done_later = {e.key for e in story.of("d") if e.pid != crash["pid"]}
        if point == "after_reserve":
            assert not concerned & began_there, "the batch came back as if it had never been reserved"
        elif point == "before_settle":
            assert concerned <= done_later, "not settled: run again"
        else:
            assert not concerned & done_later, "settled: not run again"
    assert all(start.pid in dead for starts in story.starts.values() for start in starts[:-1])
    assert fleet.stop() == 0


def test_a_recovery_that_drops_jobs_is_found(
    make_fleet: MakeFleet, redis_url: str, raw: Any, dice: random.Random
) -> None:
    """The analysis of F-01 turns red when ``recover.lua`` forgets to make a job ready again."""
    fleet = make_fleet(redis_url, workers=2, concurrency=2).start(plant="recover_drops")
    fleet.until_serving(2)
    run = KillRun(fleet, raw, dice, jobs=400, kills=3)
    run.run()
    eventually(lambda: at_rest(raw), PATIENCE)
    assert fleet.stop() == 0
    assert fleet.story().lost(run.keys)
    faults = checked(redis_url).faults
    assert {fault.code for fault in faults} == {"lost"}
    assert checked(redis_url, repair=True).left == []
    ready = {job.decode() for job in raw.lrange("fastq:{default}:ready:5", 0, -1)}
    assert {fault.name for fault in faults} <= ready, "what was dropped can run again"
