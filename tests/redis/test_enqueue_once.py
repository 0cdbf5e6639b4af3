"""enqueue_once.lua: who gets a unique key, how long it is held, and what becomes of the second job."""

from __future__ import annotations

import pytest

from fastq.broker import commands
from fastq.broker.commands import NewJob, Once, Refused
from tests.redis.lab import FAR, LEASE, Lab, envelope

E, F = envelope(), envelope(tag="second")
STARTED, TTL, BOTH = Once("started"), Once("ttl", LEASE), Once("both", LEASE)


def unique(name: str, data: bytes = E, delay: int = 0, once: Once = Once()) -> NewJob:
    return NewJob(name, data, delay, "k", once=once)


def ends(lab: Lab, how: str, name: str) -> None:
    """Bring a job that worker `w` holds to its end."""
    row = {
        "recorded": ("60000:1", lab.started + FAR, name, b"record"),
        "failed": (name, E, b"error"),
    }.get(how, name)
    assert lab.settle(**{how: [row]}).stale == []


# -- until it is executed ---------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["succeeded", "recorded", "failed", "cancel", "purge", "poison"])
def test_a_key_is_free_after_every_final_state(lab: Lab, end: str) -> None:
    """F309, I7."""
    lab.enqueue(unique("a"))
    if end == "cancel":
        lab.call(commands.cancel(lab.q, "a", [], b"", 0))
    elif end == "purge":
        lab.call(commands.purge(lab.q))
    else:
        lab.register()
        assert lab.reserve().ids == [b"a"]
        assert lab.enqueue(unique("b")) == [Refused(0, "unique", b"a")]
        if end == "poison":
            assert lab.recover(charge="all", max_deliveries=1).dead == 1
        else:
            ends(lab, end, "a")
    assert lab.value("unique") is None
    assert lab.value("unique:of") is None
    assert lab.enqueue(unique("c")) == []


@pytest.mark.parametrize("once", [Once(), BOTH])
def test_a_worker_that_dies_does_not_free_the_key_of_a_job_that_goes_on(lab: Lab, once: Once) -> None:
    """F-51: the key belongs to the job, not to a process."""
    lab.enqueue(unique("a", once=once))
    lab.register()
    lab.reserve()
    assert lab.recover(charge="all").ready == 1
    assert lab.enqueue(unique("b")) == [Refused(0, "unique", b"a")]
    lab.register()
    lab.reserve()
    lab.settle(later=[("a", FAR, E)])
    assert lab.enqueue(unique("b")) == [Refused(0, "unique", b"a")]


# -- until it is started ------------------------------------------------------------------------------


def test_the_key_ends_when_a_worker_takes_the_job(lab: Lab) -> None:
    lab.enqueue("other", unique("a", once=STARTED))
    assert lab.enqueue(unique("b", once=STARTED)) == [Refused(0, "unique", b"a")]
    assert lab.value("unique:start") == {"a": b"k"}
    lab.register()
    assert lab.reserve(1).ids == [b"other"]
    assert lab.value("unique") == {"k": b"a"}
    assert lab.reserve(1).ids == [b"a"]
    assert [lab.value(name) for name in ("unique", "unique:of", "unique:start")] == [None] * 3
    assert lab.enqueue(unique("b", once=STARTED)) == []
    ends(lab, "succeeded", "a")
    assert lab.value("unique") == {"k": b"b"}, "the first one's end frees nothing that is another's"


@pytest.mark.parametrize("end", ["cancel", "purge"])
def test_a_job_that_is_taken_out_before_it_starts_frees_its_key(lab: Lab, end: str) -> None:
    lab.enqueue(unique("a", delay=FAR, once=Once("started", most_ms=FAR)))
    if end == "cancel":
        lab.call(commands.cancel(lab.q, "a", [], b"", 0))
    else:
        lab.call(commands.purge(lab.q))
    assert [lab.value(name) for name in ("unique", "unique:of", "unique:start")] == [None] * 3


# -- for a time -----------------------------------------------------------------------------------------


