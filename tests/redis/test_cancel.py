"""cancel.lua: a job that no worker has is taken out for good; exactly one of cancel and reserve gets it."""

from __future__ import annotations

from typing import Any

import pytest

from fastq.broker import commands
from fastq.broker.commands import Command, NewJob
from fastq.broker.keys import PAD
from tests.redis.lab import FAR, Lab, envelope

E = envelope()


def cancel(lab: Lab, job_id: str, *workers: str, record: bytes = b"") -> Command[Any]:
    return commands.cancel(lab.q, job_id, workers, record, ("60000:7", lab.started + FAR))


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
        "done": [("60000:7", lab.started + FAR)],
        "done:60000:7": {"a": b"cancelled"},
        "wake": ["1"],
        "producers": {"p": b"1"},
    }
    assert lab.raw.pexpiretime(lab.key("done:60000:7")) == lab.started + FAR


@pytest.mark.parametrize("delay", [0, FAR])
def test_what_goes_with_the_job_goes(lab: Lab, delay: int) -> None:
    lab.enqueue(NewJob("a", E, delay, "k"), NewJob("b", E, delay, "l"))
    lab.raw.hset(lab.q.deliveries, mapping={"a": 1, "b": 1})
    lab.call(cancel(lab, "a"))
    assert lab.value("unique") == {"l": b"b"}
    assert lab.value("unique:of") == {"b": b"l"}
    assert lab.value("deliveries") == {"b": b"1"}


def test_a_running_job_is_left_to_its_worker(lab: Lab) -> None:
    """F-46."""
    lab.register("v")
    lab.take("a")
    before = lab.keys()
    assert lab.twice(cancel(lab, "a", "v", "w", record=b"r")) == ("running", "running")
    assert lab.keys() == before


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
    assert lab.call(cancel(lab, "a", *workers)) in {"again", "running"}
    assert lab.keys() == before


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
