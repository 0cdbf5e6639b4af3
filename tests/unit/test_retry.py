"""Retry policies by their numbers (FEATURES S, FAULTS F-43)."""

from __future__ import annotations

import datetime as dt
import doctest
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastq.retry
from fastq.errors import ConfigError, Fail, Retry, TaskDefinitionError
from fastq.retry import (
    DEFAULT,
    MAX_DELAY,
    Additive,
    Custom,
    Exponential,
    Fixed,
    Linear,
    RetryPolicy,
    RetryRule,
    Steps,
    as_policy,
    attempts_in_all,
)


def delays(policy: RetryPolicy, runs: int) -> list[float]:
    """What is waited between ``runs`` failing runs."""
    return [policy.delay(attempt) for attempt in range(1, runs)]


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(fastq.retry)
    assert result.attempted >= 10
    assert result.failed == 0


def test_the_examples_in_the_guide_are_true() -> None:
    guide = Path(__file__).parents[2] / "docs" / "retries.md"
    result = doctest.testfile(str(guide), module_relative=False)
    assert result.attempted >= 8
    assert result.failed == 0


# -- the feature list, row by row -------------------------------------------------------------


def test_linear_backoff_of_sixty_seconds() -> None:
    """F270: 60 * attempt; five runs in all, the first at once."""
    assert delays(Linear(60), attempts_in_all(5)) == [60, 120, 180, 240]


def test_powers_of_two() -> None:
    """F271: 2 ** retries, retries counted from 0; max_retries=3 means four runs."""
    assert delays(Exponential(jitter=None), attempts_in_all(max_retries=3)) == [1, 2, 4]


def test_sixty_times_powers_of_two() -> None:
    """F272: 60 * 2 ** retries, max_retries=3; default_retry_delay=60 is the fixed policy."""
    assert delays(Exponential(base=60, jitter=None, max_delay=None), 4) == [60, 120, 240]
    assert delays(Fixed(60), 4) == [60, 60, 60]


def test_capped_exponential() -> None:
    """F273: min(2 ** n * 60, 3600)."""
    policy = Exponential(base=60, max_delay=3600, jitter="none")
    assert delays(policy, 9) == [min(2**n * 60, 3600) for n in range(8)] == [60, 120, 240, 480, 960, 1920, 3600, 3600]


def test_fixed_with_additive_jitter() -> None:
    """F274: 60 + uniform(0, 10)."""
    policy, rng = Fixed(60, jitter=Additive(0, 10)), random.Random(1)
    drawn = [policy.delay(attempt, rng) for attempt in range(1, 1001)]
    assert 60 <= min(drawn) < 60.1
    assert 69.9 < max(drawn) <= 70
    assert sum(drawn) / 1000 == pytest.approx(65, abs=0.3)


def test_celery_retry_backoff() -> None:
    """F275: retry_backoff=True, retry_backoff_max=600, retry_jitter=True, max_retries=5: uniform(0, min(600, 2 ** k))."""
    assert [DEFAULT.bounds(attempt) for attempt in range(1, 6)] == [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16)]
    assert DEFAULT.bounds(11) == (0, 600)
    rng = random.Random(2)
    for attempt in range(1, 15):
        top = min(600, 2 ** (attempt - 1))
        drawn = [DEFAULT.delay(attempt, rng) for _ in range(500)]
        assert 0 <= min(drawn) < 0.05 * top
        assert 0.95 * top < max(drawn) <= top


def test_explicit_list() -> None:
    """F276: [10, 60, 300]; the last repeats."""
    assert delays(Steps([10, 60, 300]), 6) == [10, 60, 300, 300, 300]


def test_bull_exponential() -> None:
    """F277: {type: 'exponential', delay: 2000 or 1000 ms}, attempts 3; the older formula is a function."""
    assert delays(Exponential(base=2, jitter=None), 3) == [2, 4]
    assert delays(Exponential(base=1, jitter=None), 3) == [1, 2]
    assert delays(Custom(lambda n: (2**n - 1) * 2), 4) == [2, 6, 14]


@pytest.mark.parametrize("base", [1.0, 2.0])
def test_limiter_aware_backoff(base: float) -> None:
    """F278: base * 2 ** attempt with base 1 s or 2 s; five tries in all."""
    assert delays(Exponential(base=base, jitter=None), 5) == [base, base * 2, base * 4, base * 8]


class RequestError(OSError):
    """Stands for an HTTP library's error."""


def test_only_named_errors_are_retried() -> None:
    """F279: autoretry_for=(Exception,) and (RequestException, ConnectionError)."""
    everything = RetryRule(1)
    assert [everything.retryable(error) for error in (ValueError(), RequestError(), Exception())] == [True] * 3
    some = RetryRule(1, retry_on=(RequestError, ConnectionError))
    assert [some.retryable(error) for error in (RequestError(), ConnectionResetError())] == [True, True]
    assert [some.decide(error, 1) for error in (ValueError(), OSError())] == [None, None]
    assert not everything.retryable(KeyboardInterrupt())


