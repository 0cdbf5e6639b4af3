"""acquire.lua: units and slots, both or nothing, by Redis's clock; and the same as the memory engine to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from fastq.broker import commands
from fastq.broker.keys import LimitKeys
from fastq.limits import FixedWindow, Rule, SlidingWindow, TokenBucket, parse_rate
from tests.redis.limit_lab import LimitLab
from tests.unit.limit_fleet import START, US, Fleet, Memory, over_bucket, over_window


@pytest.fixture
def lab(redis_url: str, raw: Any) -> Iterator[LimitLab]:
    lab = LimitLab(redis_url, raw)
    yield lab
    lab.conn.close()


# -- units ------------------------------------------------------------------------------------


def test_a_bucket_gives_what_it_has_and_says_when_there_is_more(lab: LimitLab) -> None:
    """F006, F021: 10/s holds 9 units and a reserve for late uses; the wait is exact to the µs."""
    lab.use(Rule(parse_rate("10/s")))
    reply = lab.acquire(1, 100)
    assert (reply.status, reply.units, reply.left, reply.wait_us) == (b"granted", 9, 0, 50_000)
    assert reply.now_us == lab.now
    assert lab.after(0.049999).acquire().wait_us == 1
    assert lab.after(0.000001).acquire().units == 1
    assert (lab.acquire().status, lab.acquire().wait_us) == (b"short", 100_000)
    assert lab.acquire(5).wait_us == 500_000


def test_a_window_gives_its_limit_and_then_nothing_until_the_first_part_has_left(lab: LimitLab) -> None:
    """F005: the parts of a 60 s window are 0.6 s wide; START is the beginning of one."""
    lab.use(Rule(SlidingWindow(10, 60)))
    assert lab.acquire(1, 4).left == 6
    assert lab.after(30).acquire(1, 10).units == 6
    wait = lab.acquire().wait_us
    assert wait == 30_700_000
    assert lab.acquire(5).wait_us == wait + 30 * US
    assert lab.after(wait / US - 0.000001).acquire().status == b"short"
    assert lab.after(0.000001).acquire(1, 10).units == 4


def test_a_window_holds_a_bounded_number_of_fields(lab: LimitLab) -> None:
    """No entry per call: at most 102 parts, whatever the limit."""
    lab.use(Rule(SlidingWindow(1_000_000, 60)))
    sizes = []
    for _ in range(1_000):
        lab.after(0.1).acquire()
        sizes.append(lab.raw.hlen(lab.keys.state))
    assert max(sizes) <= 102 + 2
    assert lab.state().left == 1_000_000 - 605


def test_a_fixed_window_gives_its_limit_and_starts_again(lab: LimitLab) -> None:
    rule = Rule(FixedWindow(5, "minute"))
    terms = lab.use(rule)
    assert lab.acquire(1, 9).units == 5
    assert lab.acquire().wait_us == terms.c - lab.now
    lab.after((terms.c - lab.now) / US)
    assert lab.acquire().status == b"window"
    assert lab.use(rule) != terms
    assert lab.acquire(1, 2).left == 3


def test_a_window_of_the_future_is_refused(lab: LimitLab) -> None:
    """A caller whose idea of the time is ahead asks again with that of the reply."""
    lab.terms = Rule(FixedWindow(5, "minute")).terms(START + 120 * US)
    reply = lab.acquire()
    assert (reply.status, reply.now_us) == (b"window", START)
    assert lab.stored() == {}


@pytest.mark.parametrize("rule", [Rule(parse_rate("10/s")), Rule(SlidingWindow(9, 1)), Rule(FixedWindow(9, "minute"))])
def test_a_free_acquire_is_granted_when_nothing_is_left(lab: LimitLab, rule: Rule) -> None:
    """F018: cost 0 is refused by a penalty alone."""
    lab.use(rule)
    lab.acquire(1, 9)
    assert lab.acquire().status == b"short"
    assert lab.acquire(0).status == b"granted"
    assert lab.slots("a", cost=0).status == b"granted"
    lab.penalize(1)
    assert lab.acquire(0).status == b"penalized"


@pytest.mark.parametrize("rule", [Rule(parse_rate("10/s")), Rule(SlidingWindow(9, 10)), Rule(FixedWindow(9, "hour"))])
def test_the_state_goes_when_it_says_nothing_any_more(lab: LimitLab, rule: Rule) -> None:
    terms = lab.use(rule)
    lab.acquire(1, 5)
    expires = lab.expires(lab.keys.state)
    lab.now = expires * 1_000
    if terms.kind != "fixed":
        assert lab.state()[1:3] == (9, 0)
    ends = {"bucket": START + 5 * 100_000 + terms.c, "window": START + terms.b + terms.c, "fixed": terms.c}[terms.kind]
    assert 0 <= expires * 1_000 - ends < 1_000


def test_partitions_have_their_own_quota_and_one_override(lab: LimitLab) -> None:
    lab.use(Rule(SlidingWindow(1, 60)))
    assert lab.acquire().units == 1
    lab.keys = LimitKeys("fastq", "api", "tenant 42")
    assert lab.acquire().units == 1
    assert lab.acquire().status == b"short"


# -- slots ------------------------------------------------------------------------------------


def test_slots_up_to_the_limit_in_the_order_of_the_request(lab: LimitLab) -> None:
    """F008: a third holder waits for a lease to end, and says so."""
    reply = lab.slots("a", "b", "c")
    assert (reply.status, reply.slots, reply.left) == (b"granted", 2, -1)
    reply = lab.after(1).slots("c")
    assert (reply.status, reply.wait_us) == (b"full", 14 * US)
    assert lab.after(14).slots("c").slots == 1


def test_a_holder_that_asks_again_has_the_same_slot(lab: LimitLab) -> None:
    """A lost reply (invariant 6)."""
    assert lab.slots("a", "b").slots == 2
    assert lab.after(5).slots("b").slots == 1
    assert lab.state().holders == 2
    assert lab.after(10).slots("c").slots == 1, "a's lease has ended, b's was renewed"
    assert lab.slots("d").status == b"full"


def test_a_slot_and_its_units_or_neither(lab: LimitLab) -> None:
    lab.use(Rule(parse_rate("10/s")))
    reply = lab.slots("a", "b", "c", most=5, cost=4)
    assert (reply.slots, reply.units, reply.left, reply.wait_us) == (2, 8, 1, 250_000)
    assert lab.state().holders == 2
    before = lab.stored()
    reply = lab.slots("c", most=5, cost=4)
    assert (reply.status, reply.wait_us) == (b"short", 250_000)
    assert lab.slots("c", most=2).status == b"full"
    assert lab.stored() == before


def test_free_slots_wake_the_next_waiter(lab: LimitLab) -> None:
    lab.slots("a")
    assert lab.raw.lrange(lab.keys.wake, 0, -1) == [b"1"]
    assert lab.call(commands.wait_for_slot(lab.keys, 0.01)) is True
    lab.slots("b")
    assert lab.call(commands.wait_for_slot(lab.keys, 0.01)) is False


# -- overrides --------------------------------------------------------------------------------


def test_an_override_is_told_before_anything_is_granted(lab: LimitLab) -> None:
    """A rule updated at run time is in force with each process's next request, and so is its end."""
    lab.use(Rule(parse_rate("100/s")))
    slower = Rule(parse_rate("1/s"), 3)
    lab.call(commands.override_rule(lab.keys, slower))
    reply = lab.acquire()
    assert (reply.status, Rule.decode(reply.rule)) == (b"rule", slower)
    assert lab.raw.exists(lab.keys.state) == 0
    lab.use(slower)
    assert lab.acquire(override=reply.rule).status == b"granted"
    lab.call(commands.override_rule(lab.keys, None))
    assert lab.acquire(override=reply.rule)[::6] == (b"rule", b"")


