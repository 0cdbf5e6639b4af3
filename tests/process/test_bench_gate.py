"""The gate of CI is no gate unless it closes: each planted regression makes it red, and says why."""

from __future__ import annotations

import pytest

from benchmarks import gate
from benchmarks.gate import LIMITS, SHARE_OF_FLOOR, TIMES_RIVAL, Figures, faults
from benchmarks.load.lab import private_server

GOOD = Figures(**{name: limit.most for name, limit in LIMITS.items()}, rate=SHARE_OF_FLOOR, rivals=dict(TIMES_RIVAL))


@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        ("cpu", "cpu"),  # 60 µs of Python in every job: noise inflates the floor, too
        ("chatter", "round_trips"),  # one word with Redis in every job
        ("memory", "blocks"),  # fifty lists in every running job
    ],
)
def test_a_planted_regression_makes_the_gate_red(plant, fault):
    with private_server() as redis:
        found = faults(gate.measure(redis, rivals=(), rounds=1, jobs=16_000, BENCH_PLANT=plant))
    assert any(text.startswith(f"{fault}:") for text in found), found


def test_what_just_passes_passes():
    assert faults(GOOD) == []


@pytest.mark.parametrize("name", LIMITS)
def test_each_count_has_a_limit(name):
    worse = GOOD._replace(**{name: LIMITS[name].most * 1.01})
    assert [text.split(":")[0] for text in faults(worse)] == [name]


def test_ratios_have_limits():
    assert [text.split(":")[0] for text in faults(GOOD._replace(rate=SHARE_OF_FLOOR * 0.99))] == ["rate"]
    slow = dict.fromkeys(TIMES_RIVAL, 1.0)
    assert [text.split(":")[0] for text in faults(GOOD._replace(rivals=slow))] == list(TIMES_RIVAL)


def test_a_figure_that_is_no_number_does_not_pass():
    assert faults(GOOD._replace(cpu=float("nan"), rate=float("nan"))) != []
