"""F-42: two releases on one Redis. They share queues where the version of the keys is the same, and refuse where it is not."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.release import build, make_old
from tests.chaos.test_kills import left_in
from tests.conftest import eventually
from tests.process.fleet import CHAOS, PATIENCE, Fleet, Kill
from tests.sound import assert_sound

MakeFleet = Callable[..., Fleet]
APP = ("supervise", "mixed:app")
SCALE = int(os.environ.get("CHAOS_SCALE", "1"))


@pytest.fixture(scope="module")
def old_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release before this one, built."""
    return build(tmp_path_factory.mktemp("releases"))


def produce(fleet: Fleet, prefix: str, count: int) -> dict[str, str]:
    """Enqueue with the fleet's own release; id -> key of each job."""
    command = [sys.executable, str(CHAOS / "mixed.py"), prefix, str(count)]
    said = subprocess.run(command, env=fleet.environ, capture_output=True, text=True, check=True).stdout
    return dict(line.split() for line in said.splitlines())  # type: ignore[arg-type,misc]


def pair(make_fleet: MakeFleet, url: str, old_release: Path) -> tuple[Fleet, Fleet]:
    """A fleet of the release before and one of this, not started, which write into one file."""
    old = make_old(make_fleet(url, workers=2, concurrency=3), old_release)
    new = make_fleet(url, workers=2, concurrency=3)
    new.events = old.events
    return old, new


def test_mixed_releases_under_kills(
    make_fleet: MakeFleet, redis_url: str, raw: Any, dice: random.Random, figure: Any, old_release: Path
) -> None:
    """Jobs of either release's producers are run by either one's workers, which are killed meanwhile: nothing is lost, and
    only what was in flight runs again; the first of them is older than the key of the version.
    """
    jobs, rounds = 400 * SCALE, 6 * SCALE
    old, new = pair(make_fleet, redis_url, old_release)
    old.start(*APP)
    old.until_serving(2)
    new.start(*APP)
    new.until_serving(2)
    names = produce(old, "o", jobs) | produce(new, "n", jobs)
    kills: list[Kill] = []
    for n in range(1, rounds + 1):
        eventually(lambda wanted=2 * jobs * n // (rounds + 2): len(old.story().done) >= wanted, PATIENCE)
        fleet = (old, new)[n % 2]
        kills.append(fleet.kill_holding(dice.choice(fleet.until_serving(1)), raw, names))
        if n % 3 == 0:
            fleet.kill(dice.choice(eventually(lambda fleet=fleet: fleet.pids("scheduler"), PATIENCE)))
    story = old.until_done(names.values())
    eventually(lambda: left_in(raw) == {}, PATIENCE)
    assert_sound(redis_url)
    assert story.lost(names.values()) == set()
    assert story.unexplained(kills) == []
    assert len(story.repeated()) <= story.in_flight(kills)
    release_of = {event.pid: event.key for event in story.of("r")}
    shares = dict.fromkeys(release_of.values(), 0)
    crossed = 0
    for key, ends in story.ends.items():
        shares[release_of[ends[0].pid]] += 1
        crossed += (key[0] == "o") != release_of[ends[0].pid].startswith("release-")
    assert len(shares) == 2
    assert min(shares.values()) > jobs / 10, "both have done their share"
    figure(
        f"{len(names)} jobs, {len(kills)} kills, shares {sorted(shares.values())}, {crossed} run by the other release: 0 lost"
    )
    assert old.stop() == 0
    assert new.stop() == 0


def test_a_change_of_layout_without_a_version_is_found(
    make_fleet: MakeFleet, redis_url: str, raw: Any, old_release: Path
) -> None:
    """What the test above is there for: a release that looks elsewhere for ready jobs leaves the other one's lying."""
    old, new = pair(make_fleet, redis_url, old_release)
    names = produce(old, "o", 20)
    new.start(*APP, plant="rename_ready_lists")
    new.until_serving(2)
    eventually(lambda: raw.zcard("fastq:{default}:due") == 0, PATIENCE)
    assert new.stop() == 0
    assert old.story().lost(names.values())


@pytest.mark.parametrize("words", [APP, ("worker", "mixed:app"), ("scheduler", "mixed:app")])
def test_a_newer_layout_is_left_alone(make_fleet: MakeFleet, redis_url: str, raw: Any, words: tuple[str, ...]) -> None:
    """Neither worker nor scheduler starts; the exit status and one line say why; not a byte has changed."""
    fleet = make_fleet(redis_url)
    produce(fleet, "k", 8)
    raw.set("fastq:schema", 2)
    before = {key: raw.dump(key) for key in raw.scan_iter()}
    fleet.start(*words)
    assert fleet.wait() == 2
    errors = {line["error"] for line in fleet.log() if "error" in line}
    (said,) = errors
    assert said.startswith("the keys under 'fastq' have version 2, ")
    assert "upgrade" in said
    assert "Traceback" not in fleet.said()
    assert {key: raw.dump(key) for key in raw.scan_iter()} == before


def test_an_older_layout_is_left_alone(make_fleet: MakeFleet, redis_url: str, raw: Any) -> None:
    """The reverse: a release that no longer knows the version that is there does not start either, nor does its command line."""
    first, second, third = make_fleet(redis_url), make_fleet(redis_url), make_fleet(redis_url)
    first.start(*APP)
    first.until_serving(2)
    assert first.stop() == 0
    assert raw.get("fastq:schema") == b"1"
    for fleet, words, plant in ((second, APP, "next_schema"), (third, ("queues", "ls"), "next_schema")):
        fleet.start(*words, plant=plant)
        assert fleet.wait() == 2
        assert "have version 1, " in fleet.said()
        assert "too old" in fleet.said()


def test_the_next_release_writes_its_version_down(make_fleet: MakeFleet, redis_url: str, raw: Any) -> None:
    """On an empty Redis the newer one comes first; this one then refuses."""
    newer, ours = make_fleet(redis_url), make_fleet(redis_url)
    newer.start(*APP, plant="next_schema")
    newer.until_serving(2)
    assert raw.get("fastq:schema") == b"2"
    ours.start(*APP)
    assert ours.wait() == 2
    assert "upgrade" in ours.said()
    assert len(newer.workers()) == 2, "the newer ones go on"
    assert newer.stop() == 0
