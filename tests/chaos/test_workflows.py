"""Workflows while their workers, and the schedulers, are killed."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

import fastq
from fastq.broker.command import Operation, raw
from tests.chaos import jobs
from tests.chaos.test_kills import at_rest
from tests.conftest import eventually
from tests.process.fleet import PATIENCE, Fleet

MakeFleet = Callable[..., Fleet]
SCALE = int(os.environ.get("CHAOS_SCALE", "1"))
PAUSE = 0.4
"""Seconds between two kills."""


def test_a_chord_of_1000_calls_back_once_whatever_is_killed(make_fleet: MakeFleet, redis_url: str) -> None:
    """F-60, F118: workers die by SIGKILL throughout the header; every piece counts once, the callback runs once."""
    fleet = make_fleet(redis_url, workers=2, concurrency=5, max_deliveries=1_000).serving()
    assert fleet.producer
    header = [jobs.piece.s(number) for number in range(1_000)]
    flow = fastq.chord(header, jobs.whole.s("whole")).enqueue_sync(on_failure=jobs.whole.si([], "failure"))
    dice, killed = random.Random(1), 0
    for done in range(100, 1_000, 150):
        eventually(lambda done=done: len(fleet.story().done) >= done, PATIENCE)
        fleet.kill(dice.choice(eventually(fleet.workers, PATIENCE)))
        killed += 1
    status = flow.wait_sync(PATIENCE)
    assert status is not None
    assert (status.state, status.total, status.success) == ("success", 1_001, 1_001)
    assert flow.result_sync(PATIENCE) == sum(range(1_000))
    story = fleet.story()
    assert story.lost(map(str, range(1_000))) == set()
    assert len(story.of("d", "whole")) == 1
    assert story.of("s", "failure") == []
    assert killed == 6


def test_a_poisoned_piece_ends_its_chord(make_fleet: MakeFleet, redis_url: str) -> None:
    """F-59: a worker that dies with a job, again and again, is a failure of that job, and the workflow ends."""
    fleet = make_fleet(redis_url, workers=1, concurrency=5, max_deliveries=1).serving()
    assert fleet.producer
    header = [jobs.piece.s(1), jobs.piece.s(2, 1_000.0)]
    flow = fastq.chord(header, jobs.whole.s("whole")).enqueue_sync(on_failure=jobs.whole.si([], "failure"))
    fleet.until_started("2")
    fleet.until_done(["1"])
    eventually(lambda: (status := flow.status_sync()) is not None and status.success == 1, PATIENCE)
    fleet.kill(fleet.workers()[0])
    status = flow.wait_sync(PATIENCE)
    assert status is not None
    assert (status.state, status.success, status.failed, status.skipped) == ("failed", 1, 1, 1)
    fleet.until_done(["failure"])
    assert len(fleet.story().of("d", "failure")) == 1


def test_a_chord_a_chain_and_a_schedule_whatever_is_killed(
    make_fleet: MakeFleet, redis_url: str, dice: random.Random, figure: Callable[[str], None]
) -> None:
    """F-53, F-60, F115, F118: workers and leading schedulers die by SIGKILL throughout. Every piece counts once, the callback comes once,
    the chain arrives, each second is ticked once, no workflow stays open. ``make chaos``: a chord of 10,000, a chain of 1,000.
    """
    fleet = make_fleet(redis_url, workers=2, concurrency=10, max_deliveries=1_000).serving()
    make_fleet(redis_url).start("scheduler", "jobs:app")  # stands by
    app = fleet.producer
    assert app
    pieces, steps = 2_000 * SCALE, 200 * SCALE
    app.schedule_interval_sync(jobs.beat, 1, name="beat", misfire="all")
    header = [jobs.piece.s(number, 0.02) for number in range(pieces)]
    chord = fastq.chord(header, jobs.whole.s("whole")).enqueue_sync(on_failure=jobs.whole.si([], "failure"))
    line = [jobs.piece.s(-1, 0.0), *(jobs.piece.s(0.0) for _ in range(steps - 1))]
    chain = fastq.chain(*line).enqueue_sync(on_failure=jobs.whole.si([], "failure"))
    kills, killed = {"worker": 0, "scheduler": 0}, set[int]()
    while not all((status := flow.status_sync()) and status.final for flow in (chord, chain)):
        role = "scheduler" if sum(kills.values()) % 5 == 4 else "worker"
        living = fleet.workers() if role == "worker" else fleet.pids(role)[-1:]
        if living:
            fleet.kill(pid := dice.choice(living))
            killed.add(pid)
            kills[role] += 1
        time.sleep(PAUSE)  # the pace of the kills
    states = [flow.status_sync() for flow in (chord, chain)]
    assert [(each.state, each.total, each.success) for each in states if each] == [
        ("success", pieces + 1, pieces + 1),
        ("success", steps, steps),
    ]
    assert chord.result_sync(PATIENCE) == sum(range(pieces))
    assert chain.result_sync(PATIENCE) == -1
    now = app.run_sync(_time())
    # Those of a killed leader's time come at once, and side by side: the last one may be done before the others are.
    eventually(lambda: _gapless(ticks := _ticks(fleet)) and max(ticks) >= now, PATIENCE)
    app.unschedule_sync("beat")
    ticks = eventually(lambda: _gapless(found := _ticks(fleet)) and found, PATIENCE)
    story = fleet.story()
    assert story.of("s", "failure") == []
    *before, last = [event.pid for event in story.of("s", "whole")]  # it ran again only where its worker was killed
    assert set(before) <= killed - {last}
    assert len(set(before)) == len(before)
    assert kills["worker"] > 0
    figure(f"chord of {pieces:,}, chain of {steps:,}, {len(ticks)} ticks, killed: {kills}")


def _ticks(fleet: Fleet) -> set[int]:
    return {int(key.removeprefix("beat@")) for key in fleet.story().done if key.startswith("beat@")}


def _gapless(ticks: set[int]) -> bool:
    return bool(ticks) and sorted(ticks) == list(range(min(ticks), max(ticks) + 1, 1_000))


def _time() -> Operation[int]:
    seconds, _ = yield raw("TIME")
    return int(seconds) * 1_000


def test_a_piece_dropped_from_a_chord_is_found(make_fleet: MakeFleet, redis_url: str, raw: Any) -> None:
    """The planted bug `recover_drops` is found: the callback of the tests above does not come."""
    fleet = make_fleet(redis_url, workers=1, concurrency=10, max_deliveries=1_000).serving(plant="recover_drops")
    header = [jobs.piece.s(number, 0.02) for number in range(100)]
    assert fleet.producer
    flow = fastq.chord(header, jobs.whole.s("whole")).enqueue_sync()
    eventually(lambda: len(fleet.story().done) >= 30, PATIENCE)
    fleet.kill(fleet.workers()[0])
    eventually(lambda: at_rest(raw), PATIENCE)
    assert fleet.stop() == 0
    status = flow.status_sync()
    assert status is not None
    assert status.state == "running"
    assert (
        status.success < 100
    )  # whether the dropped ones were still to run or had ended, unsettled, is a matter of the moment
    assert fleet.story().of("s", "whole") == []
