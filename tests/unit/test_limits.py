"""Limit rules: what is read, what is refused, and that fleets on simulated time never exceed and hardly waste one.

F004 to F009, F018, F021, F023, F024; docs/limits.md.
"""

from __future__ import annotations

import datetime as dt
import doctest
import random
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastq.broker.keys
import fastq.limits
from fastq.broker import commands
from fastq.broker.command import raw
from fastq.broker.keys import LimitKeys, describe
from fastq.errors import ConfigError
from fastq.limits import (
    CostTooHigh,
    FixedWindow,
    Rule,
    SlidingWindow,
    TokenBucket,
    block,
    check_cost,
    check_limiter_id,
    parse_rate,
    partition_name,
    read_rule,
)
from tests.unit.limit_fleet import START, US, Fleet, Memory, over_bucket, over_window, promised_burst

BERLIN = ZoneInfo("Europe/Berlin")


def test_the_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(fastq.limits).failed == 0
    assert doctest.testmod(fastq.broker.keys).failed == 0


# -- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rate", "burst"),
    [
        ("100/s", 100, None),
        ("10/m", 10 / 60, None),
        ("5000/h", 5_000 / 3_600, None),
        ("100/s burst 200", 100, 200),
        (" 2.5 / sec  burst 7.5 ", 2.5, 7.5),
        ("600/min", 10, None),
        ("86400/day", 1, None),
    ],
)
def test_rates_in_words(text: str, rate: float, burst: float | None) -> None:
    """F023: the forms of the task decorator."""
    assert parse_rate(text) == TokenBucket(rate, burst)


@pytest.mark.parametrize(
    "text", ["", "100", "/s", "100/fortnight", "-1/s", "0/s", "1e3/s", "100/s burst", "10/s burst 0", 5]
)
def test_rates_that_mean_nothing(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_rate(text)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"rate": "100/s", "max_concurrent": 5}, Rule(TokenBucket(100), 5)),
        ({"algorithm": "token_bucket", "rate_per_second": 100.0, "burst": None}, Rule(TokenBucket(100.0))),
        ({"algorithm": "sliding_window", "limit": 5000, "window_seconds": 3600}, Rule(SlidingWindow(5000, 3600))),
        ({"limit": 5000, "window_seconds": 3600}, Rule(SlidingWindow(5000, 3600))),
        ({"limit": 10_000, "every": "day", "zone": "Europe/Berlin"}, Rule(FixedWindow(10_000, "day", "Europe/Berlin"))),
        ({"algorithm": "fixed_window", "limit": 3, "window_seconds": 90}, Rule(FixedWindow(3, 90))),
        ({"max_concurrent": 7, "use_within": 0.5}, Rule(None, 7, 0.5)),
    ],
)
def test_rules_from_tables(options: dict[str, object], rule: Rule) -> None:
    assert read_rule(options) == rule
    assert Rule.decode(rule.encode()) == rule


