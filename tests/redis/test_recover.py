"""recover.lua: the jobs of a lost worker go back, each at once, and what kills its workers is stopped."""

from __future__ import annotations

from typing import Any

import pytest

from fastq.broker.commands import NewJob, Recovered
from fastq.broker.keys import PAD
from tests.redis.lab import LEASE, Lab, envelope, texts

E = envelope()


@pytest.fixture
def held(lab: Lab) -> Lab:
    """A worker that holds a, b and c, and a quiet queue."""
    lab.take("a", "b", "c")
    lab.raw.delete(lab.q.wake, lab.q.producers)
    return lab


def expire(lab: Lab, worker: str = "w") -> None:
    lab.raw.zadd(lab.q.workers, {worker: lab.now() - 1})


# -- when -----------------------------------------------------------------------------------------


def test_a_death_that_is_known_needs_no_waiting(held: Lab) -> None:
    """F-01: the monitor saw it; nothing of the worker remains."""
    assert held.twice(held.recover_command()) == (Recovered(3, 0, 0), Recovered(0, 0, 0))
    keys = held.keys()
    assert sorted(keys.pop("ready:5")) == ["a", "b", "c"]
    assert keys == {"jobs": {"a": E, "b": E, "c": E}, "wake": ["1"]}


def test_a_valid_lease_is_respected(held: Lab) -> None:
    before = held.keys()
    assert held.twice(held.recover_command(expired=True, charge="all")) == (Recovered(0, 0, -1),) * 2
    assert held.keys() == before


def test_a_lease_that_has_run_out_is_not(held: Lab) -> None:
    """F-08."""
    expire(held)
    assert held.recover(expired=True) == Recovered(3, 0, 0)
    assert held.value("running:w") is None


def test_a_running_set_without_a_lease_is_recovered_too(held: Lab) -> None:
    """It cannot come about by scripts; a look that finds one need not leave its jobs there."""
    held.raw.zrem(held.q.workers, "w")
    assert held.recover(expired=True) == Recovered(3, 0, 0)


def test_an_extended_lease_is_valid_again(held: Lab) -> None:
    """F-32: the worker was late, not dead."""
    from fastq.broker import commands

    expire(held)
    assert held.call(commands.extend(held.q, LEASE, ["w"])) == [True]
    assert held.recover(expired=True) == Recovered(0, 0, -1)


def test_a_worker_that_holds_nothing(lab: Lab) -> None:
    lab.register("v")
    lab.register("w")
    assert lab.twice(lab.recover_command()) == (Recovered(0, 0, 0), Recovered(0, 0, 0))
    assert lab.keys() == {**lab.worker_keys(worker="v"), "jobs": {PAD: b""}}


def test_a_worker_that_never_was(lab: Lab) -> None:
    assert lab.twice(lab.recover_command("nobody")) == (Recovered(0, 0, 0), Recovered(0, 0, 0))
    assert lab.keys() == {}


@pytest.mark.parametrize("jobs", [(), ("a",)])
def test_the_last_worker_takes_the_pad_along(lab: Lab, jobs: tuple[str, ...]) -> None:
    """I8: a drained queue without workers has no key left, however it was drained."""
    lab.register("v")
    lab.register("w")
    if jobs:
        lab.enqueue(*jobs)
    lab.recover("w")
    assert PAD in lab.value("jobs")
    lab.recover("v")
    assert lab.value("jobs") == (dict.fromkeys(jobs, E) or None)


def test_others_are_left_alone(lab: Lab) -> None:
    lab.take("a")
    lab.take("x", worker="other")
    lab.recover()
    assert lab.keys("producers", "wake") == {
        **lab.worker_keys("x", worker="other"),
        "jobs": {PAD: b"", "a": E, "x": E},
        "ready:5": ["a"],
    }


# -- where to ---------------------------------------------------------------------------------------


def test_jobs_go_to_the_front_of_the_list_of_their_priority(lab: Lab) -> None:
    lab.register()
    for priority in (0, 5, 10):
        lab.enqueue(f"held{priority}", priority=priority)
    lab.reserve()
    for priority in (0, 5, 10):
        lab.enqueue(f"waiting{priority}", priority=priority)
    assert lab.recover() == Recovered(3, 0, 0)
    assert {name: lab.value(name) for name in ("ready:0", "ready:5", "ready:10")} == {
        f"ready:{priority}": [f"held{priority}", f"waiting{priority}"] for priority in (0, 5, 10)
    }


def test_there_is_one_wake_token_at_most(lab: Lab) -> None:
    lab.take("a", "b", "c")
    while lab.recover(limit=1).remaining:
        assert lab.value("wake") == ["1"]


