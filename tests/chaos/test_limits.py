"""Limits hold across a fleet whose workers are killed: never over, every job done (F-52)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from benchmarks.limits.forks import over_bucket, over_window
from tests.chaos.test_kills import left_in
from tests.conftest import eventually
from tests.process.fleet import PATIENCE, Fleet, Kill, Story

MakeFleet = Callable[..., Fleet]
Figure = Callable[[str], None]

RATED, WINDOWED, POOLED = ([f"{kind}{n}" for n in range(count)] for kind, count in (("r", 400), ("w", 120), ("p", 300)))


def grants(story: Story, keys: Iterable[str]) -> list[float]:
    """When these jobs were let pass, repeated ones included."""
    return sorted(start.at for key in keys for start in story.starts.get(key, ()))


def most_at_once(story: Story, keys: Iterable[str], kills: list[Kill]) -> int:
    """Most of these jobs at one moment; one that was killed with its worker ended then."""
    died = {kill.pid: kill.at for kill in kills}
    changes: list[tuple[float, int]] = []
    for key in keys:
        for start in story.starts.get(key, ()):
            ends = [end.at for end in story.ends.get(key, ()) if end.pid == start.pid and end.at >= start.at]
            changes += [(start.at, 1), (min(ends, default=died.get(start.pid, start.at)), -1)]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


@pytest.mark.timeout(120)
def test_never_over_while_workers_are_killed(
    make_fleet: MakeFleet, redis_url: str, raw: Any, dice: random.Random, figure: Figure
) -> None:
    """F-52: 100/s, 40 in 2 s and seven at once, by four workers of which one is killed again and again."""
    fleet = make_fleet(redis_url, workers=4, concurrency=20).serving()
    kills: list[Kill] = []
    names: dict[str, str] = {}
    for task, keys in (("rated", RATED), ("windowed", WINDOWED), ("pooled", POOLED)):
        names |= dict(zip(fleet.enqueue_many(task, ((key,) for key in keys)), keys, strict=True))
    for milestone in (60, 160, 260, 360):
        eventually(lambda wanted=milestone: len(fleet.story().done & set(RATED)) >= wanted, PATIENCE)
        kills.append(fleet.kill_holding(dice.choice(fleet.until_serving(1)), raw, names))
    story = fleet.until_done([*RATED, *WINDOWED, *POOLED])
    eventually(lambda: left_in(raw) == {}, PATIENCE)

    rated, windowed = grants(story, RATED), grants(story, WINDOWED)
    assert over_bucket(rated, 100, 10) <= 0
    assert over_window(windowed, 40, 2) <= 0
    assert most_at_once(story, POOLED, kills) <= 7
    assert story.repeated() <= set().union(*(kill.held for kill in kills))
    assert len({start.pid for starts in story.starts.values() for start in starts}) > 1, "one worker did it all"
    used = len(rated) / (10 + 100 * (rated[-1] - rated[0]))
    figure(f"100/s under {len(kills)} kills: {used:.1%} used; {most_at_once(story, POOLED, kills)} of 7 at once")


def test_limits_that_do_not_hold_are_found(make_fleet: MakeFleet, redis_url: str) -> None:
    """The planted bugs `overbooks` and `spends_nothing` turn each analysis of the test above red."""
    fleet = make_fleet(redis_url, workers=3, concurrency=5).serving(plant="overbooks,spends_nothing")
    rated, windowed, pooled = RATED[:100], WINDOWED[:100], POOLED
    for task, keys in (("rated", rated), ("windowed", windowed), ("pooled", pooled)):
        fleet.enqueue_many(task, ((key,) for key in keys))
    story = fleet.until_done([*rated, *windowed, *pooled])
    assert over_bucket(grants(story, rated), 100, 10) > 0
    assert over_window(grants(story, windowed), 40, 2) > 0
    assert most_at_once(story, pooled, []) > 7
    assert fleet.stop() == 0