def test_a_changed_bucket_is_in_force_at_once(lab: LimitLab) -> None:
    """The debt of a slow rule does not hold a fast one up for longer than the fast one's burst takes."""
    lab.use(Rule(TokenBucket(0.01, 50)))
    lab.acquire(1, 49)
    lab.use(Rule(parse_rate("100/s")))
    assert lab.acquire().wait_us <= 60_001


# -- the clock and the network --------------------------------------------------------------------


def test_on_the_servers_own_clock(lab: LimitLab) -> None:
    """A short run of the scripts as they are: 300 grants at 2,000/s, none too many by the replies' times."""
    terms = lab.use(Rule(parse_rate("2000/s burst 50")))
    grants = []
    while len(grants) < 300:
        reply = lab.conn.call(commands.acquire(lab.keys, terms, need=1, want=1))
        if reply.units:
            grants.append((reply.now_us, 1))
    assert over_bucket(grants, 2_000, 50 - 2_000 * terms.use_within) <= 0
    taken = (grants[-1][0] - grants[0][0]) / US
    assert 2_000 * taken >= 300 - 50


LIMITS = {
    "10/s": (Rule(parse_rate("10/s")), 30),
    "100/s": (Rule(parse_rate("100/s")), 5),
    "10000/s": (Rule(parse_rate("10000/s")), 1.2),
    "60/min": (Rule(SlidingWindow(60, 60)), 6_000),
    "60 a minute": (Rule(FixedWindow(60, "minute")), 6_000),
}


