"""cancel.lua: a job that no worker has is taken out for good; exactly one of cancel and reserve gets it."""

from __future__ import annotations

from typing import Any

import pytest

from fastq.broker import commands
from fastq.broker.command import Command
from fastq.broker.commands import NewJob, Parked, Recovered
from fastq.broker.keys import PAD, bucket_of
from tests.redis.lab import FAR, Lab, envelope

E = envelope()


TTL = 4_000_000_000  # ms: a bucket of a thousand million, so the test knows in which one a record is


def cancel(lab: Lab, job_id: str, *workers: str, record: bytes = b"", terminate: bool = False) -> Command[Any]:
    return commands.cancel(lab.q, job_id, workers, record, TTL if record else 0, terminate=terminate)


def bucket(lab: Lab) -> tuple[str, int]:
    """Name and expiry of the one for a record that is written now."""
    return bucket_of(TTL / 1_000, lab.started)


def test_a_pending_job(lab: Lab) -> None:
    lab.enqueue("a", "b")
    assert lab.twice(cancel(lab, "a")) == ("cancelled", "unknown")
    assert lab.keys() == {
        "jobs": {"b": E},
        "ready:5": ["a", "b"],
        "ghosts": {"a": b"1"},
        "wake": ["1"],
        "producers": {"p": b"1"},
    }


def test_a_scheduled_job(lab: Lab) -> None:
    lab.enqueue(NewJob("a", E, FAR), NewJob("b", E, FAR))
    assert lab.twice(cancel(lab, "a")) == ("cancelled", "unknown")
    assert lab.keys() == {
        "jobs": {"b": E},
        "due": [("b", lab.near(FAR))],
        "due:wake": ["1"],
        "producers": {"p": b"1"},
    }


def test_it_may_leave_a_record(lab: Lab) -> None:
    lab.enqueue("a")
    assert lab.twice(cancel(lab, "a", record=b"cancelled")) == ("cancelled", "unknown")
    assert lab.keys() == {
        "ready:5": ["a"],
        "ghosts": {"a": b"1"},
        "done": [bucket(lab)],
        f"done:{bucket(lab)[0]}": {"a": b"cancelled"},
        "wake": ["1"],
        "producers": {"p": b"1"},
    }
    name, expires = bucket(lab)
    assert lab.raw.pexpiretime(lab.key(f"done:{name}")) == expires


@pytest.mark.parametrize("delay", [0, FAR])
def test_what_goes_with_the_job_goes(lab: Lab, delay: int) -> None:
    lab.enqueue(NewJob("a", E, delay, "k"), NewJob("b", E, delay, "l"))
    lab.raw.hset(lab.q.deliveries, mapping={"a": 1, "b": 1})
    lab.call(cancel(lab, "a"))
    assert lab.value("unique") == {"l": b"b"}
    assert lab.value("unique:of") == {"b": b"l"}
    assert lab.value("deliveries") == {"b": b"1"}


def test_a_running_job_is_left_to_its_worker_which_is_asked(lab: Lab) -> None:
    """F-46."""
    lab.register("v")
    lab.take("a")
    before = lab.keys()
    assert lab.twice(cancel(lab, "a", "v", "w", record=b"r")) == ("requested", "requested")
    assert lab.keys() == {**before, "cancels": {"a": f"c{TTL}:r".encode()}, "wake:w": ["1"]}
    assert 0 < lab.raw.pttl(lab.q.wake_of("w")) <= 60_000, "should the worker be gone"


def test_to_interrupt_is_asked_for_once(lab: Lab) -> None:
    """A later request that only tells takes nothing back."""
    lab.take("a")
    for terminate, mode in ((False, b"c"), (True, b"t"), (False, b"t")):
        assert lab.call(cancel(lab, "a", "w", terminate=terminate)) == "requested"
        assert lab.value("cancels") == {"a": mode + b"0:"}


@pytest.mark.parametrize("outcome", ["later", "later at once", "released", "parked"])
@pytest.mark.parametrize("record", [b"", b"with\0zero"], ids=["no record", "record"])
def test_what_was_cancelled_while_it_ran_does_not_run_again(lab: Lab, outcome: str, record: bytes) -> None:
    """F-46: a retry, a snooze and a deploy end it. The others of the batch go their ways."""
    lab.register()
    lab.enqueue(*(NewJob(i, E, 0, f"key of {i}") for i in "ab"))
    assert lab.reserve().held == 2
    lab.raw.hset(lab.q.deliveries, mapping={"a": 1, "b": 1})
    lab.call(cancel(lab, "a", "w", record=record))
    rows: dict[str, list[Any]] = {
        "later": [("a", FAR, E), ("b", FAR, E)],
        "later at once": [("a", 0, E), ("b", 0, E)],
        "released": ["a", "b"],
    }
    if outcome == "parked":
        command = commands.park(lab.q, "w", [Parked("a", "x/~all", 1, FAR), Parked("b", "x/~all", 2, FAR)])
    else:
        command = lab.settle_command(**{outcome.partition(" ")[0]: rows[outcome]})
    assert lab.call(command).held == 0
    assert lab.jobs() == {"b"}
    assert lab.value("cancels") is None
    assert lab.value("deliveries") == {"b": b"1"}
    assert lab.value("unique") == {"key of b": b"b"}
    assert lab.value(f"done:{bucket(lab)[0]}") == ({"a": record} if record else None)
    waits = {name: [i for i, _ in lab.value(name) or ()] for name in ("due", "parked:by:x/~all")}
    assert [*lab.ready(), *waits["due"], *waits["parked:by:x/~all"]] == ["b"]
    before = lab.keys()
    assert lab.call(command).stale == [b"a", b"b"]
    assert lab.keys() == before