def test_a_key_with_a_time_outlives_its_job(lab: Lab) -> None:
    lab.enqueue(unique("a", once=TTL))
    assert lab.value("unique") is None
    lab.register()
    lab.reserve()
    ends(lab, "succeeded", "a")
    assert lab.enqueue(unique("b", once=TTL)) == [Refused(0, "unique", b"a")]
    assert 0 < lab.raw.pttl(lab.key("unique:ttl:k")) <= LEASE
    lab.raw.delete(lab.key("unique:ttl:k"))  # its time is over
    assert lab.enqueue(unique("b", once=TTL)) == []


def test_an_idempotency_key_is_held_until_the_job_has_ended_and_its_time_is_over(lab: Lab) -> None:
    """F306."""
    lab.enqueue(unique("a", once=BOTH))
    lab.raw.delete(lab.key("unique:ttl:k"))
    assert lab.enqueue(unique("b", once=BOTH)) == [Refused(0, "unique", b"a")]
    lab.register()
    lab.reserve()
    ends(lab, "succeeded", "a")
    assert lab.enqueue(unique("b", once=BOTH)) == []
    lab.reserve()
    ends(lab, "succeeded", "b")
    assert lab.enqueue(unique("c", once=BOTH)) == [Refused(0, "unique", b"b")]


# -- replace ----------------------------------------------------------------------------------------------


def replacing(name: str, delay: int = 0, hold: str = "executed", most: int = 0) -> NewJob:
    return unique(name, F, delay, Once(hold, 0, "replace", most))


def test_a_pending_job_gets_the_new_arguments_and_keeps_its_place(lab: Lab) -> None:
    lab.enqueue(unique("a"), "later")
    assert lab.enqueue(replacing("b")) == [Refused(0, "replaced", b"a")]
    assert lab.value("jobs") == {"a": F, "later": E}
    assert lab.ready() == ["a", "later"]


def test_a_scheduled_job_is_due_anew(lab: Lab) -> None:
    lab.enqueue(unique("a", delay=FAR))
    assert lab.enqueue(replacing("b", FAR + 60_000)) == [Refused(0, "replaced", b"a")]
    assert lab.value("due") == [("a", lab.near(FAR + 60_000))]
    lab.raw.delete(lab.q.due_wake)
    lab.enqueue(replacing("c"))
    assert lab.value("due") == [("a", lab.near())]
    assert lab.value("due:wake") == ["1"], "the scheduler is told that it is due earlier"
    assert lab.jobs() == {"a"}


def test_a_running_job_is_not_replaced(lab: Lab) -> None:
    lab.enqueue(unique("a"))
    lab.register("v")
    lab.register("w")
    lab.reserve(1, "w")
    assert lab.enqueue(replacing("b")) == [Refused(0, "unique", b"a")]
    assert lab.value("jobs")["a"] == E


def test_a_retry_that_waits_is_replaced(lab: Lab) -> None:
    lab.enqueue(unique("a"))
    lab.register("w")
    lab.reserve(1, "w")
    lab.settle(later=[("a", FAR, E)])
    assert lab.enqueue(replacing("b")) == [Refused(0, "replaced", b"a")]
    assert lab.value("jobs")["a"] == F


def test_a_debounced_job_is_put_off_until_its_latest_time(lab: Lab) -> None:
    lab.enqueue(replacing("a", 1_000_000, "started", 1_500_000))
    lab.enqueue(replacing("b", 1_200_000, "started", 1_500_000))
    assert lab.value("due") == [("a", lab.near(1_200_000))]
    lab.enqueue(replacing("c", 9_000_000, "started", 9_500_000))
    assert lab.value("due") == [("a", lab.near(1_500_000))]
    assert lab.jobs() == {"a"}


# -- sent twice -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [replacing("b", FAR), unique("b"), unique("b", once=TTL)])
def test_a_repeated_call_says_the_same_and_changes_nothing(lab: Lab, job: NewJob) -> None:
    """F-37."""
    lab.enqueue(unique("a", delay=FAR), "x")
    first, second = lab.twice(lab.enqueue_command(job, NewJob("x", E, chosen=True), unique("c", once=BOTH)))
    assert first == second
    assert [refused.position for refused in first] == [0, 1, 2]


def test_what_was_refused_is_not_remembered_for_ever(lab: Lab) -> None:
    lab.enqueue(unique("a"))
    lab.enqueue(unique("b"))
    (key,) = (name for name in set(lab.keys()) if name.startswith("said:"))
    assert 0 < lab.raw.pttl(lab.key(key)) <= 300_000