@pytest.mark.parametrize("clients", [1, 4])
@pytest.mark.parametrize("name", LIMITS)
def test_never_over_and_hardly_under(lab: LimitLab, name: str, clients: int) -> None:
    """Invariant 5 on the real scripts, their clock set by a simulated fleet."""
    rule, seconds = LIMITS[name]
    fleet = Fleet(lab.engine, rule, clients=clients, seconds=seconds).run()
    assert fleet.excess() <= 0
    if isinstance(rule.rate, TokenBucket):
        assert fleet.share_used(skip=1) >= 0.98
    else:
        assert (fleet.used - rule.rate.limit) / seconds >= 0.98  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["10/s", "100/s", "60/min", "60 a minute"])
def test_never_over_whatever_clients_do(lab: LimitLab, name: str, seed: int) -> None:
    rule, seconds = LIMITS[name]
    delay = [(0, 0.0005), (0, 0.003), (0, 0.03)][seed]
    fleet = Fleet(lab.engine, rule, clients=4, seconds=min(seconds, 600), wild=True, delay=delay, seed=seed).run()
    assert fleet.used > 0
    assert fleet.excess() <= 0


@pytest.mark.parametrize("rate", ["1/h burst 7", "10/m burst 5", "30/m burst 30", "7/h burst 1000", "1/m"])
def test_a_fresh_slow_bucket_has_its_whole_burst_unit_by_unit(lab: LimitLab, rate: str) -> None:
    rule = Rule(parse_rate(rate))
    terms = lab.use(rule)
    assert isinstance(rule.rate, TokenBucket)
    burst = int(rule.rate.size)
    assert lab.state().left == burst
    assert [lab.acquire(1).status for _ in range(burst + 1)] == [b"granted"] * burst + [b"short"]
    assert lab.after(burst * terms.a / US + 1).acquire(burst).units == burst, "and all at once"


def test_windows_hold_at_the_edges_of_their_parts(lab: LimitLab) -> None:
    """One unit asked for at each µs around each edge: what is granted never exceeds the limit."""
    rule = Rule(SlidingWindow(3, 1))
    terms, grants = lab.use(rule), []
    for part in range(250):
        for offset in (-1, 0, 1):
            lab.now = START + part * int(terms.b) + offset + 1
            if lab.acquire().units:
                grants += [(lab.now, 1), (lab.now + int(terms.use_within * US), 0)]
    assert over_window(grants, 3, US) <= 0
    assert sum(n for _, n in grants) >= 6


# -- the same as the memory engine ------------------------------------------------------------------

RULES = [
    Rule(parse_rate("10/s")),
    Rule(parse_rate("3/s burst 1.5"), 3),
    Rule(parse_rate("50000/s burst 700")),
    Rule(TokenBucket(1 / 7, 2.2), 2),
    Rule(TokenBucket(1 / 7, 3), 2),
    Rule(SlidingWindow(20, 1)),
    Rule(SlidingWindow(7, 33.3), 3),
    Rule(FixedWindow(9, 2)),
    Rule(None, 3),
]
NAME = st.sampled_from("abcd")
SECONDS = st.sampled_from([0.0, 0.000001, 0.000777, 0.02, 0.1, 0.5, 1.0, 1.01, 3.0, 40.0, 100.0])
STEP = st.one_of(
    st.tuples(st.just("acquire"), st.integers(0, 9), st.integers(0, 700)),
    st.tuples(st.just("slots"), st.lists(st.tuples(NAME, st.integers(0, 3)), min_size=1, max_size=4, unique_by=lambda p: p[0]), st.integers(1, 20_000)),
    st.tuples(st.just("give_back"), st.integers(0, 30), st.lists(NAME, max_size=2, unique=True)),
    st.tuples(st.just("again"), st.just(0), st.just(0)),
    st.tuples(st.just("hold"), st.integers(1, 20_000), st.lists(NAME, min_size=1, max_size=4, unique=True)),
    st.tuples(st.just("penalize"), st.sampled_from([0.0, 0.3, 2.0]), st.sampled_from([0.0, 0.0, 2.0, 60.0])),
    st.tuples(st.just("override"), st.sampled_from([None, *RULES]), st.just(0)),
    st.tuples(st.just("reset"), st.just(0), st.just(0)),
)  # fmt: skip