@pytest.mark.parametrize(
    ("options", "problems"),
    [
        ({}, ["needs a rate or max_concurrent"]),
        ({"algorithm": "leaky", "limt": 3}, ["'leaky'", "unknown option 'limt' - did you mean 'limit'?"]),
        ({"algorithm": "token_bucket"}, ["token_bucket needs rate_per_second"]),
        (
            {"algorithm": "token_bucket", "rate_per_second": 0, "max_concurrent": 0},
            ["rate_per_second=0", "max_concurrent=0"],
        ),
        (
            {"algorithm": "sliding_window", "limit": -1, "burst": 2},
            ["needs window_seconds", "limit=-1", "burst is no option of"],
        ),
        ({"limit": 1.5, "window_seconds": 0.1}, ["limit=1.5", "window_seconds=0.1"]),
        ({"limit": True, "every": "dya", "zone": "Mars/Base"}, ["limit=True", "'day'", "Mars/Base"]),
        ({"rate": "100/s", "burst": 5}, ["leave burst away"]),
        ({"rate": "100/s", "use_within": 60}, ["use_within=60"]),
        ({"rate_per_second": float("nan")}, ["rate_per_second=nan"]),
    ],
)
def test_all_problems_are_named_at_once(options: dict[str, object], problems: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_rule(options)
    assert [p for p in problems if p not in str(caught.value)] == []


@pytest.mark.parametrize("data", [b"", b"\x80\x80", b"\x81\xa4rate\xa3abc", Rule(TokenBucket(5)).encode()[:-1]])
def test_an_override_that_cannot_be_read_is_said(data: bytes) -> None:
    with pytest.raises(ConfigError, match="stored in Redis"):
        Rule.decode(data)


def test_costs() -> None:
    """F018."""
    terms = Rule(parse_rate("100/s burst 20")).terms(START)
    assert [check_cost(terms, cost) for cost in (0, 1, 20)] == [0, 1, 20]
    with pytest.raises(CostTooHigh, match="cost=21 is more than the 20 units"):
        check_cost(terms, 21)
    for wrong in (-1, 1.5, True):
        with pytest.raises(ConfigError):
            check_cost(terms, wrong)  # type: ignore[arg-type]


# -- names --------------------------------------------------------------------------------------


@given(st.lists(st.text(min_size=1, max_size=200), min_size=2, max_size=2, unique=True))
def test_two_partitions_never_share_a_key(keys: list[str]) -> None:
    one, two = (LimitKeys("fastq", "api", key) for key in keys)
    everything = LimitKeys("fastq", "api")
    assert len({one.state, two.state, everything.state}) == 3
    for name in (one.state, two.slots, one.wake, one.rule, one.given("w1:2")):
        assert describe(name.decode()) is not None


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a{b}", "x" * 101, None])
def test_limiter_ids(name: str) -> None:
    assert check_limiter_id("github_api:v2.x-1") == "github_api:v2.x-1"
    with pytest.raises(ConfigError):
        check_limiter_id(name)


def test_a_partition_key_has_an_end() -> None:
    assert len(partition_name("ü" * 200)) == 33
    with pytest.raises(ConfigError):
        partition_name("ü" * 201)


# -- fixed windows on the clock -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "now", "start", "hours"),
    [
        ("day", "2026-03-29T12:00", "2026-03-29T00:00", 23),
        ("day", "2026-10-25T12:00", "2026-10-25T00:00", 25),
        ("day", "2026-07-01T00:00", "2026-07-01T00:00", 24),
        ("week", "2026-03-29T23:59", "2026-03-23T00:00", 7 * 24 - 1),
        ("month", "2026-02-28T23:59", "2026-02-01T00:00", 28 * 24),
        ("month", "2026-12-31T10:00", "2026-12-01T00:00", 31 * 24),
        ("hour", "2026-10-25T02:30", "2026-10-25T02:00", 1),
    ],
)
def test_windows_of_the_clock(every: str, now: str, start: str, hours: int) -> None:
    """A quota that resets at midnight in Berlin, through both changes of the clock (F-55's kin)."""

    def us(text: str) -> int:
        return int(dt.datetime.fromisoformat(text).replace(tzinfo=BERLIN).timestamp()) * US

    rule = FixedWindow(1, every, "Europe/Berlin")  # type: ignore[arg-type]
    begin, end = rule.window(us(now))
    assert begin == us(start)
    assert (end - begin) / US / 3_600 == hours


@given(
    st.integers(0, 4_000_000_000 * US),
    st.sampled_from(["minute", "hour", "day", "week", "month", 1, 90, 86_400.5]),
    st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kathmandu", "America/Sao_Paulo", "Pacific/Apia"]),
)
def test_each_instant_is_in_its_window_and_windows_meet(now: int, every: str | float, zone: str) -> None:
    rule = FixedWindow(1, every, zone)  # type: ignore[arg-type]
    start, end = rule.window(now)
    assert start <= now < end
    assert rule.window(start) == rule.window(end - 1) == (start, end)
    assert rule.window(end)[0] == end


# -- how much to take --------------------------------------------------------------------------------


def test_block_sizes() -> None:
    slow, fast = Rule(parse_rate("10/s")).terms(START), Rule(parse_rate("10000/s")).terms(START)
    assert block(slow, 1, 50) == 1  # nothing in advance: eight processes share it
    assert block(slow, 100, 0) == slow.capacity
    assert block(fast, 1, 0) == 1  # demand was low
    assert block(fast, 1, 100) == 1 + 200  # it may grow
    assert block(fast, 1, 10_000) == 1 + 500  # what 50 ms yield
    assert block(fast, 0, 0) == 1
    assert block(Rule(None, 3).terms(START), 5, 5) == 5


@pytest.mark.parametrize("rate", [0.001, 0.1, 1, 2, 2.1, 10, 100, 1_000, 50_000])
@pytest.mark.parametrize("burst", [None, 1, 1.01, 1.5, 2, 200])
def test_terms_of_buckets_keep_their_reserve(rate: float, burst: float | None) -> None:
    bucket = TokenBucket(rate, burst)
    terms = Rule(bucket).terms(START)
    assert 0.005 <= terms.use_within <= 0.1
    assert terms.b >= terms.a, "one unit can always be had"
    assert terms.a <= US / rate * 1.0101, "at most 1 % slower"
    if terms.c:  # uses of one use_within flow in above the room
        assert terms.b / terms.a + rate * terms.use_within <= promised_burst(bucket) + 1e-9
    assert terms.capacity * terms.a <= terms.b + terms.c


# -- fleets on simulated time ------------------------------------------------------------------------

