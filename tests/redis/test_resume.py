"""resume.lua: what a worker holds, asked after a reply was lost on the way to it."""

from __future__ import annotations

from fastq.broker import commands
from fastq.broker.commands import Held
from tests.redis.lab import Lab, envelope

E = envelope()


def test_what_is_held(lab: Lab) -> None:
    lab.take("a", "b")
    before = lab.keys()
    held = lab.call(commands.resume(lab.q, "w"))
    assert (held.held, sorted(held.ids), held.envelopes) == (2, [b"a", b"b"], [E, E])
    assert lab.keys() == before


def test_ids_and_envelopes_belong_together(lab: Lab) -> None:
    lab.register()
    for priority in range(11):
        lab.enqueue(str(priority), priority=priority)
    lab.reserve(20)
    held = lab.call(commands.resume(lab.q, "w"))
    assert dict(zip(held.ids, held.envelopes, strict=True)) == {str(p).encode(): envelope(p) for p in range(11)}


def test_a_worker_with_empty_hands(lab: Lab) -> None:
    lab.register()
    assert lab.call(commands.resume(lab.q, "w")) == Held(0, [], [])


def test_an_id_without_an_envelope(lab: Lab) -> None:
    lab.take("a")
    lab.raw.hdel(lab.q.jobs, "a")
    assert lab.call(commands.resume(lab.q, "w")) == Held(1, [b"a"], [b""])


def test_without_a_lease(lab: Lab) -> None:
    assert lab.call(commands.resume(lab.q, "w")) == Held(-1, [], [])
    lab.take("a")
    lab.recover()
    assert lab.call(commands.resume(lab.q, "w")) == Held(-1, [], [])
    assert lab.jobs() == {"a"}


def test_while_paused(lab: Lab) -> None:
    lab.take("a")
    lab.raw.set(lab.q.paused, "1")
    assert lab.call(commands.resume(lab.q, "w")) == Held(1, [b"a"], [E])


def test_the_lost_batch_comes_back_whole(lab: Lab) -> None:
    """F-33: reserve whose reply was lost, then resume: executions = 1."""
    lab.register()
    ids = [f"j{i}" for i in range(200)]
    lab.enqueue(*ids)
    lab.reserve(200)
    held = lab.call(commands.resume(lab.q, "w"))
    assert sorted(held.ids) == sorted(i.encode() for i in ids)
    assert lab.settle(succeeded=ids).stale == []
    assert lab.jobs() == set()
