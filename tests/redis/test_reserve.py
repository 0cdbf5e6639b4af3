"""reserve.lua: pending jobs go to one worker, highest priority first, and are in its running set before it knows them."""

from __future__ import annotations

import pytest

from fastq.broker import commands
from fastq.broker.commands import NewJob, Reserved
from fastq.broker.keys import PAD, PRIORITIES
from tests.redis.lab import FAR, Lab, envelope, texts

E = envelope()
NOTHING = ([], [], [])


def cancel(lab: Lab, *ids: str, workers: tuple[str, ...] = ()) -> None:
    for i in ids:
        assert lab.call(commands.cancel(lab.q, i, workers, b"", 0)) == "cancelled"


def test_what_is_handed_out_is_held(lab: Lab) -> None:
    lab.register()
    lab.enqueue("a", "b", "c")
    reserved = lab.reserve(2)
    assert reserved == Reserved(2, [b"a", b"b"], [E, E], [])
    assert lab.keys() == {
        **lab.worker_keys("a", "b"),
        "jobs": {PAD: b"", "a": E, "b": E, "c": E},
        "ready:5": ["c"],
        "wake": ["1"],
        "producers": {"p": b"1"},
    }


def test_nothing_there(lab: Lab) -> None:
    lab.register()
    before = lab.keys()
    assert lab.reserve() == (0, *NOTHING)
    assert lab.keys() == before


def test_higher_priorities_first_and_in_order_within_one(lab: Lab) -> None:
    lab.register()
    for priority in (5, 0, 10, 3, 10, 5):
        lab.enqueue(*(f"{priority}-{len(lab.jobs())}-{i}" for i in range(2)), priority=priority)
    expected = lab.ready()
    taken = []
    for want in (1, 2, 3, 100):
        taken += texts(lab.reserve(want).ids)
    assert taken == expected
    assert [int(i.split("-")[0]) for i in taken] == sorted((int(i.split("-")[0]) for i in taken), reverse=True)
    assert lab.ready() == []


def test_every_priority_is_looked_at(lab: Lab) -> None:
    lab.register()
    for priority in range(PRIORITIES):
        lab.enqueue(f"p{priority}", priority=priority)
    assert texts(lab.reserve(PRIORITIES).ids) == [f"p{priority}" for priority in reversed(range(PRIORITIES))]


def test_scheduled_jobs_are_not_handed_out(lab: Lab) -> None:
    lab.register()
    lab.enqueue(NewJob("a", E, delay_ms=FAR))
    assert lab.reserve().ids == []


# -- the wake token ---------------------------------------------------------------------------


def test_a_token_is_left_while_there_is_more(lab: Lab) -> None:
    """Whoever took the token passes it on: two idle workers share a burst."""
    lab.register()
    lab.enqueue("a", "b", "c")
    lab.enqueue("low", priority=0)
    for more in (True, True, True, False):  # after the third there is one in another list
        lab.raw.delete(lab.q.wake)
        assert len(lab.reserve(1).ids) == 1
        assert lab.value("wake") == (["1"] if more else None)


def test_a_token_is_left_while_there_is_more_of_the_usual_priority(lab: Lab) -> None:
    lab.register()
    lab.enqueue("a", "b", "c", "d")
    for want, more in ((1, True), (2, True), (1, False)):
        lab.raw.delete(lab.q.wake)
        assert len(lab.reserve(want).ids) == want
        assert lab.value("wake") == (["1"] if more else None)


def test_a_token_that_lies_there_is_not_doubled(lab: Lab) -> None:
    lab.register()
    lab.enqueue("a", "b", "c")
    assert len(lab.reserve(1).ids) == 1
    assert lab.value("wake") == ["1"]


@pytest.mark.parametrize("name", ["a", "a b", "3 ", "\u00e4", "x" * 200])
def test_one_job_alone(lab: Lab, name: str) -> None:
    """Its reply is one string: whatever its id and envelope are."""
    lab.register()
    data = E + b" 1 2 \x00\xff"
    lab.enqueue(NewJob(name, data))
    assert lab.reserve() == Reserved(1, [name.encode()], [data], [])


# -- what stands in the way -------------------------------------------------------------------


@pytest.mark.parametrize("pending", [(), ("a",)])
def test_a_worker_without_a_lease_gets_nothing(lab: Lab, pending: tuple[str, ...]) -> None:
    if pending:
        lab.enqueue(*pending)
    before = lab.keys()
    assert lab.reserve() == (-1, *NOTHING)
    assert lab.keys() == before


def test_a_worker_that_was_recovered_gets_nothing(lab: Lab) -> None:
    lab.take("a")
    lab.recover()
    assert lab.reserve() == (-1, *NOTHING)
    assert lab.ready() == ["a"]


def test_a_lease_counts_until_it_is_recovered(lab: Lab) -> None:
    """A worker that is late, but whose jobs nobody has taken, still owns them: its next extend makes it good."""
    lab.register(lease=-1)
    lab.enqueue("a")
    assert lab.reserve()[:3] == (1, [b"a"], [E])