LIMITS = {
    "10/s": (Rule(parse_rate("10/s")), 60),
    "100/s": (Rule(parse_rate("100/s")), 20),
    "10000/s": (Rule(parse_rate("10000/s")), 3),
    "1/s": (Rule(parse_rate("1/s")), 300),
    "100/s burst 1": (Rule(parse_rate("100/s burst 1")), 20),
    "10/m burst 5": (Rule(parse_rate("10/m burst 5")), 3_000),
    "30/m burst 30": (Rule(parse_rate("30/m burst 30")), 3_000),
    "1/m burst 3": (Rule(parse_rate("1/m burst 3")), 30_000),
    "60/min": (Rule(SlidingWindow(60, 60)), 6_000),
    "10 in 1 s": (Rule(SlidingWindow(10, 1)), 100),
    "5000/h": (Rule(SlidingWindow(5_000, 3_600)), 100 * 3_600),
    "60 a minute": (Rule(FixedWindow(60, "minute")), 6_000),
}


@pytest.mark.parametrize("clients", [1, 4])
@pytest.mark.parametrize("name", LIMITS)
def test_never_over_and_hardly_under(name: str, clients: int) -> None:
    """Invariant 5, at the place of use: 0 units too many in any span, and 98 % used under backlog."""
    rule, seconds = LIMITS[name]
    fleet = Fleet(Memory(), rule, clients=clients, seconds=seconds).run()
    assert fleet.excess() <= 0
    if isinstance(rule.rate, TokenBucket):
        assert fleet.share_used(skip=2) >= 0.98
    else:  # the first window's worth is there at once
        assert (fleet.used - rule.rate.limit) / (fleet.rule.terms(START).rate * seconds) >= 0.98  # type: ignore[union-attr]
    if clients > 1 and name == "10/s":
        assert min(fleet.shares) >= 0.5 * max(fleet.shares), "a slow limit is shared fairly"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", LIMITS)
def test_never_over_whatever_clients_do(name: str, seed: int) -> None:
    """Late uses, uses at the last instant, blocks hoarded and given back at any time, slow and fast networks."""
    rule, seconds = LIMITS[name]
    delay = [(0, 0.0005), (0, 0.003), (0, 0.03)][seed % 3]
    fleet = Fleet(Memory(), rule, clients=4, seconds=max(seconds / 10, 3), wild=True, delay=delay, seed=seed).run()
    assert fleet.calls > 0
    assert fleet.excess() <= 0


@pytest.mark.parametrize("clients", [8, 50])
def test_a_slow_limit_and_many_processes(clients: int) -> None:
    """A limiter at 1/s with 50 processes: every one gets something, none too much is used."""
    fleet = Fleet(Memory(), Rule(parse_rate("1/s burst 1")), clients=clients, seconds=600).run()
    assert fleet.excess() <= 0
    assert fleet.share_used(skip=2) >= 0.98
    assert min(fleet.shares) > 0


def planted(name: str, seed: int, **fault: object) -> float:
    rule, seconds = LIMITS[name]
    fleet = Fleet(
        Memory(), rule, clients=4, seconds=min(seconds, 100), wild=True, delay=(0, 0.0005), seed=seed, **fault
    )  # type: ignore[arg-type]
    return fleet.run().excess()


def test_the_judgement_finds_a_bucket_without_reserve() -> None:
    found = [planted("100/s burst 1", seed, tamper=lambda t: t._replace(b=t.b + t.c, c=0.0)) for seed in range(4)]
    assert max(found) > 0


def test_the_judgement_finds_a_slow_bucket_whose_interval_is_not_longer() -> None:
    def shorter(terms: fastq.limits.Terms) -> fastq.limits.Terms:
        return terms._replace(a=US * 6.0, b=5 * US * 6.0)

    assert max(planted("10/m burst 5", seed, tamper=shorter) for seed in range(30)) > 0
    assert max(planted("10/m burst 5", seed) for seed in range(30)) <= 0


def test_the_judgement_finds_units_that_come_back_at_full_value() -> None:
    """See docs/adr/0008-limits.md: blocks that go round would fill the bucket above its brim."""
    assert max(planted("100/s burst 1", seed, lie=True) for seed in range(4)) > 0


def test_the_judgement_finds_a_window_without_reserve() -> None:
    """Parts are dropped as soon as their last unit was granted a window ago."""
    found = [planted("10 in 1 s", seed, tamper=lambda t: t._replace(b=100, c=1_000_000 - 100)) for seed in range(4)]
    assert max(found) > 0


def test_the_judgement_itself() -> None:
    assert over_bucket([(0, 10), (100_000, 1)], 10, 10) == 0
    assert over_bucket([(0, 10), (99_000, 1)], 10, 10) == pytest.approx(0.01)
    assert over_window([(0, 5), (10, 5), (20, 5)], 10, 15) == 0
    assert over_window([(0, 5), (10, 5), (15, 5)], 10, 15) == 5


