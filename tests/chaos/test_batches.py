"""Batches while their workers are killed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.chaos import jobs
from tests.chaos.test_kills import at_rest
from tests.conftest import eventually
from tests.process.fleet import PATIENCE, Fleet

MakeFleet = Callable[..., Fleet]
JOBS = 3_000


def test_a_batch_of_3000_calls_back_once_whatever_is_killed(
    make_fleet: MakeFleet, redis_url: str, figure: Callable[[str], None]
) -> None:
    """F130: workers die by SIGKILL throughout; every job counts once, also those that ran twice; each callback is enqueued once."""
    fleet = make_fleet(redis_url, workers=2, concurrency=20, max_deliveries=1_000).serving()
    assert fleet.producer
    batch = fleet.producer.enqueue_batch_sync(
        "piece",
        (
            (number, 0.005 if number < JOBS - 1 else 2.0) for number in range(JOBS)
        ),  # the last one: not over before it was looked at
        on_complete=jobs.step.si("complete"),
        on_success=jobs.step.si("success"),
        on_failure=jobs.step.si("failure"),
    )
    dice, killed, seen = random.Random(7), set[int](), [0]
    for done in range(JOBS // 10, JOBS - 100, JOBS // 10):
        eventually(lambda done=done: len(fleet.story().done) >= done, PATIENCE)
        victim = dice.choice(eventually(lambda: [pid for pid in fleet.workers() if pid not in killed], PATIENCE))
        fleet.kill(victim)
        killed.add(victim)
        status = batch.status_sync()
        assert status is not None
        assert (status.state, status.total, status.failed + status.cancelled) == ("running", JOBS, 0)
        assert status.pending + status.running + status.success == JOBS
        assert status.success >= seen[-1]
        seen.append(status.success)
    status = batch.wait_sync(PATIENCE)
    assert status is not None
    assert (status.state, status.total, status.success, status.pending, status.running) == ("success", JOBS, JOBS, 0, 0)
    fleet.until_done(["complete", "success"])
    story = fleet.story()
    assert story.lost(map(str, range(JOBS))) == set()
    assert [len(story.of("d", which)) for which in ("complete", "success", "failure")] == [1, 1, 0]
    figure(
        f"{JOBS:,} jobs of a batch, {len(killed)} workers killed, {len(story.repeated())} jobs ran twice, each counted once"
    )


def test_poison_ends_its_batch(make_fleet: MakeFleet, redis_url: str) -> None:
    """F-59: a worker that dies with a job is a failure of that job, and the batch ends: on_failure, once."""
    fleet = make_fleet(redis_url, workers=1, concurrency=5, max_deliveries=1).serving()
    assert fleet.producer
    batch = fleet.producer.enqueue_batch_sync(
        "piece", [(1,), (2, 1_000.0)], on_failure=jobs.step.si("failure"), on_success=jobs.step.si("success")
    )
    fleet.until_started("2")
    fleet.until_done(["1"])
    eventually(lambda: (status := batch.status_sync()) is not None and status.success == 1, PATIENCE)
    fleet.kill(fleet.workers()[0])
    status = batch.wait_sync(PATIENCE)
    assert status is not None
    assert (status.state, status.success, status.failed) == ("failed", 1, 1)
    assert batch.failed_sync() == [f"{batch.id}-1"]
    fleet.until_done(["failure"])
    story = fleet.story()
    assert (len(story.of("d", "failure")), story.of("s", "success")) == (1, [])


def test_a_job_dropped_from_a_batch_is_found(make_fleet: MakeFleet, redis_url: str, raw: Any) -> None:
    """The planted bug `recover_drops` is found: the batch of the test above does not end."""
    fleet = make_fleet(redis_url, workers=1, concurrency=20, max_deliveries=1_000).serving(plant="recover_drops")
    assert fleet.producer
    batch = fleet.producer.enqueue_batch_sync(
        "piece", ((n, 0.02) for n in range(100)), on_success=jobs.step.si("success")
    )
    eventually(lambda: len(fleet.story().done) >= 30, PATIENCE)
    fleet.kill(fleet.workers()[0])
    eventually(lambda: at_rest(raw), PATIENCE)
    assert fleet.stop() == 0
    status = batch.status_sync()
    assert status is not None
    assert (status.state, status.total) == ("running", 100)
    assert status.success < 100
    assert fleet.story().lost(map(str, range(100)))
    assert fleet.story().of("s", "success") == []
