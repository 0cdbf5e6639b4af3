"""status.lua: where one job is."""

from __future__ import annotations

from fastq.broker import commands
from fastq.broker.commands import NewJob
from tests.redis.lab import FAR, Lab, envelope

E = envelope()


def status(lab: Lab, job_id: str, *workers: str) -> list[bytes]:
    return lab.call(commands.status(lab.q, job_id, workers))


def test_every_place(lab: Lab) -> None:
    lab.take("running", worker="v")
    lab.take("done", "dead", "gone")
    lab.settle(
        succeeded=["gone"],
        recorded=[("60000:7", lab.started + FAR, "done", b"record")],
        failed=[("dead", E, b"error")],
    )
    lab.enqueue("pending", NewJob("scheduled", E, FAR))
    before = lab.keys()
    assert status(lab, "pending", "v", "w") == [b"pending", E]
    assert status(lab, "running", "v", "w") == [b"running", E, b"v"]
    assert status(lab, "running", "w", "v") == [b"running", E, b"v"]
    assert status(lab, "scheduled", "v")[:2] == [b"scheduled", E]
    assert lab.near(FAR) == int(status(lab, "scheduled")[2])
    assert status(lab, "done") == [b"finished", b"record"]
    assert status(lab, "dead")[:3] == [b"failed", E, b"error"]
    assert lab.near() == int(status(lab, "dead")[3])
    assert status(lab, "gone") == status(lab, "never", "v") == [b"unknown"]
    assert lab.keys() == before


def test_a_worker_that_is_not_asked_about(lab: Lab) -> None:
    """The caller reads the list of workers first; one that came since is not in it."""
    lab.take("a")
    assert status(lab, "a", "v") == [b"pending", E]


def test_a_record_that_has_expired(lab: Lab) -> None:
    lab.take("a")
    lab.settle(recorded=[("1000:1", lab.now() - 1, "a", b"record")])
    assert lab.value("done") is not None  # the name of the bucket, until it is pruned
    assert status(lab, "a") == [b"unknown"]


def test_the_newest_of_two_records(lab: Lab) -> None:
    """Only an id that is used again can have two; the bucket that ends last is looked at first."""
    for n in (2, 1):
        lab.take("a")
        lab.settle(recorded=[(f"1000:{n}", lab.started + FAR + n, "a", b"record %d" % n)])
    assert status(lab, "a") == [b"finished", b"record 2"]


def test_a_dead_letter_that_lost_its_parts(lab: Lab) -> None:
    lab.raw.zadd(lab.q.dead, {"a": 17})
    assert status(lab, "a") == [b"failed", b"", b"", b"17"]
