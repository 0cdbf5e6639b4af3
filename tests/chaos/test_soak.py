"""`make soak`: a fleet under load and random faults for half an hour, and what it may not grow by (issue 7, FAULTS 4.1).

Every few seconds something breaks: a worker or the scheduler or the monitor is killed, a worker stands still, Redis is killed, all
connections are cut, scripts are forgotten. Meanwhile producers go on, and each process's memory and descriptors, Redis's keys and the
series of metrics are looked at once a second. At the end everything that was confirmed is done, and nothing has grown.
SOAK_SECONDS=1800 is `make soak`; `make test` has a cut of 30 s: long enough for each kind of fault, and for a leak of a descriptor or
a key per fault or per job to show; a slope of memory needs the half hour, so the cut only holds a ceiling.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastq.broker.embedded import EmbeddedServer
from tests.chaos.load import Load
from tests.chaos.test_resources import descriptors
from tests.conftest import MakeServer, connect, eventually, key_faults
from tests.process.fleet import LEASE, PATIENCE, Fleet, free_port
from tests.sound import assert_sound

SECONDS = float(os.environ.get("SOAK_SECONDS", "30"))
LONG = SECONDS >= 600
CEILING = 120 << 20
"""Bytes that a process may hold in the cut."""

SLOPE = 1 << 20
"""Bytes a minute by which a process may grow, in the long run."""

GROWTH = 6
"""Descriptors that a process may have more of than when it began to serve."""


class Soak:
    """The faults, and what is measured between them."""

    def __init__(self, fleet: Fleet, server: EmbeddedServer, dice: random.Random) -> None:
        self.fleet = fleet
        self.server = server
        self.dice = dice
        self.faults: Counter[str] = Counter()
        self.memory: dict[int, list[tuple[float, int]]] = defaultdict(list)
        self.files: dict[int, list[int]] = defaultdict(list)
        self.keys: list[int] = []
        self.series: list[int] = []
        self.wait_until = 0.0

    # -- faults -----------------------------------------------------------------------------------

    def strike(self) -> None:
        """Break one thing; each kind comes as often as the others."""
        kinds = [
            self.kill_worker,
            self.kill_scheduler,
            self.kill_monitor,
            self.freeze_worker,
            self.kill_redis,
            self.cut,
            self.forget,
        ]
        least = min(self.faults[kind.__name__] for kind in kinds)
        kind = self.dice.choice([kind for kind in kinds if self.faults[kind.__name__] == least])
        self.faults[kind.__name__] += 1
        kind()

    def kill_worker(self) -> None:
        self.fleet.kill(self.dice.choice(self.fleet.until_serving(1)))

    def kill_scheduler(self) -> None:
        for pid in self.fleet.pids("scheduler")[-1:]:
            self.fleet.kill(pid)

    def kill_monitor(self) -> None:
        for pid in self.fleet.pids("monitor")[-1:]:
            self.fleet.kill(pid)

    def freeze_worker(self) -> None:
        pid = self.dice.choice(self.fleet.until_serving(1))
        self.fleet.freeze(pid)
        time.sleep(LEASE / 2)  # the fault itself: half a lease without a sign of life
        self.fleet.kill(pid, signal.SIGCONT)

    def kill_redis(self) -> None:
        self.server.kill()
        self.server.start()

    def cut(self) -> None:
        with connect(self.server.url) as raw:
            raw.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def forget(self) -> None:
        with connect(self.server.url) as raw:
            raw.script_flush()

    # -- looks ------------------------------------------------------------------------------------

    def look(self) -> None:
        """Measure everything once."""
        now = time.monotonic()
        for pid in self.fleet.family():
            try:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                files = descriptors(pid)
            except (OSError, IndexError):  # it has just ended
                continue
            self.memory[pid].append((now, pages * os.sysconf("SC_PAGE_SIZE")))
            self.files[pid].append(files)
        try:
            self.series.append(sum(not line.startswith("#") for line in self.fleet.get("/metrics")[1].splitlines()))
        except OSError:  # the monitor has just been killed
            pass

    def slopes(self) -> list[float]:
        """Bytes a minute of each process that lived for five minutes, after its first one."""
        found = []
        for looks in self.memory.values():
            begun = looks[0][0]
            rows = [(at, size) for at, size in looks if at > begun + 60]
            if rows and rows[-1][0] - rows[0][0] > 240:
                found.append(60 * statistics.linear_regression(*zip(*rows, strict=True)).slope)
        return found


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.timeout(SECONDS + 180)
def test_soak(make_fleet: Callable[..., Fleet], make_server: MakeServer, dice: random.Random, figure: Any) -> None:
    """All faults in any order, under load: nothing is lost, and nothing grows."""
    server = make_server(appendonly=True, config={"appendfsync": "everysec"})
    fleet = make_fleet(server.url, workers=3, concurrency=10, metrics_port=free_port(), lease=2 * LEASE).serving()
    soak = Soak(fleet, server, dice)
    fleet.until_logged("scheduler leads")
    fleet.until_logged("monitor running")
    end = time.monotonic() + SECONDS
    pause = 2.5 if not LONG else 7.0
    with Load(server.url) as load:
        strike_at = time.monotonic() + 1.0
        while time.monotonic() < end:
            soak.look()
            if time.monotonic() > strike_at:
                soak.strike()
                strike_at = time.monotonic() + dice.uniform(0.5, 1.5) * pause
            time.sleep(0.5)  # the pace of the looks
    story = fleet.until_done(load.confirmed)
    fleet.until_serving(3)
    with connect(server.url) as raw:
        eventually(lambda: raw.zcard("fastq:{default}:dead") + raw.hlen("fastq:{default}:jobs") <= 1, PATIENCE)
        assert list(key_faults(raw)) == []
        keys = raw.dbsize()
    assert_sound(server.url)
    assert story.lost(load.confirmed) == set()
    highest = max(size for looks in soak.memory.values() for _, size in looks)
    grown = max(max(files[2:], default=0) - files[min(2, len(files) - 1)] for files in soak.files.values())
    slopes = soak.slopes()
    figure(
        f"{SECONDS:.0f} s, {sum(soak.faults.values())} faults ({', '.join(f'{n} {kind}' for kind, n in sorted(soak.faults.items()))}): "
        f"{len(load.confirmed):,} jobs confirmed, 0 lost, {len(story.repeated())} run twice, {len(load.refused)} refused; "
        f"most memory of a process {highest / (1 << 20):.0f} MiB, steepest slope {max(slopes, default=0) / (1 << 20):.2f} MiB/min of "
        f"{len(slopes)}, descriptors +{grown}, {keys} keys, {max(soak.series)} series"
    )
    assert highest < CEILING
    assert max(slopes, default=0.0) < SLOPE
    assert grown <= GROWTH
    assert keys < 60
    assert max(soak.series) < 1_000
    assert len(soak.faults) == 7
    assert fleet.stop() == 0