def test_what_is_given_back_late_is_worth_less() -> None:
    """A bucket that took everything back could be filled twice: a hoarder lets others drain what flows in meanwhile."""
    memory, keys = Memory(), LimitKeys("fastq", "api")
    terms = Rule(parse_rate("10/s")).terms(START)
    whole = memory(commands.acquire(keys, terms, need=1, want=9), START)
    assert (whole.units, whole.left) == (9, 0)
    later = START + 500_000  # 5 units have flowed in
    assert memory(commands.acquire(keys, terms, need=5, want=5), later).units == 5
    assert memory(commands.give_back(keys, terms, "t", units=9, granted_us=START), later).units == 4
    assert memory(commands.acquire(keys, terms, need=1, want=9), later).units == 4


def test_a_penalty_of_the_whole_limiter_holds_for_its_partitions() -> None:
    memory, whole, tenant = Memory(), LimitKeys("fastq", "api"), LimitKeys("fastq", "api", "tenant")
    terms = Rule(parse_rate("10/s")).terms(START)
    memory(commands.penalize(whole, terms, 30), START)
    refused = memory(commands.acquire(tenant, terms, need=1), START + 10_000_000)
    assert (refused.status, refused.wait_us) == (b"penalized", 20_000_000)
    assert memory(commands.limit_state(tenant, terms), START).penalty_us == 30_000_000
    assert memory(commands.acquire(tenant, terms, need=1), START + 30_000_000).status == b"granted"
    memory(commands.penalize(tenant, terms, 30), START + 30_000_000)
    assert memory(commands.acquire(whole, terms, need=0), START + 30_000_000).status == b"granted"


def test_a_whole_burst_can_be_had_by_a_bucket_that_idled() -> None:
    memory, keys = Memory(), LimitKeys("fastq", "api")
    terms = Rule(parse_rate("10/s")).terms(START)
    command = commands.acquire(keys, terms, need=10)
    assert memory(command, START).units == 10
    refused = memory(command, START + 990_000)
    assert (refused.status, refused.wait_us) == (b"short", 60_000)
    assert memory(commands.acquire(keys, terms, need=9), START + 990_000).units == 9
    refused = memory(command, START + 1_000_000)
    assert memory(command, START + 1_000_000 + refused.wait_us - 1).status == b"short"
    assert memory(command, START + 1_000_000 + refused.wait_us).units == 10


# -- slots -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_never_too_many_holders(seed: int) -> None:
    """Invariant 5 for max_concurrent 7: 40 holders come, extend, leave, or die; a dead one's slot is back in its lease."""
    rng, memory, keys = random.Random(seed), Memory(), LimitKeys("fastq", "pool")
    terms, now, lease = Rule(None, 7).terms(START), START, 1_000
    held: dict[str, int] = {}  # holder -> when its lease ends, as the holders know it
    full = 0
    for n in range(3_000):
        now += rng.randrange(50_000)
        held = {h: ends for h, ends in held.items() if ends > now}
        match rng.choice(["come", "come", "leave", "hold", "die"]):
            case "come":
                command = commands.acquire(keys, terms, most=7, lease_ms=lease, holders=[(f"h{n}", 1), (f"i{n}", 1)])
                reply = memory(command, now)
                assert reply.slots == min(2, 7 - len(held)) if reply.status == b"granted" else len(held) >= 7
                full += reply.status == b"full"
                held |= dict.fromkeys([f"h{n}", f"i{n}"][: reply.slots], (now // 1_000 + lease) * 1_000)
            case "leave" if held:
                holder = rng.choice(list(held))
                assert memory(commands.give_back(keys, terms, f"t{n}", holders=[holder]), now).slots == 1
                del held[holder]
            case "hold" if held:
                names = rng.sample(list(held), rng.randint(1, len(held)))
                assert memory(commands.hold(keys, lease, names), now) == [True] * len(names)
                held |= dict.fromkeys(names, (now // 1_000 + lease) * 1_000)
        assert len(held) <= 7
        assert memory(commands.limit_state(keys, terms), now).holders == len(held)
    assert full > 20


# -- the memory engine ---------------------------------------------------------------------------------------


def test_idle_partitions_are_forgotten() -> None:
    """100,000 keys, each used once: memory holds those of the last second and a half."""
    memory, terms = Memory(), Rule(parse_rate("1/s")).terms(START)
    for n in range(100_000):
        memory(commands.acquire(LimitKeys("fastq", "api", f"t{n}"), terms, need=1), START + n * 1_000)
    assert len(memory.engine) <= 5_000


def test_a_command_of_another_kind_is_refused() -> None:
    with pytest.raises(KeyError):
        Memory()(raw("PING", "x"), START)
