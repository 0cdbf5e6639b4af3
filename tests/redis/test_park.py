"""park.lua, unpark.lua, unpark_due.lua: jobs wait for their limit aside, and come back by priority and age."""

from __future__ import annotations

from fastq.broker import commands
from fastq.broker.commands import Parked, Promoted, Settled
from tests.redis.lab import FAR, Lab, envelope

X, Y = "x/~all", "y/tenant-42"


def park(lab: Lab, *rows: Parked, worker: str = "w") -> Settled:
    return lab.call(commands.park(lab.q, worker, rows))


def unpark(lab: Lab, limit: str, want: int = 10, worker: str = "w") -> list[str]:
    return [i.decode() for i in lab.call(commands.unpark(lab.q, worker, limit, want, FAR)).ids]


def test_each_job_waits_under_its_limit(lab: Lab) -> None:
    lab.take("a", "b", "c", "kept")
    command = commands.park(lab.q, "w", [Parked("a", X, 1, 500), Parked("b", Y, 2, 100), Parked("c", X, 0, 300)])
    first, second = lab.twice(command)
    assert first == Settled(1, [])
    assert second == Settled(1, [b"a", b"b", b"c"])
    assert lab.value("parked:of") == {"a": X.encode(), "b": Y.encode(), "c": X.encode()}
    assert lab.value(f"parked:by:{X}") == [("c", 0), ("a", 1)]
    assert dict(lab.value("parked")) == {X: lab.near(500), Y: lab.near(100)}


def test_who_lost_its_lease_parks_nothing(lab: Lab) -> None:
    lab.take("a")
    lab.recover()
    assert park(lab, Parked("a", X, 1, 500)) == Settled(-1, [b"a"])
    assert not lab.raw.exists(lab.q.parked, lab.q.parked_of, lab.q.parked_by(X))


def test_back_by_score(lab: Lab) -> None:
    lab.take("late", "first", "second")
    park(lab, Parked("late", X, 9e12, 500), Parked("first", X, 10.5, 500), Parked("second", X, 10.75, 500))
    reply = lab.call(commands.unpark(lab.q, "w", X, 2, FAR))
    assert (reply.held, reply.ids, reply.left) == (2, [b"first", b"second"], 1)
    assert reply.envelopes == [envelope(), envelope()]
    assert dict(lab.value("parked")) == {X: lab.near(FAR)}
    assert unpark(lab, X) == ["late"]
    assert not lab.raw.exists(lab.q.parked, lab.q.parked_of, lab.q.parked_by(X))


def test_a_job_from_behind_a_limit_has_started(lab: Lab) -> None:
    """As one from the ready list: for those who watch it, and for nobody else."""
    lab.take("a", "unseen")
    park(lab, Parked("a", X, 1, 500), Parked("unseen", X, 2, 500))
    lab.call(commands.watch(lab.q, FAR, ["a"]))
    unpark(lab, X)
    assert [said for _, said in lab.raw.xrange(lab.q.events)] == [{b"started": b"a"}]


def test_a_paused_queue_and_a_lost_lease_hand_out_nothing(lab: Lab) -> None:
    lab.take("a")
    park(lab, Parked("a", X, 1, 500))
    lab.raw.set(lab.q.paused, "1")
    assert unpark(lab, X) == []
    lab.raw.delete(lab.q.paused)
    assert lab.call(commands.unpark(lab.q, "stranger", X, 1, FAR)).held == -1
    assert unpark(lab, X) == ["a"]


def test_the_lost_reply_of_unpark_is_found_by_resume(lab: Lab) -> None:
    lab.take("a")
    park(lab, Parked("a", X, 1, 500))
    unpark(lab, X)
    assert lab.call(commands.resume(lab.q, "w")).ids == [b"a"]


def test_one_job_of_each_limit_that_nobody_looks_after(lab: Lab) -> None:
    """A worker that died with its idea of the limits: whoever gets the job fetches the others."""
    lab.take("a", "b", "c", "d")
    park(lab, Parked("a", X, 1, -5), Parked("b", X, 2, -5), Parked("c", Y, 1, -5), Parked("d", "z/~all", 1, FAR))
    lab.enqueue("already")
    lab.raw.delete(lab.q.wake)
    first, second = lab.twice(commands.unpark_due(lab.q, 10, FAR // 2))
    assert first == Promoted(2, first.now_ms, first.next_at_ms)
    assert first.next_at_ms == lab.near(FAR // 2)
    assert second.moved == 0
    assert sorted(lab.value("ready:5")[:2]) == ["a", "c"]
    assert lab.value("ready:5")[2:] == ["already"]
    assert lab.value("wake") == ["1"]
    assert lab.value("parked:of") == {"b": X.encode(), "d": b"z/~all"}


def test_nothing_parked(lab: Lab) -> None:
    reply = lab.call(commands.unpark_due(lab.q))
    assert (reply.moved, reply.next_at_ms) == (0, -1)


def test_cancel_status_and_purge_know_the_parked(lab: Lab) -> None:
    lab.take("a", "b", "c")
    park(lab, Parked("a", X, 1, 500), Parked("b", X, 2, 500), Parked("c", Y, 2, 500))
    assert lab.call(commands.status(lab.q, "b", ["w"])) == [b"parked", envelope(), X.encode()]
    assert lab.call(commands.cancel(lab.q, "a", [], b"", 0)) == "cancelled"
    assert lab.value(f"parked:by:{X}") == [("b", 2)]
    assert not lab.raw.exists(lab.q.ghosts)
    assert lab.call(commands.purge(lab.q, 1)) == (1, True)
    assert lab.call(commands.purge(lab.q, 5)) == (1, True)
    assert lab.call(commands.purge(lab.q, 5)) == (0, False)
    assert not lab.raw.exists(lab.q.parked, lab.q.parked_of, lab.q.parked_by(X), lab.q.parked_by(Y))
