"""The compiled tokens against a reference in Python: what can be taken when, and that no unit is lost or doubled."""

# ruff: noqa: TID251  the core itself is tested here
from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fastq._core import Tokens, UnitCount

pytestmark = pytest.mark.versions


class Reference:
    """The same in twenty lines: a list of [until, units], the earliest first."""

    def __init__(self) -> None:
        self.blocks: list[list[float]] = []
        self.expired = 0.0

    def left(self, now: float) -> float:
        self.expired += sum(n for until, n in self.blocks if until < now)
        self.blocks = [block for block in self.blocks if block[0] >= now]
        return sum(n for _, n in self.blocks)

    def take(self, cost: int, now: float) -> bool:
        if cost > self.left(now):
            return False
        for block in self.blocks:
            used = min(cost, block[1])
            block[1] -= used
            cost -= int(used)
        return True

    def put(self, n: int, until: float) -> None:
        self.blocks = sorted([*self.blocks, [until, n]], key=lambda block: block[0])

    def drain(self) -> float:
        held = sum(n for _, n in self.blocks) + self.expired
        self.__init__()  # type: ignore[misc]
        return held


class Machine(RuleBasedStateMachine):
    """Up to eight blocks at a time; the reference takes any number, the core merges from the ninth on."""

    def __init__(self) -> None:
        super().__init__()
        self.total = UnitCount()
        self.tokens, self.reference, self.now = Tokens(self.total), Reference(), 100.0
        self.used = 0

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.1]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(n=st.integers(0, 1_000), seconds=st.sampled_from([-0.01, 0.0, 0.02, 0.005, 0.1]))
    def put(self, n: int, seconds: float) -> None:
        if len([1 for block in self.reference.blocks if block[1]]) < 8:
            self.tokens.put(n, self.now + seconds)
            self.reference.put(n, self.now + seconds)

    @rule(cost=st.integers(0, 1_200))
    def take(self, cost: int) -> None:
        taken = self.tokens.take(cost, self.now)
        assert taken is self.reference.take(cost, self.now)
        self.used += cost if taken else 0

    @rule()
    def look(self) -> None:
        assert self.tokens.left(self.now) == self.reference.left(self.now)
        assert self.tokens.expired == self.reference.expired

    @rule()
    def drain(self) -> None:
        assert self.tokens.drain() == self.reference.drain()

    @invariant()
    def nothing_is_lost(self) -> None:
        held = sum(n for _, n in self.reference.blocks) + self.reference.expired
        assert self.tokens.left(self.now) + self.tokens.expired == held

    @invariant()
    def what_was_used_is_counted(self) -> None:
        assert self.tokens.used == self.total.value == self.used


TestTokens = Machine.TestCase


@given(st.lists(st.tuples(st.integers(1, 100), st.floats(0, 1)), min_size=1, max_size=40), st.floats(0, 1))
def test_merged_blocks_only_ever_end_earlier(puts: list[tuple[int, float]], now: float) -> None:
    tokens, reference = Tokens(), Reference()
    for n, until in puts:
        tokens.put(n, until)
        reference.put(n, until)
    total = sum(n for n, _ in puts)
    assert tokens.left(now) <= reference.left(now)
    assert tokens.left(now) + tokens.expired == total
    assert tokens.drain() == total
    assert (tokens.drain(), tokens.left(now), tokens.expired) == (0, 0, 0)


def test_units_may_be_used_up_to_the_instant_and_not_later() -> None:
    tokens = Tokens()
    tokens.put(3, 10.0)
    assert tokens.take(1, 10.0)
    assert not tokens.take(1, math.nextafter(10.0, 11))
    assert (tokens.expired, tokens.drain()) == (2, 2)


def test_the_shortest_lived_go_first() -> None:
    tokens = Tokens()
    tokens.put(2, 20.0)
    tokens.put(2, 10.0)
    assert tokens.take(2, 5.0)
    assert tokens.left(15.0) == 2


def test_tokens_count_what_is_used_each_and_together() -> None:
    total = UnitCount()
    first, second = Tokens(total), Tokens(total)
    first.put(5, 10.0)
    second.put(5, 10.0)
    assert first.take(3, 1.0)
    assert second.take(2, 1.0)
    assert not second.take(4, 1.0)
    second.count(7)  # used without having been in here
    first.count(-1)  # given back
    assert (first.used, second.used, total.value) == (2, 9, 11)


def test_all_or_nothing_across_blocks() -> None:
    tokens = Tokens()
    tokens.put(2, 10.0)
    tokens.put(2, 20.0)
    assert not tokens.take(5, 5.0)
    assert tokens.take(3, 5.0)
    assert tokens.left(5.0) == 1


def test_a_free_acquire_needs_no_units() -> None:
    """F018: cost 0."""
    assert Tokens().take(0, 1.0)


def test_the_oldest_grant_is_known_as_long_as_its_units_may_be_in_here() -> None:
    tokens = Tokens()
    tokens.put(1, 10.0, 1_795_305_600_000_001)
    tokens.put(1, 11.0, 1_795_305_600_000_005)
    assert tokens.granted == 1_795_305_600_000_001
    assert tokens.take(2, 5.0)
    tokens.put(1, 12.0, 1_795_305_600_000_009)
    assert tokens.granted == 1_795_305_600_000_009


def test_when_it_is_time_to_ask_for_more() -> None:
    """Few are left, or what is left has lost much of its time, and is used."""
    tokens = Tokens()
    tokens.put(10, 100.0)
    tokens.mark, tokens.renew = 5, 50.0
    assert tokens.take(5, 50.0)
    assert not tokens.low
    assert tokens.take(1, 50.0)
    assert tokens.low, "fewer than the mark"
    tokens.mark = 0
    assert not tokens.take(5, 51.0)
    assert not tokens.low, "none was taken"
    assert tokens.take(1, 51.0)
    assert tokens.low, "old"
    tokens.mark, tokens.renew = 0, math.inf
    assert tokens.take(1, 99.0)
    assert not tokens.low


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    tokens = Tokens()
    tokens.put(5, 10.0)
    for call in (
        lambda: tokens.take(-1, 1.0),
        lambda: tokens.put(-1, 1.0),
        lambda: tokens.put(1, math.nan),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(OverflowError):
        tokens.take(2**64, 1.0)
    with pytest.raises(TypeError):
        tokens.take("1", 1.0)  # type: ignore[arg-type]
    assert tokens.left(1.0) == 5


def test_its_size_does_not_depend_on_what_is_in_it() -> None:
    """100,000 partitions at once cost 22 MB."""
    tokens = Tokens()
    before = sys.getsizeof(tokens)
    for n in range(100):
        tokens.put(n, float(n))
    assert sys.getsizeof(tokens) == before <= 224