def rounded(reply: Any, other: Any) -> Any:
    """A reply whose waits are the other's where they differ by no more than 2 µs: the order of additions is another."""
    waits = [name for name in ("wait_us", "reset_us") if hasattr(reply, name)]
    near = {name: getattr(other, name) for name in waits if abs(getattr(reply, name) - getattr(other, name)) <= 2}
    return reply._replace(**near) if near else reply


class Twins:
    """The scripts and the memory engine, sent the same requests at the same instants."""

    def __init__(self, lab: LimitLab, rule: Rule) -> None:
        lab.raw.flushdb()
        self.lab, self.memory, self.rule = lab, Memory(), rule
        self.now, self.granted, self.tickets, self.override = START, START, 0, b""
        self.last: Any = None
        self.sent = 0
        self.expiring = [lab.keys.slots]

    def step(self, seconds: float, verb: str, one: Any, two: Any) -> None:
        self.now += round(seconds * US)
        keys, terms = self.lab.keys, self.rule.terms(self.now)
        match verb:
            case "acquire":
                reply = self.both(commands.acquire(keys, terms, need=one, want=two, override=self.override))
                self.granted = reply.now_us
            case "slots":
                most = self.rule.max_concurrent or 2
                options = {"most": most, "lease_ms": two, "holders": one, "override": self.override}
                self.both(commands.acquire(keys, terms, **options))
            case "give_back":
                self.tickets += 1
                options = {"units": one, "granted_us": self.granted, "holders": two}
                self.last = commands.give_back(keys, terms, f"t{self.tickets}", **options)
                self.sent = self.now
                self.both(self.last)
            case "again" if self.last and self.now < self.sent + 60 * US:
                self.both(self.last)
            case "hold":
                self.both(commands.hold(keys, one, two))
            case "penalize":
                self.both(commands.penalize(keys, terms, one, two))
            case "override":
                self.expiring = [keys.slots, keys.state]  # another rule may read more out of a stale state
                self.both(commands.override_rule(keys, one))
                self.override = one.encode() if one else b""
                self.rule = one or self.rule
            case "reset":
                self.both(commands.reset_limit(keys))
        self.both(commands.limit_state(keys, self.rule.terms(self.now)))
        assert not self.lab.raw.exists(keys.state) or self.lab.expires(keys.state) > 0
        assert not self.lab.raw.exists(keys.slots) or self.lab.expires(keys.slots) > 0

    def both(self, command: Any) -> Any:
        for key in self.expiring:
            if self.lab.expires(key) < self.now // 1_000:
                self.lab.raw.delete(key)
        replies = self.lab.engine(command, self.now), self.memory(command, self.now)
        if command.script is not None:
            assert rounded(*replies) == replies[1]
        return replies[0]


@hypothesis.settings(max_examples=100, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(rule=st.sampled_from(RULES), steps=st.lists(st.tuples(SECONDS, STEP), min_size=1, max_size=25))
@hypothesis.example(
    rule=Rule(SlidingWindow(20, 1)), steps=[(0.0, ("penalize", 0.3, 2.0)), (3.0, ("acquire", 0, 20))]
)  # the whole limit at once, while a stale pace lies about: the wait for one more was infinite
def test_the_scripts_and_the_memory_engine_agree(lab: LimitLab, rule: Rule, steps: list[Any]) -> None:
    """The same requests at the same instants. A state that is stale and one that has expired must say the same, so the
    server's keys, whose lifetimes are of real time, are left to lie; slots outlive their leases by a known time."""
    twins = Twins(lab, rule)
    for seconds, (verb, one, two) in steps:
        twins.step(seconds, verb, one, two)
