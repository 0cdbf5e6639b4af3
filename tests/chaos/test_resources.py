"""What a fleet holds on to, and what it is given to hold: descriptors, connections, memory (F-16, A-20)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastq
from tests.conftest import eventually
from tests.process.fleet import PATIENCE, Fleet

Figure = Callable[[str], None]

CUTS = 10
"""Times that all connections are cut."""


def descriptors(pid: int) -> int:
    """How many file descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_descriptors_stay_the_same(make_fleet: Callable[..., Fleet], redis_url: str, raw: Any, figure: Figure) -> None:
    """F-16: after 1,000 jobs and 10 cuts of every connection each process has as many descriptors as before, but for one or two
    that the event loop keeps for itself."""
    fleet = make_fleet(redis_url, workers=2, concurrency=20).serving()
    fleet.until_logged("scheduler leads")
    fleet.enqueue_many("step", ((f"warm{n}", 0.0) for n in range(50)))
    fleet.until_done(f"warm{n}" for n in range(50))
    family = [pid for pid in fleet.family() if pid != fleet.pid]
    assert len(family) == 4
    before = {pid: descriptors(pid) for pid in family}
    clients = raw.info("clients")["connected_clients"]
    for cut in range(CUTS):
        keys = [f"k{cut}.{n}" for n in range(100)]
        fleet.enqueue_many("step", ((key, 0.001) for key in keys))
        raw.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        fleet.until_done(keys)
    eventually(lambda: all(descriptors(pid) <= before[pid] + 2 for pid in family), PATIENCE)  # a leak: 10 and more
    eventually(lambda: raw.info("clients")["connected_clients"] <= clients + 1, PATIENCE)  # the test's own producer
    figure(
        f"{CUTS} cuts of all connections, {CUTS * 100} jobs: {sorted(before.values())} descriptors before, {sorted(descriptors(pid) for pid in family)} after"
    )
    assert fleet.logged("worker exited") == []
    assert fleet.stop() == 0


def test_a_leak_of_descriptors_is_found(make_fleet: Callable[..., Fleet], redis_url: str, raw: Any) -> None:
    """The planted bug of the test above: connections that are dropped are never closed."""
    fleet = make_fleet(redis_url, workers=1, concurrency=20).serving(plant="leaks_descriptors")
    fleet.enqueue_many("step", [("first", 0.0)])
    fleet.until_done(["first"])
    (worker,) = fleet.workers()
    before = descriptors(worker)
    for cut in range(3):
        raw.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        fleet.enqueue_many("step", [(f"k{cut}", 0.0)])
        fleet.until_done([f"k{cut}"])
    assert descriptors(worker) > before
    assert fleet.stop() == 0


async def test_one_tenant_cannot_fill_redis(redis_url: str, raw: Any, figure: Figure) -> None:
    """A-20: 100,000 calls for a queue of 1,000: all the others are refused, and Redis's memory stays where it was."""
    app = fastq.FastQ(redis_url)
    app.queue("tenant", max_pending=1_000)

    @app.task(queue="tenant")
    async def note(text: str) -> None:
        """A job."""

    refused = 0
    try:
        await note.enqueue_many([("x" * 100,)] * 1_000)
        memory = raw.info("memory")["used_memory"]
        for _ in range(99):
            with pytest.raises(fastq.QueueFull):
                await note.enqueue_many([("x" * 100,)] * 1_000)
            refused += 1_000
    finally:
        await app.aclose()
    grown = raw.info("memory")["used_memory"] - memory
    figure(f"{refused:,} jobs refused by a full queue: Redis grew by {grown / 1024:.0f} KiB")
    assert raw.llen("fastq:{tenant}:ready:5") == 1_000
    assert raw.hlen("fastq:{tenant}:jobs") <= 1_001
    assert grown < 2 << 20


async def test_a_body_that_is_too_large_never_leaves_the_process(redis_url: str, raw: Any) -> None:
    """A-20, F-39: refused before the network, and counted in bytes, not in elements."""
    app = fastq.FastQ(redis_url, max_body=10_000)

    @app.task
    async def note(text: str) -> None:
        """A job."""

    with pytest.raises(fastq.BodyTooLarge):
        await note.enqueue("x" * 10_001)
    assert raw.dbsize() == 0
    await app.aclose()


def test_the_private_server_is_private(make_server: Any) -> None:
    """A-17: its socket and the folder around it are the user's alone, whatever the umask; the pid file: test_pid_file."""
    before = os.umask(0)
    try:
        socket = Path(make_server().socket_path)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o077 for path in (socket, socket.parent)] == [0, 0]
