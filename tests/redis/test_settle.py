"""settle.lua: every outcome of a held job is written once; what is not held any more is left alone."""

from __future__ import annotations

from typing import Any

import pytest

from fastq.broker.commands import Batch, NewJob, Settled
from fastq.broker.keys import PAD
from tests.redis.lab import FAR, Lab, batch, envelope, texts

E = envelope()
E2 = envelope(tag="again")
BUCKET = "60000:7"


def recorded(lab: Lab, *ids: str, bucket: str = BUCKET, ttl: int = FAR) -> list[Any]:
    return [(bucket, lab.started + ttl, i, b"record " + i.encode()) for i in ids]


@pytest.fixture
def held(lab: Lab) -> Lab:
    """A worker that holds a, b and c, and a quiet queue."""
    lab.take("a", "b", "c")
    lab.raw.delete(lab.q.wake, lab.q.producers)
    return lab


def rest(lab: Lab, *ids: str) -> dict[str, Any]:
    """The keys while the worker still holds these."""
    return {**lab.worker_keys(*ids), "jobs": {PAD: b"", **dict.fromkeys(ids, E)}}


# -- one outcome each ---------------------------------------------------------------------------


def test_succeeded_leaves_nothing(held: Lab) -> None:
    assert held.twice(held.settle_command(succeeded=["a", "c"])) == (Settled(1, []), Settled(1, [b"a", b"c"]))
    assert held.keys() == rest(held, "b")


def test_recorded_leaves_a_record_with_an_end(held: Lab) -> None:
    command = held.settle_command(recorded=recorded(held, "a", "b"))
    assert held.twice(command) == (Settled(1, []), Settled(1, [b"a", b"b"]))
    expires = held.started + FAR
    assert held.keys() == {
        **rest(held, "c"),
        "done": [(BUCKET, expires)],
        f"done:{BUCKET}": {"a": b"record a", "b": b"record b"},
    }
    assert held.raw.pexpiretime(held.key(f"done:{BUCKET}")) == expires


def test_records_of_several_buckets(held: Lab) -> None:
    rows = recorded(held, "a", "c") + recorded(held, "b", bucket="1000:9", ttl=FAR - 5)
    held.settle(recorded=[rows[0], rows[2], rows[1]])
    assert held.value("done") == [("1000:9", held.started + FAR - 5), (BUCKET, held.started + FAR)]
    assert held.value("done:1000:9") == {"b": b"record b"}
    assert held.value(f"done:{BUCKET}") == {"a": b"record a", "c": b"record c"}
    assert held.raw.pexpiretime(held.key("done:1000:9")) == held.started + FAR - 5


def test_later_is_scheduled_with_its_new_envelope(held: Lab) -> None:
    assert held.twice(held.settle_command(later=[("a", FAR, E2)])) == (Settled(2, []), Settled(2, [b"a"]))
    expected = rest(held, "b", "c")
    expected["jobs"]["a"] = E2
    assert held.keys() == {**expected, "due": [("a", held.near(FAR))], "due:wake": ["1"]}


def test_later_at_once_goes_to_the_end_of_its_list(held: Lab) -> None:
    held.enqueue("x", priority=3)
    held.raw.delete(held.q.wake, held.q.producers)
    moved = envelope(3, "again")
    assert held.twice(held.settle_command(later=[("a", 0, moved)])) == (Settled(2, []), Settled(2, [b"a"]))
    expected = rest(held, "b", "c")
    expected["jobs"] |= {"a": moved, "x": envelope(3)}
    assert held.keys() == {**expected, "ready:3": ["x", "a"], "wake": ["1"]}


def test_only_a_new_head_wakes_the_scheduler(held: Lab) -> None:
    held.settle(later=[("a", FAR, E)])
    held.raw.delete(held.q.due_wake)
    held.settle(later=[("b", FAR + 60_000, E)])
    assert held.value("due:wake") is None
    held.settle(later=[("c", FAR - 60_000, E)])
    assert held.value("due:wake") == ["1"]