def test_a_paused_queue_hands_out_nothing_and_keeps_its_token(lab: Lab) -> None:
    lab.take("held")
    lab.enqueue("a")
    lab.raw.set(lab.q.paused, "1")
    before = lab.keys()
    assert lab.reserve() == (1, *NOTHING)
    assert lab.keys() == before
    lab.raw.delete(lab.q.paused)
    assert lab.reserve().ids == [b"a"]


@pytest.mark.parametrize("want", [0, -1])
def test_a_worker_without_room_learns_what_it_holds(lab: Lab, want: int) -> None:
    lab.take("held")
    lab.enqueue("a")
    lab.raw.delete(lab.q.wake)
    before = lab.keys()
    assert lab.reserve(want) == (1, *NOTHING)
    assert lab.keys() == before


def test_an_id_without_an_envelope_is_handed_out_as_such(lab: Lab) -> None:
    """A foreign writer's: the worker decides, and the script does not fail."""
    lab.register()
    lab.raw.rpush(lab.q.ready[5], "foreign")
    assert lab.reserve()[:3] == (1, [b"foreign"], [None])


# -- sent twice -------------------------------------------------------------------------------


def test_sent_twice_the_worker_sees_that_it_holds_more_than_it_knows(lab: Lab) -> None:
    """F-33: the batch of the lost reply is in the running set; resume.lua tells it."""
    lab.register()
    lab.enqueue("a", "b", "c")
    lab.reserve(2)  # its reply was lost
    again = lab.reserve(2)
    assert (again.held, again.ids) == (3, [b"c"])
    assert lab.value("running:w") == {PAD, "a", "b", "c"}


def test_two_workers_never_get_the_same_job(lab: Lab) -> None:
    lab.register("v")
    lab.register("w")
    lab.enqueue(*(f"j{i}" for i in range(20)))
    taken = [i for _ in range(4) for worker in "vw" for i in texts(lab.reserve(3, worker).ids)]
    assert sorted(taken) == sorted(lab.jobs())
    assert len(taken) == 20


# -- deliveries -------------------------------------------------------------------------------


def test_deliveries_come_along_only_when_there_are_any(lab: Lab) -> None:
    lab.take("a", "b")
    lab.recover(charge="started", started=["b"])
    lab.enqueue("c")
    lab.register()
    reserved = lab.reserve()
    assert dict(zip(texts(reserved.ids), reserved.deliveries, strict=True)) == {"a": 0, "b": 1, "c": 0}


# -- ghosts: entries of cancelled jobs ----------------------------------------------------------


def test_a_cancelled_job_is_skipped_once(lab: Lab) -> None:
    lab.register()
    lab.enqueue("a", "b", "c")
    cancel(lab, "a", "c", workers=("w",))
    assert lab.value("ghosts") == {"a": b"1", "c": b"1"}
    lab.enqueue(NewJob("a", E, chosen=True))
    assert lab.reserve(1).ids == [b"b"]  # want is filled behind a ghost
    assert lab.value("ghosts") == {"c": b"1"}
    assert lab.reserve(5).ids == [b"a"]
    assert lab.keys("jobs") == {**lab.worker_keys("a", "b"), "producers": {"p": b"2"}, "wake": ["1"]}


def test_an_id_cancelled_again_and_again_leaves_as_many_ghosts(lab: Lab) -> None:
    for _ in range(3):
        lab.enqueue(NewJob("a", E, chosen=True))
        cancel(lab, "a")
    assert lab.value("ghosts") == {"a": b"3"}
    lab.register()
    assert lab.reserve().ids == []
    assert lab.keys("producers", "wake") == {**lab.worker_keys(), "jobs": {PAD: b""}}


def test_many_ghosts_are_skipped_in_bounded_calls(lab: Lab) -> None:
    """I12: 100,000 cancelled jobs must not stop Redis for half a second; the token brings the worker back."""
    lab.register()
    ids = [f"j{i}" for i in range(1_500)]
    lab.enqueue(*ids)
    lab.raw.delete(lab.q.jobs)
    lab.raw.hset(lab.q.ghosts, mapping=dict.fromkeys(ids, 1))
    lab.enqueue("alive")
    calls = 0
    while not (reserved := lab.reserve(10)).ids:
        assert lab.value("wake") == ["1"]
        calls += 1
    assert reserved.ids == [b"alive"]
    assert calls == 3
    assert lab.value("ghosts") is None


# -- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("want", "got"), [(1_999, 1_999), (2_000, 2_000), (8_000, 2_000), (100_000, 2_000)])
def test_a_call_hands_out_2000_at_most(lab: Lab, want: int, got: int) -> None:
    """Lua's `unpack` ends at 7,999 values. A script that failed there had popped the ids already: in no key any more."""
    lab.register()
    for part in range(5):
        lab.enqueue(*(f"{part}-{i}" for i in range(500)))
    assert len(lab.reserve(want).ids) == got
    assert len(lab.value("running:w")) == got + 1
    assert len(lab.ready()) == 2_500 - got
    assert lab.value("wake") == ["1"]


def test_the_hot_collections_are_hash_tables(lab: Lab) -> None:
    """The pad: as listpacks they would cost three times as much per job."""
    lab.take("a")
    assert lab.raw.object("ENCODING", lab.q.jobs) == b"hashtable"
    assert lab.raw.object("ENCODING", lab.q.running("w")) == b"hashtable"
