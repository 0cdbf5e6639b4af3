"""promote.lua: what is due becomes pending, in the order of the due times and at its own priority."""

from __future__ import annotations

import pytest

from fastq import job
from fastq.broker import commands
from fastq.broker.commands import NewJob, Promoted
from tests.redis.lab import FAR, Lab, envelope

E = envelope()


def schedule(lab: Lab, *ids: str, priority: int = 5) -> None:
    """Jobs that were due, the first one earliest, before the lab started."""
    data = envelope(priority)
    lab.enqueue(*(NewJob(i, data, FAR) for i in ids), priority=priority)
    lab.raw.zadd(lab.q.due, {i: lab.started - 1_000 + n for n, i in enumerate(ids)})


def test_due_jobs_become_pending(lab: Lab) -> None:
    schedule(lab, "b", "a")
    lab.enqueue(NewJob("later", E, FAR))
    lab.raw.delete(lab.q.due_wake, lab.q.producers)
    first, second = lab.twice(commands.promote(lab.q))
    later = lab.value("due")[0][1]
    assert first == Promoted(2, first.now_ms, later)
    assert second == Promoted(0, second.now_ms, later)
    assert lab.near() == first.now_ms
    assert lab.keys() == {
        "jobs": {"a": E, "b": E, "later": E},
        "ready:5": ["b", "a"],
        "due": [("later", lab.near(FAR))],
        "wake": ["1"],
    }


def test_nothing_scheduled(lab: Lab) -> None:
    promoted = lab.call(commands.promote(lab.q))
    assert promoted == Promoted(0, promoted.now_ms, -1)
    assert lab.keys() == {}


def test_a_job_is_not_promoted_before_its_time(lab: Lab) -> None:
    lab.enqueue(NewJob("a", E, 60_000))
    assert lab.call(commands.promote(lab.q)).moved == 0
    assert lab.value("wake") is None


def test_a_job_due_this_very_millisecond_is_due(lab: Lab) -> None:
    schedule(lab, "a")
    lab.raw.zadd(lab.q.due, {"a": lab.now()})
    assert lab.call(commands.promote(lab.q)).moved == 1


def test_each_job_goes_behind_the_others_of_its_priority(lab: Lab) -> None:
    for priority in (0, 3, 10):
        lab.enqueue(f"pending{priority}", priority=priority)
        schedule(lab, f"due{priority}", priority=priority)
    assert lab.call(commands.promote(lab.q)).moved == 3
    for priority in (0, 3, 10):
        assert lab.value(f"ready:{priority}") == [f"pending{priority}", f"due{priority}"]


@pytest.mark.parametrize("data", [b"", b"\x97", b"\x97\x0b", b"\x97\xc0"])
def test_an_unreadable_envelope_counts_as_normal_priority(lab: Lab, data: bytes) -> None:
    lab.enqueue(NewJob("a", data, FAR))
    lab.raw.zadd(lab.q.due, {"a": 1})
    lab.call(commands.promote(lab.q))
    assert lab.value("ready:5") == ["a"]


def test_scripts_and_python_read_the_same_priority(lab: Lab) -> None:
    """string.byte(envelope, 2) and job.priority_of, for every second byte there is."""
    for second in range(256):
        data = bytes((0x97, second))
        lab.enqueue(NewJob("a", data, FAR))
        lab.raw.zadd(lab.q.due, {"a": 1})
        lab.call(commands.promote(lab.q))
        assert lab.value(f"ready:{job.priority_of(data)}") == ["a"]
        lab.raw.flushdb()


def test_there_is_one_wake_token_at_most(lab: Lab) -> None:
    for name in "ab":
        schedule(lab, name)
        lab.call(commands.promote(lab.q))
        assert lab.value("wake") == ["1"]


def test_the_limit_takes_the_earliest(lab: Lab) -> None:
    schedule(lab, "a", "b", "c")
    first = lab.call(commands.promote(lab.q, 2))
    assert (first.moved, first.next_at_ms) == (2, lab.started - 998)
    assert lab.ready() == ["a", "b"]
    assert lab.call(commands.promote(lab.q, 2)).moved == 1
    assert lab.call(commands.promote(lab.q, 2)).moved == 0
    assert lab.ready() == ["a", "b", "c"]


def test_an_id_without_an_envelope_ends_here(lab: Lab) -> None:
    lab.raw.zadd(lab.q.due, {"foreign": 1})
    lab.call(commands.promote(lab.q))
    assert lab.keys("wake") == {}


def test_a_paused_queue_promotes(lab: Lab) -> None:
    """What is due waits in the ready list, in its order, until the queue goes on."""
    schedule(lab, "a")
    lab.raw.set(lab.q.paused, "1")
    assert lab.call(commands.promote(lab.q)).moved == 1
    assert lab.ready() == ["a"]


def test_a_due_id_that_was_cancelled_while_pending_before(lab: Lab) -> None:
    """One entry is a ghost, one is alive: each is counted once."""
    lab.enqueue("a")
    assert lab.call(commands.cancel(lab.q, "a", [], b"", 0)) == "cancelled"
    schedule(lab, "a")
    lab.call(commands.promote(lab.q))
    assert lab.ready() == ["a", "a"]
    lab.register()
    assert lab.reserve().ids == [b"a"]
    assert lab.ready() == []


def test_where_lua_ends(lab: Lab) -> None:
    """The scheduler asks for 500. At 8,000 `unpack` fails, before anything has moved."""
    from fastq.errors import BrokerReplyError

    for part in range(16):
        schedule(lab, *(f"{part}-{i}" for i in range(500)))
    with pytest.raises(BrokerReplyError, match="too many results to unpack"):
        lab.call(commands.promote(lab.q, 8_000))
    assert len(lab.value("due")) == 8_000
    assert lab.call(commands.promote(lab.q, 7_998)).moved == 7_998
    assert lab.call(commands.promote(lab.q)).moved == 2
    assert len(lab.ready()) == len(set(lab.ready())) == 8_000
