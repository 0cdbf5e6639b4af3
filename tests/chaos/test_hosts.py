"""What happens when the supervisor, or everything on a host, is gone, or stands still for a while (F-08, F-10)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import alive, eventually
from tests.process.fleet import LEASE, PATIENCE, Fleet, Story

MakeFleet = Callable[..., Fleet]
Figure = Callable[[str], None]

HANG = 2.0  # seconds of a blocked loop until its worker is killed; the least that can be set
KEYS = [f"k{n}" for n in range(20)]


@pytest.fixture
def two(make_fleet: MakeFleet, redis_url: str) -> tuple[Fleet, Fleet]:
    """Two hosts that write into one event file. All jobs run on the first; the second leads and waits."""
    standby = make_fleet(redis_url, workers=1, concurrency=len(KEYS))
    first = make_fleet(redis_url, workers=2, concurrency=len(KEYS) // 2)
    first.events = standby.events
    return first, standby


def begin(first: Fleet, standby: Fleet, task: str, *, plant: str = "") -> None:
    """The standby's scheduler leads, its worker is quiet, the first host has started every job."""
    standby.serving().until_logged("scheduler leads")
    standby.send(signal.SIGTSTP)
    standby.until_logged("worker quiet")
    first.serving(plant=plant)
    first.enqueue_many(task, ((key, str(standby.gate())) for key in KEYS))
    standby.until_started(*KEYS)
    standby.send(signal.SIGCONT)
    standby.until_logged("worker resumes")


def restarted_by(fleet: Fleet) -> float:
    """When a worker of this fleet has started every job; monotonic seconds."""
    (pid,) = fleet.workers()

    def starts() -> list[float]:
        found = [e.at for e in fleet.story().of("s") if e.pid == pid]
        return found if len(found) >= len(KEYS) else []

    return max(eventually(starts, PATIENCE))


def test_the_supervisor_is_killed(two: tuple[Fleet, Fleet], raw: Any, figure: Figure) -> None:
    """F-08: no orphans after a second, and the monitor has handed the jobs back before it went."""
    first, standby = two
    begin(first, standby, "gated")
    family = first.family()
    assert len(family) == 5
    killed = time.monotonic()
    first.send(signal.SIGKILL)
    first.wait()
    eventually(lambda: not any(alive(pid) for pid in family), PATIENCE)
    gone = time.monotonic() - killed
    restarted = restarted_by(standby) - killed
    figure(f"{len(family)} processes gone after {gone:.3f} s, all {len(KEYS)} jobs restarted after {restarted:.3f} s")
    assert gone <= 1.0
    assert restarted <= 1.0
    standby.gate().touch()
    story = standby.until_done(KEYS)
    assert {len(starts) for starts in story.starts.values()} == {2}
    assert standby.stop() == 0


def test_the_whole_host_is_killed(two: tuple[Fleet, Fleet], raw: Any, figure: Figure) -> None:
    """F-08: nobody is left to hand the jobs back; the lease is the rescue, and the scheduler of another host."""
    first, standby = two
    begin(first, standby, "gated")
    killed = time.monotonic()
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    restarted = restarted_by(standby) - killed
    figure(f"all {len(KEYS)} jobs restarted after {restarted:.3f} s, lease {LEASE} s")
    assert restarted <= LEASE + 1.0
    standby.gate().touch()
    story = standby.until_done(KEYS)
    assert {len(starts) for starts in story.starts.values()} == {2}
    assert standby.stop() == 0


def pause_a_host(first: Fleet, standby: Fleet, *, seconds: float = 0.0, plant: str = "") -> None:
    """Stop the first host for longer than its lease; the standby does its jobs; then the first one wakes up."""
    first.environ["LOSER"] = "1"
    begin(first, standby, "gated_retry", plant=plant)
    stopped = time.monotonic()
    os.killpg(first.pid, signal.SIGSTOP)
    restarted_by(standby)
    standby.gate().touch()
    standby.until_done(KEYS)
    eventually(lambda: time.monotonic() > stopped + seconds, PATIENCE)
    os.killpg(first.pid, signal.SIGCONT)


def started_too_often(story: Story) -> set[str]:
    """One lost lease, one more start (I5): the outcomes of those that lost it have no effect (I3)."""
    return {key for key, starts in story.starts.items() if len(starts) > 2}


def test_a_host_stands_still(two: tuple[Fleet, Fleet], raw: Any, figure: Figure) -> None:
    """F-10: the woken workers find their leases lost, drop their outcomes, and go on under a new name."""
    first, standby = two
    first.environ["FASTQ_HANG_TIMEOUT"] = str(HANG)
    pause_a_host(first, standby, seconds=1.5 * HANG)
    workers = first.workers()
    first.until_logged("worker lost its lease", len(workers))
    first.until_logged("worker ready", 2 * len(workers))
    refused = sum(line["count"] for line in first.logged("outcomes dropped, lease lost"))
    interrupted = sum(line["jobs"] for line in first.logged("worker lost its lease"))
    figure(
        f"{len(KEYS)} jobs of two leases that were lost: {interrupted} interrupted, {refused} outcomes refused, 0 counted"
    )
    assert refused + interrupted == len(KEYS)
    assert refused
    last = f"k{len(KEYS)}"
    standby.send(signal.SIGTSTP)
    standby.until_logged("worker quiet", 2)
    first.environ.pop("LOSER")
    first.enqueue("step", last)
    story = first.until_done([last])
    assert story.starts[last][0].pid in workers
    assert story.lost(KEYS) == started_too_often(story) == set()
    assert first.logged("worker exited") == first.logged("worker hangs, killing it") == []
    assert (first.stop(), standby.stop()) == (0, 0)


def test_a_settle_without_its_fence_is_found(two: tuple[Fleet, Fleet], raw: Any) -> None:
    """The analysis of F-10 turns red when ``settle.lua`` does not look whose job it is."""
    first, standby = two
    pause_a_host(first, standby, plant="unfenced_settle")
    first.until_logged("worker lost its lease", 2)
    assert (first.stop(), standby.stop()) == (0, 0)
    assert started_too_often(first.story())


def test_poison_in_containers(make_fleet: MakeFleet, redis_url: str, raw: Any, figure: Figure) -> None:
    """F-07: with no supervisor to see the deaths, the leases tell: one job is buried, its neighbours are done."""
    keeper = make_fleet(redis_url).start("scheduler", "jobs:app")
    keeper.until_logged("scheduler leads")
    container = make_fleet(redis_url, concurrency=10)
    good = [f"good{n}" for n in range(30)]
    container.enqueue_many("once", ((key, 0.02) for key in good[:8]))
    poison = container.enqueue("deadly", "poison", "SIGKILL")
    container.enqueue_many("once", ((key, 0.02) for key in good[8:]))
    for _ in range(3):
        container.start("worker", "jobs:app")
        assert container.wait() == -signal.SIGKILL
    container.start("worker", "jobs:app")
    container.until_done(good)
    eventually(lambda: raw.zcard("fastq:{default}:dead") == 1, PATIENCE)
    assert [letter.id for letter in container.producer.dead.list_sync("default")] == [poison]
    figure(f"3 workers died of one job, which is a dead letter; {len(good)} of {len(good)} neighbours done")
    assert (container.stop(), keeper.stop()) == (0, 0)
