"""fire.lua: each tick of a schedule makes one job, whoever asks and however often."""

from __future__ import annotations

from fastq.broker import commands
from fastq.broker.commands import Command
from tests.redis.lab import Lab, envelope

E = envelope()


def fire(lab: Lab, tick: int, job_id: str, schedule: str = "nightly", priority: int = 5) -> Command[bool]:
    return commands.fire(lab.q, priority, schedule, tick, job_id, envelope(priority))


def test_a_tick_makes_a_job(lab: Lab) -> None:
    assert lab.twice(fire(lab, 1_000, "a")) == (True, False)
    assert lab.keys() == {"ticks": {"nightly": b"1000"}, "jobs": {"a": E}, "ready:5": ["a"], "wake": ["1"]}


def test_two_schedulers_at_once_make_one_job(lab: Lab) -> None:
    """F-54, I10: their ids differ; the compare-and-set on the tick decides."""
    assert lab.call(fire(lab, 1_000, "mine"))
    assert not lab.call(fire(lab, 1_000, "yours"))
    assert lab.jobs() == {"mine"}


def test_a_scheduler_that_woke_up_late_fires_nothing_old(lab: Lab) -> None:
    lab.call(fire(lab, 2_000, "new"))
    assert not lab.call(fire(lab, 1_000, "old"))
    assert lab.value("ticks") == {"nightly": b"2000"}
    assert lab.jobs() == {"new"}


def test_later_ticks_and_other_schedules_fire(lab: Lab) -> None:
    assert lab.call(fire(lab, 1_000, "a"))
    assert lab.call(fire(lab, 2_000, "b"))
    assert lab.call(fire(lab, 1_000, "c", "hourly", priority=8))
    assert lab.ready() == ["c", "a", "b"]
    assert lab.value("ticks") == {"nightly": b"2000", "hourly": b"1000"}


def test_ticks_are_compared_as_numbers(lab: Lab) -> None:
    assert lab.call(fire(lab, 999_999_999_999, "a"))
    assert lab.call(fire(lab, 1_795_305_600_000, "b"))


def test_an_id_that_lives_is_not_made_twice(lab: Lab) -> None:
    """The job of the tick before is still there under the same id: the tick is done, the job is one."""
    lab.enqueue("a")
    before = lab.keys()
    assert lab.call(fire(lab, 1_000, "a"))
    assert lab.keys() == {**before, "ticks": {"nightly": b"1000"}}


def test_a_tick_fired_while_paused_waits(lab: Lab) -> None:
    lab.raw.set(lab.q.paused, "1")
    assert lab.call(fire(lab, 1_000, "a"))
    lab.register()
    assert lab.reserve().ids == []
    assert lab.ready() == ["a"]