@pytest.mark.parametrize("outcome", ["succeeded", "recorded", "failed"])
def test_what_has_ended_takes_its_request_along(lab: Lab, outcome: str) -> None:
    """F-46: the end that came first is the only one; a later job of the same id is not touched."""
    lab.take("a")
    lab.call(cancel(lab, "a", "w", record=b"cancelled"))
    ended: dict[str, Any] = {
        "succeeded": "a", "failed": ("a", E, b"error"), "recorded": (*bucket(lab), "a", b"success"),
    }  # fmt: skip
    lab.settle(**{outcome: [ended[outcome]]})
    assert lab.value("cancels") is None
    assert lab.value(f"done:{bucket(lab)[0]}") == ({"a": b"success"} if outcome == "recorded" else None)
    for key in lab.raw.keys(lab.key("d*")):
        lab.raw.delete(key)
    lab.take("a")
    assert lab.settle(released=["a"]).stale == []
    assert lab.ready() == ["a"]


@pytest.mark.parametrize("charge", ["all", "none"])
def test_a_cancelled_job_of_a_dead_worker_is_over(lab: Lab, charge: str) -> None:
    """F-47: cancelled when the lease is recovered, not run again, and no poison either."""
    lab.register()
    lab.enqueue(*(NewJob(i, E, 0, f"key of {i}") for i in "ab"))
    assert lab.reserve().held == 2
    lab.call(cancel(lab, "a", "w", record=b"cancelled"))
    command = lab.recover_command(charge=charge, max_deliveries=5)
    assert lab.call(command) == Recovered(1, 0, 0)
    assert lab.ready() == ["b"]
    assert lab.jobs() == {"b"}
    assert lab.value("cancels") is None
    assert lab.value("unique") == {"key of b": b"b"}
    assert lab.value(f"done:{bucket(lab)[0]}") == {"a": b"cancelled"}
    assert lab.value("deliveries") == ({"b": b"1"} if charge == "all" else None)
    assert lab.call(command) == Recovered(0, 0, 0)


def test_buckets_are_named_as_everywhere(lab: Lab) -> None:
    """The script computes what keys.bucket_of computes."""
    for ttl in (1, 999, 1_000, 1_001, 3_600_000, 123_457):
        lab.raw.flushall()
        lab.enqueue("a")
        before = lab.now()
        assert lab.call(commands.cancel(lab.q, "a", [], b"r", ttl)) == "cancelled"
        expected = {bucket_of(ttl / 1_000, now) for now in range(before, lab.now() + 1)}
        assert [tuple(pair) for pair in lab.value("done")] == [pair for pair in expected if pair in lab.value("done")]


@pytest.mark.parametrize(
    "workers",
    [(), ("v",), ("w",), ("v", "w", "x"), ("v", "x"), ("w", "x")],
    ids=lambda names: "+".join(names) or "none",
)
def test_a_list_of_workers_that_is_out_of_date_decides_nothing(lab: Lab, workers: tuple[str, ...]) -> None:
    """A job in the running set of a worker that the caller does not know of would be taken for pending."""
    lab.register("v")
    lab.take("a")
    lab.enqueue("b")
    before = lab.keys()
    assert lab.call(cancel(lab, "b", *workers)) == "again"
    assert (said := lab.call(cancel(lab, "a", *workers))) in {"again", "requested"}
    assert lab.keys("cancels", "wake:w") == before
    assert lab.value("wake:w") == (["1"] if said == "requested" else None)
    assert (lab.value("cancels") is None) == (said == "again")


def test_a_scheduled_job_needs_no_list_of_workers(lab: Lab) -> None:
    lab.register()
    lab.enqueue(NewJob("a", E, FAR))
    assert lab.call(cancel(lab, "a", "someone", "else")) == "cancelled"


def test_an_unknown_job(lab: Lab) -> None:
    lab.take("done", "dead")
    lab.settle(succeeded=["done"], failed=[("dead", E, b"error")])
    before = lab.keys()
    for job_id in ("never", "done", "dead"):
        assert lab.call(cancel(lab, job_id, "w", record=b"r")) == "unknown"
    assert lab.keys() == before


def test_after_recovery_a_job_can_be_cancelled(lab: Lab) -> None:
    """F-47: its worker died; the job is not run again."""
    lab.take("a")
    lab.recover(charge="all")
    assert lab.call(cancel(lab, "a")) == "cancelled"
    lab.register()
    assert lab.reserve().ids == []
    assert lab.keys("producers", "wake") == {**lab.worker_keys(), "jobs": {PAD: b""}}


def test_a_retry_that_waits_can_be_cancelled(lab: Lab) -> None:
    lab.take("a")
    lab.settle(later=[("a", FAR, E)])
    assert lab.call(cancel(lab, "a", "w")) == "cancelled"
    assert lab.value("due") is None


def test_a_paused_queue_cancels(lab: Lab) -> None:
    lab.enqueue("a")
    lab.raw.set(lab.q.paused, "1")
    assert lab.call(cancel(lab, "a")) == "cancelled"


def test_the_pad_is_no_job(lab: Lab) -> None:
    """It lies in the jobs hash, and no caller can name it: job.check_id refuses its tilde."""
    from fastq.errors import InvalidJobId
    from fastq.job import check_id

    with pytest.raises(InvalidJobId):
        check_id(PAD)