def test_a_handler_asks_for_a_retry() -> None:
    """F280: raise self.retry(countdown=n, max_retries=n): Retry's delay wins, the number of runs still holds."""
    rule = RetryRule(Fixed(60), max_attempts=attempts_in_all(max_retries=2), retry_on=OSError)
    assert [rule.decide(Retry(delay=7), attempt) for attempt in (1, 2, 3)] == [7, 7, None]
    assert rule.decide(Retry(), 1) == 60
    assert rule.decide(Retry(delay=0), 1) == 0


def test_permanent_errors_are_never_retried() -> None:
    """F281: PermanentError, PaymentDeclined: Fail, or a type in never_on, which beats retry_on."""
    rule = RetryRule(1, retry_on=(Exception,), never_on=(PermissionError,))
    assert rule.decide(PermissionError(), 1) is None
    assert rule.decide(Fail("card declined"), 1) is None
    assert rule.decide(FileNotFoundError(), 1) == 1


def test_runs_are_bounded() -> None:
    """F283, F285: a default for all tasks, bounded; a very large number only when it is asked for."""
    assert RetryRule().max_attempts == attempts_in_all() == 5
    assert attempts_in_all(default=7) == 7
    assert attempts_in_all(max_retries=0) == 1
    assert attempts_in_all(1_000_000) == 1_000_000
    assert attempts_in_all(max_retries=999_999) == 1_000_000
    assert RetryRule(1, max_attempts=1).decide(OSError(), 1) is None


# -- jitter -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jitter", "bounds"),
    [
        (None, (100, 100)),
        ("none", (100, 100)),
        ("full", (0, 100)),
        ("equal", (50, 100)),
        (Additive(0, 10), (100, 110)),
        (Additive(5, 5), (105, 105)),
        (Additive(dt.timedelta(seconds=1), 2), (101, 102)),
    ],
)
def test_jitter_is_seeded_and_bounded(jitter: Any, bounds: tuple[float, float]) -> None:
    policies = [
        Fixed(100, jitter),
        Linear(100, 0, jitter=jitter),
        Exponential(100, 1, jitter=jitter),
        Steps([100], jitter),
    ]
    policies.append(Custom(lambda _: 100, jitter))
    for policy in policies:
        assert policy.bounds(3) == bounds
        drawn = [policy.delay(3, random.Random(seed)) for seed in range(200)]
        assert drawn == [policy.delay(3, random.Random(seed)) for seed in range(200)]
        assert bounds[0] <= min(drawn) <= max(drawn) <= bounds[1]
        assert (len(set(drawn)) == 1) == (bounds[0] == bounds[1])


def test_jitter_is_added_after_the_cap() -> None:
    assert Exponential(base=60, max_delay=100, jitter=Additive(0, 10)).bounds(9) == (100, 110)
    assert Linear(60, max_delay=100, jitter="equal").bounds(9) == (50, 100)


@pytest.mark.parametrize("attempt", [3, 6, 10, 14])
def test_a_retry_storm_is_spread(attempt: int) -> None:
    """F-43: 5,000 jobs that fail in one instant come back evenly: chi-squared on due times, peak below 2x uniform."""
    rng, jobs, bins = random.Random(43), 5_000, 20
    _, top = DEFAULT.bounds(attempt)
    counts = Counter(int(DEFAULT.delay(attempt, rng) / top * bins) for _ in range(jobs))
    expected = jobs / bins
    assert max(counts.values()) < 2 * expected
    chi_squared = sum((counts[i] - expected) ** 2 / expected for i in range(bins))
    assert chi_squared < 43.8  # the 99.9 % quantile for 19 degrees of freedom


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_workers_draw_different_delays() -> None:
    """F-43: workers forked from one process must not retry in step."""
    drawn = {_delay_in_child() for _ in range(3)}
    assert len(drawn) == 3


