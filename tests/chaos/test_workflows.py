"""Workflows while their workers are killed."""

from __future__ import annotations

import random
from collections.abc import Callable

import fastq
from tests.chaos import jobs
from tests.conftest import eventually
from tests.process.fleet import PATIENCE, Fleet

MakeFleet = Callable[..., Fleet]


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