def test_the_earliest_of_several_is_what_the_scheduler_hears_of(held: Lab) -> None:
    held.settle(later=[("a", FAR, E)])
    held.raw.delete(held.q.due_wake)
    held.settle(later=[("b", FAR - 60_000, E), ("c", FAR + 60_000, E)])
    assert held.value("due:wake") == ["1"]


def test_there_is_one_wake_token_at_most(held: Lab) -> None:
    held.settle(later=[("a", 0, E), ("b", 0, E)])
    held.settle(released=["c"])
    assert held.value("wake") == ["1"]


def test_failed_goes_to_the_dead_letters(held: Lab) -> None:
    command = held.settle_command(failed=[("a", E2, b"error a"), ("b", E, b"error b")])
    assert held.twice(command) == (Settled(1, []), Settled(1, [b"a", b"b"]))
    assert held.keys() == {
        **rest(held, "c"),
        "dead": [("a", held.near()), ("b", held.near())],
        "dead:jobs": {"a": E2, "b": E},
        "dead:errors": {"a": b"error a", "b": b"error b"},
    }


def test_released_jobs_go_to_the_front_in_their_order(held: Lab) -> None:
    held.enqueue("x")
    held.raw.delete(held.q.wake, held.q.producers)
    assert held.twice(held.settle_command(released=["a", "b"])) == (Settled(1, []), Settled(1, [b"a", b"b"]))
    expected = rest(held, "c")
    expected["jobs"] |= {"a": E, "b": E, "x": E}
    assert held.keys() == {**expected, "ready:5": ["a", "b", "x"], "wake": ["1"]}


def test_each_job_is_released_to_the_list_of_its_priority(lab: Lab) -> None:
    lab.register()
    for priority in (0, 5, 10):
        lab.enqueue(f"p{priority}", priority=priority)
    ids = texts(lab.reserve().ids)
    lab.settle(released=ids)
    assert {name: lab.value(name) for name in ("ready:0", "ready:5", "ready:10")} == {
        "ready:0": ["p0"],
        "ready:5": ["p5"],
        "ready:10": ["p10"],
    }


@pytest.mark.parametrize("data", [b"", b"\x97", b"\x97\x0b", b"\x97\xff\xff"])
def test_an_unreadable_envelope_counts_as_normal_priority(lab: Lab, data: bytes) -> None:
    """F-38: what cannot be decoded still has one place to be."""
    lab.register()
    lab.enqueue(NewJob("a", data), NewJob("b", data))
    lab.reserve()
    lab.settle(released=["a"], later=[("b", 0, data)])
    assert lab.value("ready:5") == ["a", "b"]


def test_an_id_without_an_envelope_ends_when_it_is_released(lab: Lab) -> None:
    """There is nothing to run; given back it would come round for ever."""
    lab.register()
    lab.raw.rpush(lab.q.ready[5], "foreign")
    lab.reserve()
    assert lab.settle(released=["foreign"]) == Settled(0, [])
    assert lab.ready() == []


# -- together -----------------------------------------------------------------------------------


def test_all_five_in_one_call(lab: Lab) -> None:
    lab.take("a", "b", "c", "d", "e", "f")
    lab.raw.delete(lab.q.wake)
    command = lab.settle_command(
        succeeded=["a"],
        recorded=recorded(lab, "b"),
        later=[("c", FAR, E2)],
        failed=[("d", E, b"error")],
        released=["e"],
    )
    assert lab.call(command) == Settled(1, [])
    assert lab.keys("producers") == {
        **lab.worker_keys("f"),
        "jobs": {PAD: b"", "c": E2, "e": E, "f": E},
        "done": [(BUCKET, lab.started + FAR)],
        f"done:{BUCKET}": {"b": b"record b"},
        "due": [("c", lab.near(FAR))],
        "due:wake": ["1"],
        "dead": [("d", lab.near())],
        "dead:jobs": {"d": E},
        "dead:errors": {"d": b"error"},
        "ready:5": ["e"],
        "wake": ["1"],
    }
    before = lab.keys()
    assert lab.call(command) == Settled(1, [b"a", b"b", b"c", b"d", b"e"])
    assert lab.keys() == before


