"""`make soak`: a fleet under load and random faults for half an hour, and what it may not grow by (issue 7, FAULTS 4.1).

Every few seconds something breaks: a worker or the scheduler or the monitor is killed, a worker stands still, Redis is killed, all
connections are cut, scripts are forgotten. Meanwhile producers go on, and each process's memory and descriptors, Redis's keys and the
series of metrics are looked at once a second. At the end everything that was confirmed is done, and nothing has grown.
SOAK_SECONDS=1800 is `make soak`; `make test` has a cut of three minutes, beside the tests on other Pythons, and pytest alone one of 30 s:
long enough for each kind of fault, and for a leak of a descriptor or a key per fault or per job to show; a slope of memory needs the
half hour, so the cuts only hold a ceiling.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastq.broker.embedded import EmbeddedServer
from tests.chaos.load import Load
from tests.chaos.test_resources import descriptors
from tests.conftest import MakeServer, connect, eventually, key_faults
from tests.process.fleet import LEASE, PATIENCE, Fleet, free_port
from tests.sound import checked

SECONDS = float(os.environ.get("SOAK_SECONDS", "30"))
LONG = SECONDS >= 600
CEILING = 120 << 20
"""Bytes that a process may hold in the cut."""

SLOPE = 1 << 20
"""Bytes a minute by which a process may grow, in the long run."""

GROWTH = 6
"""Descriptors that a process may have more of than when it began to serve."""


KINDS = ("kill_worker", "kill_scheduler", "kill_monitor", "freeze_worker", "kill_redis", "cut", "forget")
"""Of faults: methods of :class:`Soak`."""


class Soak:
    """The faults, and what is measured between them."""

    def __init__(self, fleet: Fleet, server: EmbeddedServer, dice: random.Random) -> None:
        self.fleet = fleet
        self.server = server
        self.dice = dice
        self.faults: Counter[str] = Counter()
        self.memory: dict[int, list[tuple[float, int]]] = defaultdict(list)
        self.files: dict[int, list[int]] = defaultdict(list)
        self.series: list[int] = []

    # -- faults -----------------------------------------------------------------------------------

    def strike(self) -> None:
        """Break one thing; each kind comes as often as the others."""
        least = min(self.faults[kind] for kind in KINDS)
        kind = self.dice.choice([kind for kind in KINDS if self.faults[kind] == least])
        self.faults[kind] += 1
        getattr(self, kind)()

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
        """Measure everything once; the descriptors of who serves, as there are few of them until then."""
        now = time.monotonic()
        serving = {
            self.fleet.pid,
            *(pid for role in ("worker", "scheduler", "monitor") for pid in self.fleet.pids(role)),
        }
        for pid in self.fleet.family():
            try:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                files = descriptors(pid)
            except (OSError, IndexError):  # it has just ended
                continue
            self.memory[pid].append((now, pages * os.sysconf("SC_PAGE_SIZE")))
            if pid in serving:
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

    # -- the end ----------------------------------------------------------------------------------

    def work(self, load: Load, seconds: float, pause: float) -> None:
        """Break things for so long, one each ``pause`` seconds or so."""
        end = time.monotonic() + seconds
        strike_at = time.monotonic() + min(1.0, pause)
        while time.monotonic() < end:
            self.look()
            if time.monotonic() > strike_at:
                self.strike()
                strike_at = time.monotonic() + self.dice.uniform(0.5, 1.5) * pause
            time.sleep(0.5)  # the pace of the looks
        self.look()

    def judge(self, load: Load, figure: Callable[[str], None]) -> Iterator[str]:
        """When the producers are done: what is wrong, in words that begin with its kind."""
        self.fleet.until_serving(3)
        with connect(self.server.url) as raw:
            eventually(lambda: idle(raw), PATIENCE)
            for fault in key_faults(raw):
                yield f"key: {fault}"
            keys = raw.dbsize()
        story = self.fleet.story()
        lost = story.lost(load.confirmed)
        highest = max(size for looks in self.memory.values() for _, size in looks)
        grown = max(max(files) - files[0] for files in self.files.values())
        steepest, lives = max(slopes := self.slopes(), default=0.0), len(slopes)
        struck = ", ".join(f"{n} {kind}" for kind, n in sorted(self.faults.items()))
        figure(
            f"{sum(self.faults.values())} faults ({struck}): {len(load.confirmed):,} jobs confirmed, {len(lost)} lost, "
            f"{len(story.repeated())} run twice, {len(load.refused)} refused; most memory of a process {highest / (1 << 20):.0f} MiB, "
            f"steepest slope {steepest / (1 << 20):.2f} MiB/min of {lives}, descriptors +{grown}, {keys} keys, {max(self.series)} series"
        )
        if lost:
            yield f"lost: {len(lost)} jobs"
        for kind, most, found in (
            ("memory", CEILING, highest), ("slope", SLOPE, steepest), ("descriptors", GROWTH, grown), ("keys", 60, keys),
            ("series", 1_000, max(self.series)),
        ):  # fmt: skip
            if found > most:
                yield f"{kind}: {found:,.0f}, more than {most:,}"
        for fault in checked(self.server.url).faults:
            yield f"check: {fault}"


def idle(raw: Any) -> bool:
    """Whether nothing is left to be run."""
    queue = "fastq:{default}:"
    waiting = sum(raw.llen(f"{queue}ready:{priority}") for priority in range(11)) + raw.zcard(f"{queue}due")
    return not waiting and all(raw.scard(key) <= 1 for key in raw.scan_iter(f"{queue}running:*"))


@pytest.fixture
def make_soak(make_fleet: Callable[..., Fleet], make_server: MakeServer, dice: random.Random) -> Callable[..., Soak]:
    """``make_soak(plant="…")``: three workers, a scheduler that leads and a monitor, and what is to be broken."""

    def make(plant: str = "") -> Soak:
        server = make_server(appendonly=True, config={"appendfsync": "everysec"})
        fleet = make_fleet(server.url, workers=3, concurrency=10, metrics_port=free_port(), lease=2 * LEASE)
        fleet.serving(plant=plant)
        fleet.until_logged("scheduler leads")
        fleet.until_logged("monitor running")
        return Soak(fleet, server, dice)

    return make


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.timeout(SECONDS + 180)
def test_soak(make_soak: Callable[..., Soak], figure: Any) -> None:
    """All faults in any order, under load: nothing is lost, and nothing grows."""
    soak = make_soak()
    with Load(soak.server.url, pace=0.05 if LONG else 0.01) as load:
        soak.work(load, SECONDS, 7.0 if LONG else 2.5)
    assert list(soak.judge(load, lambda text: figure(f"{SECONDS:.0f} s, {text}"))) == []
    assert len(soak.faults) == len(KINDS)
    assert soak.fleet.stop() == 0


def kill_if_busy(soak: Soak, load: Load) -> bool:
    """Kill a worker, unless it holds nothing that is still to be done."""
    pid = soak.dice.choice(soak.fleet.until_serving(1))
    soak.fleet.freeze(pid)
    keys = dict(zip(load.ids, load.confirmed, strict=False))
    with connect(soak.server.url) as raw:
        held = [
            job.decode() for key in raw.scan_iter(f"fastq:{{default}}:running:*.{pid}.*") for job in raw.smembers(key)
        ]
    busy = bool({keys[job] for job in held if job in keys} - soak.fleet.story().done)
    soak.fleet.kill(pid, signal.SIGKILL if busy else signal.SIGCONT)
    return busy


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_a_soak_is_there_for_is_found(make_soak: Callable[..., Soak]) -> None:
    """A fleet that drops, leaks, hoards and litters at once: each is told, by its own name."""
    soak = make_soak("recover_drops,leaks_descriptors,hoards,litters")
    with Load(soak.server.url) as load:
        for _ in range(GROWTH + 2):
            eventually(load.more(100), PATIENCE)
            soak.look()
            soak.cut()
        eventually(lambda: kill_if_busy(soak, load), PATIENCE)
        eventually(
            lambda: (soak.look(), max(size for looks in soak.memory.values() for _, size in looks) > CEILING)[1],
            PATIENCE,
        )
    found = {fault.partition(":")[0] for fault in soak.judge(load, print)}
    assert found >= {"lost", "descriptors", "memory", "key", "check"}
