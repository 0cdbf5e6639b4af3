"""enqueue.lua: what is accepted is in the jobs hash and in one more place; what is refused leaves no trace."""

from __future__ import annotations

import pytest

from fastq.broker import commands
from fastq.broker.commands import BATCH, NewJob, Refused
from fastq.broker.keys import PRIORITIES
from fastq.errors import BrokerReplyError
from tests.redis.lab import FAR, Lab, envelope

E = envelope()


def chosen(job_id: str, **options: int | str) -> NewJob:
    return NewJob(job_id, E, chosen=True, **options)  # type: ignore[arg-type]


def test_plain_jobs_are_pending_in_the_order_of_the_call(lab: Lab) -> None:
    assert lab.enqueue("a", "b") == []
    assert lab.keys() == {
        "jobs": {"a": E, "b": E},
        "ready:5": ["a", "b"],
        "wake": ["1"],
        "producers": {"p": b"1"},
    }


def test_a_full_call_without_delay_does_the_same(lab: Lab) -> None:
    assert lab.enqueue(chosen("a"), NewJob("b", E, delay_ms=-5)) == []
    assert lab.keys() == {
        "jobs": {"a": E, "b": E},
        "ready:5": ["a", "b"],
        "wake": ["1"],
        "producers": {"p": b"1"},
    }


@pytest.mark.parametrize("priority", range(PRIORITIES))
def test_each_priority_has_its_list(lab: Lab, priority: int) -> None:
    lab.enqueue("a", priority=priority)
    lab.enqueue(chosen("b"), priority=priority)
    assert lab.value(f"ready:{priority}") == ["a", "b"]


def test_a_delayed_job_is_due_at_its_time(lab: Lab) -> None:
    assert lab.enqueue(NewJob("a", E, delay_ms=FAR)) == []
    assert lab.keys() == {
        "jobs": {"a": E},
        "due": [("a", lab.near(FAR))],
        "due:wake": ["1"],
        "producers": {"p": b"1"},
    }


def test_only_a_new_head_wakes_the_scheduler(lab: Lab) -> None:
    lab.enqueue(NewJob("a", E, delay_ms=FAR))
    lab.raw.delete(lab.q.due_wake)
    lab.enqueue(NewJob("b", E, delay_ms=FAR + 60_000))
    assert lab.value("due:wake") is None
    lab.enqueue(NewJob("c", E, delay_ms=FAR - 60_000), NewJob("d", E, delay_ms=FAR))
    assert lab.value("due:wake") == ["1"]
    assert [member for member, _ in lab.value("due")] == ["c", "a", "d", "b"]


def test_there_is_one_wake_token_at_most(lab: Lab) -> None:
    for name in "abc":
        lab.enqueue(name)
        lab.enqueue(chosen(name * 2))
    assert lab.value("wake") == ["1"]


def test_who_comes_later_is_woken_too(lab: Lab) -> None:
    """The token was taken, and its taker has not reserved yet; or it lay there with nothing pending."""
    lab.enqueue("a")
    lab.raw.delete(lab.q.wake)
    lab.enqueue("b")
    assert lab.value("wake") == ["1"]
    lab.raw.delete(lab.q.ready[5])
    lab.enqueue("c", "d")
    assert lab.value("wake") == ["1"]


def test_a_paused_queue_takes_jobs(lab: Lab) -> None:
    lab.raw.set(lab.q.paused, "1")
    assert lab.enqueue("a") == []
    assert lab.ready() == ["a"]


# -- sent twice (F-33, F-37) ------------------------------------------------------------------


@pytest.mark.parametrize("job", [NewJob("a", E), NewJob("a", E, delay_ms=FAR), NewJob("a", E, unique="k")])
def test_a_repeated_call_changes_nothing(lab: Lab, job: NewJob) -> None:
    assert lab.twice(lab.enqueue_command(job)) == ([], [])
    assert lab.jobs() == {"a"}


@pytest.mark.parametrize("job", [NewJob("a", E), chosen("a", unique="k")])
def test_a_repeated_call_is_known_after_the_job_has_run_and_left_no_trace(lab: Lab, job: NewJob) -> None:
    """F-37: the id itself cannot tell; the producer's number does."""
    command = lab.enqueue_command(job)
    lab.register()
    lab.call(command)
    lab.reserve()
    lab.settle(succeeded=["a"])
    assert lab.twice(command) == ([], [])
    assert lab.jobs() == set()


def test_an_older_number_of_the_same_producer_is_a_repetition(lab: Lab) -> None:
    lab.enqueue("a", sequence=7)
    assert lab.enqueue("b", sequence=6) == []
    assert lab.enqueue("c", sequence=6, producer="other") == []
    assert lab.jobs() == {"a", "c"}
    assert lab.value("producers") == {"p": b"7", "other": b"6"}


def test_numbers_are_compared_as_numbers(lab: Lab) -> None:
    """Microseconds since the epoch have 16 digits; Lua counts to 2^53 exactly."""
    lab.enqueue("a", sequence=1_795_305_600_000_000)
    lab.enqueue("b", sequence=1_795_305_600_000_001)
    lab.enqueue("c", sequence=999_999_999_999_999)
    assert lab.jobs() == {"a", "b"}


