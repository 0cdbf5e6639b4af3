"""purge.lua: pending and scheduled jobs go, running ones stay."""

from __future__ import annotations

from fastq.broker import commands
from fastq.broker.commands import NewJob, Parked
from fastq.broker.keys import PAD
from tests.redis.lab import FAR, Lab, envelope

E = envelope()


def cancel(lab: Lab, *ids: str) -> None:
    for i in ids:
        assert lab.call(commands.cancel(lab.q, i, [], b"", 0)) == "cancelled"


def drain(lab: Lab, limit: int) -> int:
    total = 0
    while (reply := lab.call(commands.purge(lab.q, limit)))[1]:
        total += reply[0]
    assert reply[0] == 0
    return total


def test_everything_but_what_runs(lab: Lab) -> None:
    lab.take("running")
    for priority in range(11):
        lab.enqueue(f"pending{priority}", priority=priority)
    lab.enqueue(NewJob("scheduled", E, FAR))
    assert lab.call(commands.purge(lab.q)) == (12, True)
    assert lab.twice(commands.purge(lab.q)) == ((0, False), (0, False))
    assert lab.keys("wake", "due:wake", "producers") == {
        **lab.worker_keys("running"),
        "jobs": {PAD: b"", "running": E},
    }


def test_an_empty_queue(lab: Lab) -> None:
    assert lab.twice(commands.purge(lab.q)) == ((0, False), (0, False))
    assert lab.keys() == {}


def test_in_bounded_calls(lab: Lab) -> None:
    lab.enqueue(*(f"high{i}" for i in range(5)), priority=9)
    lab.enqueue(*(f"low{i}" for i in range(5)), priority=1)
    lab.enqueue(*(NewJob(f"due{i}", E, FAR) for i in range(5)))
    for left in (11, 7, 3):
        assert lab.call(commands.purge(lab.q, 4)) == (4, True)
        assert len(lab.jobs()) == left
    assert lab.call(commands.purge(lab.q, 4)) == (3, True)
    assert lab.call(commands.purge(lab.q, 4)) == (0, False)
    assert lab.keys("wake", "due:wake", "producers") == {}


def test_what_goes_with_the_jobs_goes(lab: Lab) -> None:
    lab.enqueue(NewJob("a", E, unique="k"), NewJob("b", E, FAR, "l"))
    lab.raw.hset(lab.q.deliveries, mapping={"a": 1, "b": 1, "other": 1})
    lab.call(commands.purge(lab.q))
    assert lab.keys("wake", "due:wake", "producers") == {"deliveries": {"other": b"1"}}


def test_ghosts_are_not_counted_and_go_too(lab: Lab) -> None:
    lab.enqueue("a", "b", "c")
    cancel(lab, "a", "c")
    assert lab.call(commands.purge(lab.q)) == (1, True)
    assert lab.keys("wake", "producers") == {}


def test_nothing_but_ghosts_is_not_the_end(lab: Lab) -> None:
    """The jobs behind them are still there."""
    lab.enqueue(*(f"ghost{i}" for i in range(10)), "a", "b")
    cancel(lab, *(f"ghost{i}" for i in range(10)))
    assert lab.call(commands.purge(lab.q, 5)) == (0, True)
    assert drain(lab, 5) == 2
    assert lab.keys("wake", "producers") == {}


def test_a_reused_id_is_purged_once(lab: Lab) -> None:
    lab.enqueue("a", priority=2)
    cancel(lab, "a")
    lab.enqueue(NewJob("a", envelope(9), chosen=True), priority=9)
    assert drain(lab, 1) == 1
    assert lab.keys("wake", "producers") == {}


def test_an_id_with_several_ghosts_is_purged_once(lab: Lab) -> None:
    for _ in range(3):
        lab.enqueue(NewJob("a", E, chosen=True))
        cancel(lab, "a")
    lab.enqueue(NewJob("a", E, chosen=True))
    assert drain(lab, 10) == 1
    assert lab.keys("wake", "producers") == {}


def test_a_paused_queue_is_purged_and_stays_paused(lab: Lab) -> None:
    lab.enqueue("a")
    lab.raw.set(lab.q.paused, "1")
    assert drain(lab, 10) == 1
    assert lab.keys("wake", "producers") == {"paused": b"1"}


def test_2000_at_most_in_a_call(lab: Lab) -> None:
    """Lua's `unpack` ends at 7,999 values, and what was popped must be deleted."""
    for part in range(5):
        lab.enqueue(*(f"{part}-{i}" for i in range(500)))
    assert lab.call(commands.purge(lab.q, 1_000_000)) == (2_000, True)
    assert drain(lab, 1_000_000) == 500
    assert lab.jobs() == set()


def test_those_that_are_left_parked_are_looked_after_as_before(lab: Lab) -> None:
    """A call that ends within a limit's jobs must not make the others ripe: found by the state machine, in 5,000 examples."""
    lab.take("a", "b", "c")
    lab.call(commands.park(lab.q, "w", [Parked(i, "x/~all", n, 50_000) for n, i in enumerate("abc")]))
    before = lab.raw.zscore(lab.q.parked, "x/~all")
    assert lab.call(commands.purge(lab.q, 1)) == (1, True)
    assert lab.raw.zscore(lab.q.parked, "x/~all") == before
    assert lab.call(commands.unpark_due(lab.q)).moved == 0
    assert lab.call(commands.purge(lab.q, 5)) == (2, True)
    assert not lab.raw.exists(lab.q.parked)
