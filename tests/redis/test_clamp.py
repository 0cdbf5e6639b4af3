"""clamp.lua: a lease that ends further ahead than it is long is brought back; no other lease is touched (F-36)."""

from __future__ import annotations

from fastq.broker import commands
from tests.redis.lab import Lab

HOUR = 3_600_000


def test_a_lease_far_ahead_is_brought_back_to_its_length(lab: Lab) -> None:
    lab.register("w", HOUR)
    first = lab.call(commands.clamp(lab.q, [("w", 15_000)]))
    assert first == 1
    assert lab.value("workers") == [("w", lab.near(15_000))]


def test_sent_twice_it_moves_on_with_the_clock_only(lab: Lab) -> None:
    lab.register("w", HOUR)
    lab.call(commands.clamp(lab.q, [("w", 15_000)]))
    before = lab.keys()
    assert lab.call(commands.clamp(lab.q, [("w", 15_000)])) == 0
    assert lab.keys() == before


def test_valid_leases_are_left_alone(lab: Lab) -> None:
    lab.register("short", 5_000)
    lab.register("long", HOUR)
    before = lab.keys()
    assert lab.call(commands.clamp(lab.q, [("short", 15_000), ("long", HOUR)])) == 0
    assert lab.keys() == before


def test_an_unknown_worker_is_not_made(lab: Lab) -> None:
    assert lab.call(commands.clamp(lab.q, [("nobody", 15_000)])) == 0
    assert lab.keys() == {}
