"""replay.lua and its opposite discard.lua: what becomes of dead letters."""

from __future__ import annotations

import pytest

from fastq.broker import commands
from tests.redis.lab import Lab, envelope

E = envelope()


@pytest.fixture
def graveyard(lab: Lab) -> Lab:
    """a, b and c are dead, in this order; the queue has nothing else."""
    lab.take("a", "b", "c")
    lab.settle(failed=[(i, E, b"error " + i.encode()) for i in "abc"])
    lab.raw.zadd(lab.q.dead, {"a": 1_000, "b": 2_000, "c": 3_000})
    lab.recover()
    lab.raw.delete(lab.q.wake, lab.q.producers)
    assert lab.keys() == left("a", "b", "c")
    return lab


def left(*ids: str) -> dict[str, object]:
    """The keys of the dead-letter queue with these in it."""
    if not ids:
        return {}
    return {
        "dead": [(i, 1_000 * (1 + "abc".index(i))) for i in ids],
        "dead:jobs": dict.fromkeys(ids, E),
        "dead:errors": {i: b"error " + i.encode() for i in ids},
    }


def test_replayed_jobs_are_pending_with_the_envelopes_given(graveyard: Lab) -> None:
    fresh, high = envelope(tag="fresh"), envelope(9)
    command = commands.replay(graveyard.q, [("c", fresh), ("a", high)])
    assert graveyard.twice(command) == (2, 0)
    assert graveyard.keys() == {
        **left("b"),
        "jobs": {"c": fresh, "a": high},
        "ready:5": ["c"],
        "ready:9": ["a"],
        "wake": ["1"],
    }


def test_a_replay_sent_again_after_the_job_has_run_does_nothing(graveyard: Lab) -> None:
    """F-48: replay twice = once."""
    command = commands.replay(graveyard.q, [("a", E)])
    graveyard.call(command)
    graveyard.register()
    graveyard.reserve()
    graveyard.settle(succeeded=["a"])
    assert graveyard.twice(command) == (0, 0)
    assert graveyard.jobs() == set()


def test_who_is_not_dead_is_not_replayed(graveyard: Lab) -> None:
    graveyard.enqueue("alive")
    before = graveyard.keys()
    assert graveyard.call(commands.replay(graveyard.q, [("alive", E), ("never", E)])) == 0
    assert graveyard.call(commands.replay(graveyard.q, [])) == 0
    assert graveyard.keys() == before


def test_a_replayed_job_may_die_again(graveyard: Lab) -> None:
    graveyard.call(commands.replay(graveyard.q, [("a", E)]))
    graveyard.register()
    graveyard.reserve()
    graveyard.settle(failed=[("a", E, b"again")])
    assert graveyard.value("dead")[-1] == ("a", graveyard.near())
    assert graveyard.value("dead:errors")["a"] == b"again"


def test_a_paused_queue_takes_replayed_jobs(graveyard: Lab) -> None:
    graveyard.raw.set(graveyard.q.paused, "1")
    assert graveyard.call(commands.replay(graveyard.q, [("a", E)])) == 1


def test_any_number_is_replayed(lab: Lab) -> None:
    """No `unpack` here: the limit is the time that Redis stands still."""
    ids = [f"j{i}" for i in range(5_000)]
    for start in range(0, 5_000, 500):
        part = ids[start : start + 500]
        lab.raw.zadd(lab.q.dead, dict.fromkeys(part, 1))
        lab.raw.hset(lab.q.dead_jobs, mapping=dict.fromkeys(part, E))
        lab.raw.hset(lab.q.dead_errors, mapping=dict.fromkeys(part, b"error"))
    assert lab.call(commands.replay(lab.q, [(i, E) for i in ids])) == 5_000
    assert lab.keys() == {"jobs": dict.fromkeys(ids, E), "ready:5": ids, "wake": ["1"]}


# -- discard --------------------------------------------------------------------------------------


def test_discard_by_id(graveyard: Lab) -> None:
    assert graveyard.twice(commands.discard(graveyard.q, ids=["b", "never"])) == (1, 0)
    assert graveyard.keys() == left("a", "c")


@pytest.mark.parametrize(
    ("before_ms", "rest"), [(999, "abc"), (1_000, "bc"), (2_999, "c"), (10_000, ""), (0, "abc"), (-1, "abc")]
)
def test_discard_by_age(graveyard: Lab, before_ms: int, rest: str) -> None:
    """F-48: bounded by age; the time itself is included."""
    assert graveyard.twice(commands.discard(graveyard.q, before_ms=before_ms)) == (3 - len(rest), 0)
    assert graveyard.keys() == left(*rest)


def test_discard_takes_the_oldest_up_to_its_limit(graveyard: Lab) -> None:
    for rest in ("c", ""):
        graveyard.call(commands.discard(graveyard.q, before_ms=10_000, limit=2))
        assert graveyard.keys() == left(*rest)
    assert graveyard.call(commands.discard(graveyard.q, before_ms=10_000, limit=2)) == 0