def _delay_in_child() -> bytes:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, repr(DEFAULT.delay(20)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        return os.read(reader, 100)
    finally:
        os.close(reader)
        os.waitpid(pid, 0)


# -- bounds and bad values ----------------------------------------------------------------------

POLICIES = [
    Fixed(MAX_DELAY),
    Linear(1e6),
    Linear(0, 1),
    Exponential(),
    Exponential(factor=1000, max_delay=None),
    Exponential(base=0),
    Steps([1, 2]),
    Fixed(MAX_DELAY, Additive(MAX_DELAY, MAX_DELAY)),
    Custom(lambda n: 10**n if n < 1000 else math.inf),
    Custom(lambda n: dt.timedelta(seconds=min(n, 60))),
]


@given(attempt=st.integers(min_value=-5, max_value=10**30), seed=st.integers(0, 100))
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_no_attempt_overflows(policy: RetryPolicy, attempt: int, seed: int) -> None:
    assert 0 <= policy.delay(attempt, random.Random(seed)) <= MAX_DELAY


def test_huge_attempts_reach_the_cap() -> None:
    assert Exponential(jitter=None).delay(10**9) == 600
    assert Exponential(jitter=None, max_delay=None).delay(10**9) == MAX_DELAY
    assert Linear(60).delay(10**400) == MAX_DELAY
    assert Steps([1, 2]).delay(10**400) == 2


def test_attempts_below_one_count_as_one() -> None:
    assert [Linear(60).delay(attempt) for attempt in (-1, 0, 1)] == [60, 60, 60]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(-1),
        lambda: Fixed(math.nan),
        lambda: Fixed(math.inf),
        lambda: Fixed(10**400),
        lambda: Fixed("60"),
        lambda: Fixed(True),
        lambda: Fixed(MAX_DELAY + 1),
        lambda: Fixed(1, jitter="half"),
        lambda: Fixed(1, jitter=5),
        lambda: Fixed(1, jitter=["full"]),
        lambda: Linear(1, -1),
        lambda: Linear(1, max_delay=-1),
        lambda: Exponential(factor=0.5),
        lambda: Exponential(factor=math.nan),
        lambda: Exponential(factor=1001),
        lambda: Exponential(base=-1),
        lambda: Exponential(max_delay=math.nan),
        lambda: Steps([]),
        lambda: Steps([1, -1]),
        lambda: Steps("123"),
        lambda: Steps(5),
        lambda: Steps([1] * 1001),
        lambda: Additive(2, 1),
        lambda: Additive(-1, 1),
        lambda: Custom(5),
        lambda: as_policy("exponential"),
        lambda: as_policy(True),
        lambda: as_policy(object()),
        lambda: as_policy({1: 2}),
        lambda: as_policy(10**5000),
        lambda: attempts_in_all(0),
        lambda: attempts_in_all(2.0),
        lambda: attempts_in_all(True),
        lambda: attempts_in_all(1_000_001),
        lambda: attempts_in_all(max_retries=-1),
        lambda: attempts_in_all(max_retries=1_000_000),
        lambda: attempts_in_all(3, 3),
        lambda: RetryRule(retry_on=("OSError",)),
        lambda: RetryRule(never_on=int),
    ],
)
def test_bad_values_are_refused_at_definition(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_a_class_given_for_an_instance_is_named() -> None:
    with pytest.raises(ConfigError, match=r"write Exponential\(…\)"):
        as_policy(Exponential)


@pytest.mark.parametrize("result", [None, "5", -1, math.nan, True])
def test_a_function_that_returns_no_duration(result: Any) -> None:
    with pytest.raises(ConfigError, match="for attempt 2"):
        Custom(lambda _: result).delay(2)


def test_what_a_function_raises_comes_out() -> None:
    with pytest.raises(ZeroDivisionError):
        Custom(lambda n: 1 / (n - 1)).delay(1)


@pytest.mark.parametrize(
    ("value", "policy"),
    [
        (None, DEFAULT),
        (Fixed(3), Fixed(3)),
        (0, Fixed(0)),
        (2.5, Fixed(2.5)),
        (dt.timedelta(minutes=1), Fixed(60)),
        ([10, 60], Steps([10, 60])),
        ((10, dt.timedelta(minutes=1)), Steps([10, 60])),
        (math.sqrt, Custom(math.sqrt)),
    ],
)
def test_what_may_be_given_as_retry(value: object, policy: RetryPolicy) -> None:
    assert as_policy(value) == policy


def test_policies_are_values() -> None:
    assert Exponential() == Exponential(1, 2, 600, "full") == DEFAULT
    assert len({Fixed(60), Fixed(60.0), Fixed(dt.timedelta(minutes=1)), Fixed(61)}) == 2
    assert Fixed(60) != Linear(60)
    assert repr(Steps([10, 60])) == "Steps(delays=(10.0, 60.0), jitter=None)"


def test_users_write_their_own_policy() -> None:
    class Fibonacci(RetryPolicy):
        def __init__(self, cap: float) -> None:
            self.cap = cap
            self.jitter = "equal"

        def plain(self, attempt: int) -> float:
            a, b = 1, 1
            for _ in range(min(attempt, 50) - 1):
                a, b = b, a + b
            return min(a, self.cap)

    policy = as_policy(Fibonacci(20))
    bounds: Sequence[tuple[float, float]] = [policy.bounds(attempt) for attempt in range(1, 9)]
    assert [high for _, high in bounds] == [1, 1, 2, 3, 5, 8, 13, 20]
    assert bounds[7] == (10, 20)
    assert Fibonacci(20) != Fibonacci(21)


def test_errors_of_task_definitions_are_config_errors() -> None:
    with pytest.raises(TaskDefinitionError, match="not both"):
        attempts_in_all(max_attempts=3, max_retries=2)
