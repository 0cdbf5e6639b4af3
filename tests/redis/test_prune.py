"""prune.lua: idle producers and the names of expired buckets go; what is in use stays."""

from __future__ import annotations

from fastq.broker import commands
from fastq.broker.commands import Pruned
from tests.redis.lab import FAR, Lab

HOUR = 3_600_000


def test_idle_producers_go(lab: Lab) -> None:
    now = lab.now()
    lab.raw.hset(lab.q.producers, mapping={"busy": now * 1_000, "idle": (now - HOUR - 1_000) * 1_000})
    assert lab.twice(commands.prune(lab.q, HOUR)) == (Pruned(1, 0, b"0"), Pruned(0, 0, b"0"))
    assert lab.keys() == {"producers": {"busy": str(now * 1_000).encode()}}


def test_names_of_expired_buckets_go(lab: Lab) -> None:
    now = lab.now()
    lab.raw.zadd(lab.q.done, {"1000:1": now - 1, "1000:2": now + FAR})
    assert lab.twice(commands.prune(lab.q, HOUR)) == (Pruned(0, 1, b"0"), Pruned(0, 0, b"0"))
    assert lab.keys() == {"done": [("1000:2", now + FAR)]}


def test_a_call_is_bounded_and_its_cursor_leads_on(lab: Lab) -> None:
    old = (lab.now() - 2 * HOUR) * 1_000
    lab.raw.hset(lab.q.producers, mapping={f"p{n}": old + n for n in range(3_000)})
    first = lab.call(commands.prune(lab.q, HOUR, count=500))
    assert 500 <= first.producers < 1_000
    forgotten, cursor, calls = first.producers, first.cursor, 1
    while cursor != b"0":
        more = lab.call(commands.prune(lab.q, HOUR, cursor, 500))
        forgotten, cursor, calls = forgotten + more.producers, more.cursor, calls + 1
    assert forgotten == 3_000
    assert calls <= 7
    assert lab.keys() == {}


def test_a_value_that_is_no_number_is_left_alone(lab: Lab) -> None:
    lab.raw.hset(lab.q.producers, "foreign", "text")
    assert lab.call(commands.prune(lab.q, HOUR)) == Pruned(0, 0, b"0")
    assert lab.keys() == {"producers": {"foreign": b"text"}}


def test_nothing_to_prune(lab: Lab) -> None:
    assert lab.call(commands.prune(lab.q, HOUR)) == Pruned(0, 0, b"0")
    assert lab.keys() == {}