def test_a_paused_queue_takes_its_jobs_back(held: Lab) -> None:
    held.raw.set(held.q.paused, "1")
    assert held.recover() == Recovered(3, 0, 0)
    assert sorted(held.ready()) == ["a", "b", "c"]


def test_an_id_without_an_envelope_ends_here(held: Lab) -> None:
    held.raw.hdel(held.q.jobs, "b")
    assert held.recover(charge="all") == Recovered(2, 0, 0)
    assert sorted(held.ready()) == ["a", "c"]
    assert held.value("deliveries") == {"a": b"1", "c": b"1"}


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7])
def test_many_jobs_go_back_in_bounded_calls(lab: Lab, limit: int) -> None:
    ids = [f"j{i}" for i in range(10)]
    lab.take(*ids)
    seen, calls = 0, 0
    while True:
        recovered = lab.recover(limit=limit)
        seen += recovered.ready
        calls += 1
        assert len(lab.ready()) == seen
        assert lab.value("workers") == ([("w", lab.near(LEASE))] if recovered.remaining else None)
        assert recovered.remaining == 10 - seen
        if not recovered.remaining:
            break
    assert sorted(lab.ready()) == sorted(ids)
    assert calls <= 10 // limit + 1


# -- deliveries and poison --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("charge", "started", "expected"),
    [
        ("all", [], {"a": b"1", "b": b"1", "c": b"1"}),
        ("started", ["b", "gone"], {"b": b"1"}),
        ("started", [], None),
        ("none", ["b"], None),
    ],
)
def test_whose_delivery_counts(held: Lab, charge: str, started: list[str], expected: Any) -> None:
    """F-02, F-07: a job that only lay in the batch is not suspected."""
    assert held.recover(charge=charge, started=started) == Recovered(3, 0, 0)
    assert held.value("deliveries") == expected


def test_at_max_deliveries_a_job_is_poison(lab: Lab) -> None:
    """Invariant 4, F-06: three workers died with it; its neighbour runs on."""
    lab.enqueue(NewJob("bad", E, unique="k"), NewJob("good", E, unique="g"))
    for death in (1, 2):
        lab.register()
        assert len(lab.reserve().ids) == 2
        assert lab.recover(charge="started", started=["bad"]) == Recovered(2, 0, 0)
        assert lab.value("deliveries") == {"bad": str(death).encode()}
    lab.register()
    lab.reserve()
    lab.raw.delete(lab.q.wake, lab.q.producers)
    command = lab.recover_command(charge="started", started=["bad"], error=b"signal 9")
    assert lab.twice(command) == (Recovered(1, 1, 0), Recovered(0, 0, 0))
    assert lab.keys() == {
        "jobs": {"good": E},
        "ready:5": ["good"],
        "wake": ["1"],
        "dead": [("bad", lab.near())],
        "dead:jobs": {"bad": E},
        "dead:errors": {"bad": b"signal 9"},
        "unique": {"g": b"good"},
        "unique:of": {"good": b"g"},
    }


def test_poison_alone_wakes_nobody(held: Lab) -> None:
    assert held.recover(charge="all", max_deliveries=1) == Recovered(0, 3, 0)
    assert held.value("wake") is None
    assert held.value("deliveries") is None
    assert held.jobs() == set()


def test_poison_respects_the_bound_of_the_dead_letters(held: Lab) -> None:
    """F-48."""
    held.recover(charge="all", max_deliveries=1, dead_max=2)
    assert len(held.value("dead")) == len(held.value("dead:jobs")) == len(held.value("dead:errors")) == 2


def test_a_job_handed_back_uncharged_keeps_what_it_had(held: Lab) -> None:
    held.recover(charge="all")
    held.register()
    assert sorted(texts(held.reserve().ids)) == ["a", "b", "c"]
    held.recover(charge="none")
    assert held.value("deliveries") == {"a": b"1", "b": b"1", "c": b"1"}


# -- a recovered worker -------------------------------------------------------------------------------


def test_a_recovered_worker_may_register_again_and_owns_nothing_of_before(held: Lab) -> None:
    held.recover()
    held.register()
    assert held.value("running:w") == {PAD}
    assert held.settle(succeeded=["a"]).stale == [b"a"]


def test_2000_jobs_in_one_call(lab: Lab) -> None:
    """No `unpack` here: the limit is the time that Redis stands still, 5 to 10 µs a job (workers hand back 200 a call)."""
    lab.register()
    ids = [f"j{i}" for i in range(2_000)]
    for start in range(0, 2_000, 500):
        lab.enqueue(*ids[start : start + 500])
    lab.reserve(2_000)
    assert lab.recover(charge="started", started=ids, limit=10_000) == Recovered(2_000, 0, 0)
    assert sorted(lab.ready()) == sorted(ids)