def test_a_repeated_call_still_names_the_holder_of_the_unique_key(lab: Lab) -> None:
    """The caller would else wait for an id that was never stored."""
    lab.enqueue(NewJob("first", E, unique="k"))
    command = lab.enqueue_command(NewJob("x", E), NewJob("second", E, unique="k"), NewJob("y", E, unique="free"))
    refused = [Refused(1, "unique", b"first")]
    assert lab.twice(command) == (refused, refused)
    assert lab.jobs() == {"first", "x", "y"}


# -- refused ----------------------------------------------------------------------------------


def test_an_id_that_lives_is_refused_wherever_it_is(lab: Lab) -> None:
    lab.take("running")
    lab.enqueue("pending", NewJob("scheduled", E, delay_ms=FAR))
    before = lab.keys("producers")
    assert lab.enqueue(chosen("running"), chosen("pending"), chosen("scheduled", delay_ms=5)) == [
        Refused(0, "exists", b""),
        Refused(1, "exists", b""),
        Refused(2, "exists", b""),
    ]
    assert lab.keys("producers") == before


def test_the_second_of_two_equal_ids_in_a_call_is_refused(lab: Lab) -> None:
    assert lab.enqueue(chosen("a"), chosen("a")) == [Refused(1, "exists", b"")]
    assert lab.ready() == ["a"]


def test_an_id_in_the_dead_letter_queue_is_refused(lab: Lab) -> None:
    lab.take("a")
    lab.settle(failed=[("a", E, b"error")])
    before = lab.keys("producers")
    assert lab.enqueue(chosen("a")) == [Refused(0, "dead", b"")]
    assert lab.keys("producers") == before


def test_an_id_whose_record_is_kept_is_refused_with_the_record(lab: Lab) -> None:
    lab.take("a", "b")
    expires = lab.now() + FAR
    lab.settle(recorded=[("60000:1", expires, "a", b"record a"), ("3600000:1", expires + 1, "b", b"record b")])
    assert lab.enqueue(chosen("b"), chosen("c"), chosen("a")) == [
        Refused(0, "finished", b"record b"),
        Refused(2, "finished", b"record a"),
    ]
    assert lab.jobs() == {"c"}


def test_an_id_is_free_again_when_its_record_has_expired(lab: Lab) -> None:
    lab.take("a")
    lab.settle(recorded=[("1000:1", lab.now() - 1, "a", b"record")])
    assert lab.enqueue(chosen("a")) == []
    assert lab.jobs() == {"a"}


# -- unique keys --------------------------------------------------------------------------------


def test_one_live_job_holds_a_unique_key(lab: Lab) -> None:
    """I7: one job while one lives; the reply names it."""
    assert lab.enqueue(NewJob("a", E, unique="k"), NewJob("b", E, unique="k")) == [Refused(1, "unique", b"a")]
    assert lab.enqueue(NewJob("c", E, unique="k"), NewJob("d", E, unique="other", delay_ms=FAR)) == [
        Refused(0, "unique", b"a")
    ]
    assert lab.keys() == {
        "jobs": {"a": E, "d": E},
        "ready:5": ["a"],
        "due": [("d", lab.near(FAR))],
        "unique": {"k": b"a", "other": b"d"},
        "unique:of": {"a": b"k", "d": b"other"},
        "wake": ["1"],
        "due:wake": ["1"],
        "producers": {"p": b"2"},
        "said:p:1": b"1 unique a",
        "said:p:2": b"0 unique a",
    }


def test_a_job_refused_for_its_id_does_not_take_the_key(lab: Lab) -> None:
    lab.enqueue("a")
    assert lab.enqueue(chosen("a", unique="k")) == [Refused(0, "exists", b"")]
    assert lab.value("unique") is None


# -- cancelled ids ------------------------------------------------------------------------------


def test_a_cancelled_id_may_be_used_again_at_any_priority(lab: Lab) -> None:
    """The ready list still holds the first entry: one of the two is skipped, whichever comes first."""
    lab.enqueue("a", priority=2)
    lab.call(commands.cancel(lab.q, "a", [], b"", 0))
    assert lab.enqueue(NewJob("a", envelope(9), chosen=True), priority=9) == []
    lab.register()
    reserved = lab.reserve()
    assert (reserved.ids, reserved.envelopes) == ([b"a"], [envelope(9)])
    assert lab.value("ghosts") is None
    assert lab.ready() == []


# -- limits -------------------------------------------------------------------------------------


def test_a_call_of_full_size(lab: Lab) -> None:
    ids = [f"j{i}" for i in range(BATCH)]
    lab.enqueue(*ids)
    assert lab.ready() == ids
    lab.enqueue(*(NewJob(f"k{i}", E, i % 3, f"u{i}") for i in range(BATCH)))
    assert len(lab.jobs()) == 2 * BATCH
    assert len(lab.value("unique")) == BATCH


def test_where_lua_ends(lab: Lab) -> None:
    """`unpack` returns at most 7,998 values behind an index: 3,999 plain jobs. Far above BATCH; a full call has no end."""
    lab.enqueue(*(f"j{i}" for i in range(3_999)))
    assert len(lab.jobs()) == 3_999
    with pytest.raises(BrokerReplyError, match="too many results to unpack"):
        lab.enqueue(*(f"k{i}" for i in range(4_000)))
    assert len(lab.jobs()) == 3_999
    assert lab.enqueue(*(NewJob(f"u{i}", E, unique=f"u{i}") for i in range(10_000))) == []
    assert len(lab.jobs()) == 13_999
