"""schedule.lua, unschedule.lua, suspend.lua, trace.lua: the definitions of schedules and what is known of their runs."""

from __future__ import annotations

from fastq.broker import timing
from fastq.broker.command import Command
from fastq.broker.keys import bucket_of
from fastq.broker.timing import Fired
from fastq.job import JobRecord, encode
from tests.redis.lab import Lab, envelope


def put(
    lab: Lab, seen: bytes, new: bytes, *, begin: bool = False, most: int = 10, name: str = "nightly"
) -> Command[int]:
    return timing.schedule(lab.q, name, seen, new, begin=begin, most=most)


# -- schedule ------------------------------------------------------------------------------------


def test_a_new_schedule_begins_now(lab: Lab) -> None:
    assert lab.twice(put(lab, b"", b"one")) == (1, 1)
    assert lab.keys() == {"schedules": {"nightly": b"one"}, "ticks": lab.value("ticks")}
    assert int(lab.value("ticks")["nightly"]) == lab.near()


def test_a_schedule_that_was_fired_before_it_had_a_definition_goes_on(lab: Lab) -> None:
    lab.raw.hset(lab.q.ticks, "nightly", 1_000)
    assert lab.call(put(lab, b"", b"one")) == 1
    assert lab.value("ticks") == {"nightly": b"1000"}


def test_a_changed_timing_begins_anew_and_others_do_not(lab: Lab) -> None:
    lab.call(put(lab, b"", b"one"))
    lab.raw.hset(lab.q.ticks, "nightly", 1_000)
    assert lab.call(put(lab, b"one", b"two")) == 1
    assert lab.value("ticks") == {"nightly": b"1000"}
    assert lab.twice(put(lab, b"two", b"three", begin=True)) == (1, 1)
    assert int(lab.value("ticks")["nightly"]) == lab.near()


def test_what_another_has_stored_meanwhile_is_not_overwritten(lab: Lab) -> None:
    lab.call(put(lab, b"", b"theirs"))
    assert lab.call(put(lab, b"", b"mine")) == 0
    assert lab.call(put(lab, b"gone", b"mine")) == 0
    assert lab.value("schedules") == {"nightly": b"theirs"}


def test_a_queue_has_so_many_schedules(lab: Lab) -> None:
    assert lab.call(put(lab, b"", b"one", most=1)) == 1
    assert lab.call(put(lab, b"", b"one", most=1, name="other")) == -1
    assert lab.call(put(lab, b"one", b"two", most=1)) == 1
    assert lab.value("schedules") == {"nightly": b"two"}


# -- unschedule ------------------------------------------------------------------------------------


def test_a_removed_schedule_leaves_nothing_but_its_jobs(lab: Lab) -> None:
    lab.call(put(lab, b"", b"one"))
    lab.call(timing.fire(lab.q, 5, "nightly", 9**15, "a", envelope(), b"one"))
    lab.call(timing.suspend(lab.q, "nightly", pause=True))
    assert lab.twice(timing.unschedule(lab.q, "nightly")) == (True, False)
    assert lab.keys() == {"jobs": {"a": envelope()}, "ready:5": ["a"], "wake": ["1"]}


def test_only_what_was_seen_is_removed(lab: Lab) -> None:
    lab.call(put(lab, b"", b"theirs"))
    assert not lab.call(timing.unschedule(lab.q, "nightly", b"mine"))
    assert lab.value("schedules") == {"nightly": b"theirs"}
    assert lab.call(timing.unschedule(lab.q, "nightly", b"theirs"))


# -- suspend ----------------------------------------------------------------------------------------


def test_a_pause_drops_the_ticks_that_pass(lab: Lab) -> None:
    lab.call(put(lab, b"", b"one"))
    lab.raw.hset(lab.q.ticks, "nightly", 1_000)
    assert lab.twice(timing.suspend(lab.q, "nightly", pause=True)) == (True, True)
    assert lab.value("suspended") == {"nightly"}
    assert lab.value("ticks") == {"nightly": b"1000"}
    assert lab.twice(timing.suspend(lab.q, "nightly", pause=False)) == (True, True)
    assert lab.value("suspended") is None
    assert int(lab.value("ticks")["nightly"]) == lab.near()


def test_a_resume_never_goes_back(lab: Lab) -> None:
    """A clock that was set back must not let a tick fire twice."""
    lab.call(put(lab, b"", b"one"))
    far = lab.now() + 10**9
    lab.raw.hset(lab.q.ticks, "nightly", far)
    lab.call(timing.suspend(lab.q, "nightly", pause=True))
    lab.call(timing.suspend(lab.q, "nightly", pause=False))
    assert int(lab.value("ticks")["nightly"]) == far


def test_what_is_not_there_cannot_be_paused(lab: Lab) -> None:
    assert not lab.call(timing.suspend(lab.q, "nightly", pause=True))
    assert lab.keys() == {}


# -- trace -------------------------------------------------------------------------------------------


def ran(lab: Lab, state: str) -> bytes:
    return encode(JobRecord(state, "t", 0, 0, lab.now(), 1))


def test_how_runs_ended_is_written_down(lab: Lab) -> None:
    lab.call(put(lab, b"", b"one"))
    lab.register()
    for tick, job in enumerate(("lives", "good", "bad", "gone", "called-off"), 9**15):
        assert lab.call(timing.fire(lab.q, 5, "nightly", tick, job, envelope(), b"one")) is Fired.ENQUEUED
    lab.reserve(5)
    name, expires = bucket_of(60, lab.now())
    records = [(name, expires, "good", ran(lab, "success")), (name, expires, "called-off", ran(lab, "cancelled"))]
    lab.settle(recorded=records, failed=[("bad", envelope(), b"error")], succeeded=["gone"])
    assert lab.twice(timing.trace(lab.q, ["nightly", "no such"])) == ([1, 0], [1, 0])
    lines = [line.split(" ") for line in lab.value("runs")["nightly"].decode().splitlines()]
    assert [(job, state) for _, job, _, state in lines] == [
        ("called-off", "cancelled"),
        ("gone", "finished"),
        ("bad", "failed"),
        ("good", "success"),
        ("lives", "open"),
    ]
    assert [int(at) for _, _, at, _ in lines] == [lab.near()] * 5