def test_nothing_to_settle(held: Lab) -> None:
    before = held.keys()
    assert held.twice(held.settle_command()) == (Settled(3, []), Settled(3, []))
    assert held.keys() == before
    assert len(Batch()) == 0


# -- the fence ------------------------------------------------------------------------------------


SECTIONS: dict[str, list[Any]] = {
    "succeeded": ["a"],
    "recorded": [(BUCKET, 1 << 50, "a", b"record")],
    "later": [("a", 0, E2)],
    "failed": [("a", E2, b"error")],
    "released": ["a"],
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_worker_whose_lease_was_lost_changes_nothing(held: Lab, section: str) -> None:
    """Invariant 2, F-10: the job is pending again, and stays so."""
    held.recover()
    before = held.keys()
    assert held.settle(**{section: SECTIONS[section]}) == Settled(-1, [b"a"])
    assert held.keys() == before


@pytest.mark.parametrize("section", SECTIONS)
def test_a_job_that_another_worker_holds_is_left_to_it(held: Lab, section: str) -> None:
    held.recover(limit=1_000)
    held.register("v")
    held.register("w")
    assert len(held.reserve(10, "v").ids) == 3
    held.enqueue("own")
    held.reserve(1, "w")
    before = held.keys()
    assert held.settle(**{section: SECTIONS[section]}) == Settled(1, [b"a"])
    assert held.keys() == before
    assert held.settle("v", **{section: SECTIONS[section]}) == Settled(2, [])


def test_owned_and_stale_outcomes_in_one_section(held: Lab) -> None:
    held.raw.srem(held.q.running("w"), "b")
    assert held.settle(later=[("a", FAR, E2), ("b", FAR, E2), ("c", FAR, E2)]) == Settled(0, [b"b"])
    assert [member for member, _ in held.value("due")] == ["a", "c"]
    assert held.value("jobs") == {PAD: b"", "a": E2, "b": E, "c": E2}


# -- what goes with a job when it is over -------------------------------------------------------------


@pytest.mark.parametrize("section", ["succeeded", "recorded", "failed"])
def test_the_end_of_a_job_frees_its_unique_key_and_forgets_its_deliveries(lab: Lab, section: str) -> None:
    lab.enqueue(NewJob("a", E, unique="k"), NewJob("other", E, unique="o"))
    lab.raw.hset(lab.q.deliveries, mapping={"a": 2, "other": 1})
    lab.register()
    lab.reserve()
    lab.settle(**{section: SECTIONS[section]})
    assert lab.value("unique") == {"o": b"other"}
    assert lab.value("unique:of") == {"other": b"o"}
    assert lab.value("deliveries") == {"other": b"1"}


@pytest.mark.parametrize("section", ["later", "released"])
def test_a_job_that_goes_on_keeps_both(lab: Lab, section: str) -> None:
    lab.enqueue(NewJob("a", E, unique="k"))
    lab.raw.hset(lab.q.deliveries, "a", 2)
    lab.register()
    lab.reserve()
    lab.settle(**{section: SECTIONS[section]})
    assert lab.value("unique") == {"k": b"a"}
    assert lab.value("unique:of") == {"a": b"k"}
    assert lab.value("deliveries") == {"a": b"2"}


def test_a_key_that_another_job_holds_by_now_stays(lab: Lab) -> None:
    lab.enqueue(NewJob("a", E, unique="k"))
    lab.register()
    lab.reserve()
    lab.raw.hset(lab.q.unique, "k", "successor")
    lab.settle(succeeded=["a"])
    assert lab.value("unique") == {"k": b"successor"}
    assert lab.value("unique:of") is None


# -- the dead-letter queue is bounded ---------------------------------------------------------------


def dead(lab: Lab) -> list[str]:
    ids = [member for member, _ in lab.value("dead") or ()]
    assert set(lab.value("dead:jobs") or ()) == set(ids)
    assert set(lab.value("dead:errors") or ()) == set(ids)
    return ids


def test_the_oldest_dead_letters_make_room(held: Lab) -> None:
    """F-48: bounded by count."""
    for age, old in ((3, "old3"), (2, "old2"), (1, "old1")):
        held.raw.zadd(held.q.dead, {old: held.started - age})
        held.raw.hset(held.q.dead_jobs, old, E)
        held.raw.hset(held.q.dead_errors, old, b"error")
    held.settle(failed=[("a", E, b"error"), ("b", E, b"error")], dead_max=4)
    assert dead(held) == ["old2", "old1", "a", "b"]


def test_a_lower_bound_trims_a_thousand_at_a_time(held: Lab) -> None:
    for part in range(5):
        ids = [f"{part}-{i}" for i in range(500)]
        held.raw.zadd(held.q.dead, dict.fromkeys(ids, 1))
        held.raw.hset(held.q.dead_jobs, mapping=dict.fromkeys(ids, E))
        held.raw.hset(held.q.dead_errors, mapping=dict.fromkeys(ids, b"error"))
    held.settle(failed=[("a", E, b"error")], dead_max=1)
    assert len(dead(held)) == 1_501
    held.settle(failed=[("b", E, b"error"), ("c", E, b"error")], dead_max=1)
    assert len(dead(held)) == 1


def test_without_room_nothing_is_kept(held: Lab) -> None:
    held.settle(failed=[("a", E, b"error")], dead_max=0)
    assert dead(held) == []
    assert held.keys() == rest(held, "b", "c")


# -- limits -------------------------------------------------------------------------------------------


def fill(lab: Lab, count: int) -> list[str]:
    lab.register()
    ids = [f"j{i}" for i in range(count)]
    for start in range(0, count, 500):
        lab.enqueue(*ids[start : start + 500])
    while lab.reserve(2_000).ids:
        pass
    return ids


def test_5000_outcomes_across_the_sections(lab: Lab) -> None:
    ids = fill(lab, 5_000)
    command = lab.settle_command(
        dead_max=10_000,
        succeeded=ids[:1_000],
        recorded=recorded(lab, *ids[1_000:2_000]),
        later=[(i, FAR, E2) for i in ids[2_000:3_000]],
        failed=[(i, E, b"error") for i in ids[3_000:4_000]],
        released=ids[4_000:],
    )
    assert lab.call(command) == Settled(0, [])
    assert len(lab.call(command).stale) == 5_000
    assert lab.jobs() == {*ids[2_000:3_000], *ids[4_000:]}
    assert lab.value("ready:5") == ids[4_000:]
    assert {name: len(lab.value(name)) for name in (f"done:{BUCKET}", "due", "dead")} == {
        f"done:{BUCKET}": 1_000,
        "due": 1_000,
        "dead": 1_000,
    }


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("count", [5_000, 5_001, 12_000])
def test_a_section_has_no_limit(lab: Lab, section: str, count: int) -> None:
    """A worker has up to 10,000 slots. Lua's `unpack` ends at 7,999 values (3,999 records), so the script cuts at 5,000."""
    ids = fill(lab, count)
    lab.raw.hset(lab.q.deliveries, mapping=dict.fromkeys(ids, 1))
    rows: dict[str, list[Any]] = {
        "succeeded": ids,
        "recorded": recorded(lab, *ids),
        "later": [(i, FAR, E2) for i in ids],
        "failed": [(i, E2, b"error") for i in ids],
        "released": ids,
    }
    command = lab.settle_command(dead_max=20_000, **{section: rows[section]})
    assert lab.call(command) == Settled(0, [])
    goes_on = section in {"later", "released"}
    assert len(lab.jobs()) == (count if goes_on else 0)
    assert len(lab.value("deliveries") or ()) == (count if goes_on else 0)
    places = {"recorded": f"done:{BUCKET}", "later": "due", "failed": "dead", "released": "ready:5"}
    if section in places:
        assert len(lab.value(places[section])) == count
    assert len(lab.call(command).stale) == count


def test_a_batch_knows_its_ids_and_its_size() -> None:
    filled = batch(**SECTIONS)
    assert len(filled) == 5
    assert filled.ids() == ["a"] * 5
