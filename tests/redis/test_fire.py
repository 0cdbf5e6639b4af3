"""fire.lua: each tick of a schedule makes one job, whoever asks and however often."""

from __future__ import annotations

from typing import Any

from fastq.broker import timing
from fastq.broker.command import Command
from fastq.broker.timing import Fired
from tests.redis.lab import Lab, envelope

E = envelope()


def fire(
    lab: Lab, tick: int, job_id: str, schedule: str = "nightly", priority: int = 5, **options: Any
) -> Command[Fired]:
    lab.raw.hset(lab.q.schedules, schedule, b"definition")
    return timing.fire(lab.q, priority, schedule, tick, job_id, envelope(priority), b"definition", **options)


def states(lab: Lab, schedule: str = "nightly") -> list[tuple[str, str]]:
    """The runs that are remembered: job and state, the newest first."""
    lines = lab.value("runs")[schedule].decode().splitlines()
    return [(line.split(" ")[1], line.split(" ")[3]) for line in lines]


def test_a_tick_makes_a_job(lab: Lab) -> None:
    assert lab.twice(fire(lab, 1_000, "a")) == (Fired.ENQUEUED, Fired.BEFORE)
    assert lab.keys("schedules", "runs") == {
        "ticks": {"nightly": b"1000"},
        "jobs": {"a": E},
        "ready:5": ["a"],
        "wake": ["1"],
    }
    (run,) = lab.value("runs").values()
    tick, job, at, state = run.decode().split(" ")
    assert (tick, job, state) == ("1000", "a", "open")
    assert int(at) == lab.near()


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
    assert lab.keys("schedules", "runs") == {**before, "ticks": {"nightly": b"1000"}}


def test_a_tick_fired_while_paused_waits(lab: Lab) -> None:
    lab.raw.set(lab.q.paused, "1")
    assert lab.call(fire(lab, 1_000, "a"))
    lab.register()
    assert lab.reserve().ids == []
    assert lab.ready() == ["a"]


# -- what is stored decides ----------------------------------------------------------------------


def test_only_the_stored_definition_fires(lab: Lab) -> None:
    """A scheduler that holds an old definition: changed, removed or paused ones fire no more."""
    old = fire(lab, 1_000, "a")
    lab.raw.hset(lab.q.schedules, "nightly", b"another")
    assert lab.call(old) is Fired.CHANGED
    lab.raw.hdel(lab.q.schedules, "nightly")
    assert lab.call(old) is Fired.CHANGED
    paused = fire(lab, 1_000, "a")
    lab.raw.sadd(lab.q.suspended, "nightly")
    assert lab.call(paused) is Fired.CHANGED
    assert lab.keys("schedules", "suspended") == {}


def test_by_hand_twice_is_once_also_when_it_has_run(lab: Lab) -> None:
    by_hand = fire(lab, 0, "nightly@7.abc")
    lab.raw.sadd(lab.q.suspended, "nightly")
    assert lab.call(by_hand) is Fired.ENQUEUED
    lab.raw.hdel(lab.q.jobs, "nightly@7.abc")  # it has run and left nothing
    assert lab.call(by_hand) is Fired.BEFORE
    assert lab.jobs() == set()
    assert lab.value("ticks") is None


def test_jitter_puts_a_job_off(lab: Lab) -> None:
    assert lab.twice(fire(lab, 1_000, "a", delay_ms=5_000)) == (Fired.ENQUEUED, Fired.BEFORE)
    assert lab.value("due") == [("a", lab.near(5_000))]
    assert lab.value("due:wake") == ["1"]
    assert lab.ready() == []


# -- overlap ----------------------------------------------------------------------------------------


def test_a_tick_is_skipped_while_enough_jobs_live(lab: Lab) -> None:
    """F098: max_instances=2, overlap="skip"; a job that has ended makes room."""
    some = {"overlap": "skip", "most": 2}
    assert lab.call(fire(lab, 1_000, "a", **some)) is Fired.ENQUEUED
    assert lab.call(fire(lab, 2_000, "b", **some)) is Fired.ENQUEUED
    assert lab.twice(fire(lab, 3_000, "c", **some)) == (Fired.SKIPPED, Fired.BEFORE)
    assert states(lab) == [("c", "skipped"), ("b", "open"), ("a", "open")]
    lab.raw.hdel(lab.q.jobs, "a")
    assert lab.call(fire(lab, 4_000, "d", **some)) is Fired.ENQUEUED
    assert lab.jobs() == {"b", "d"}


def test_a_tick_is_held_back_while_a_job_lives(lab: Lab) -> None:
    some = {"overlap": "queue", "most": 1}
    lab.call(fire(lab, 1_000, "a", **some))
    before = lab.keys()
    assert lab.call(fire(lab, 2_000, "b", **some)) is Fired.HELD
    assert lab.keys() == before
    lab.raw.hdel(lab.q.jobs, "a")
    assert lab.call(fire(lab, 2_000, "b", **some)) is Fired.ENQUEUED


def test_a_job_that_lives_is_remembered_whatever_comes_after(lab: Lab) -> None:
    """A long job and forty skipped ticks: the list of runs is bounded, and the job that lives is not pushed out."""
    some = {"overlap": "skip", "most": 1}
    lab.call(fire(lab, 1, "long", **some))
    for tick in range(2, 42):
        assert lab.call(fire(lab, tick, f"j{tick}", **some)) is Fired.SKIPPED
    found = states(lab)
    assert len(found) == 20
    assert found[0] == ("j41", "skipped")
    assert found[-1] == ("long", "open")
    assert lab.jobs() == {"long"}
