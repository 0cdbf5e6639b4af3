"""A queue that is split, on a cluster of three masters and while its number changes: what its jobs and its load become."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastq
from fastq.partitions import spread
from tests.chaos.load import Load
from tests.chaos.test_cluster import NODE_TIMEOUT, SETTINGS, until_drained
from tests.conftest import MakeServer, connect, eventually
from tests.nodes import Cluster
from tests.process.fleet import LEASE, PATIENCE, Fleet
from tests.sound import assert_sound

MakeFleet = Callable[..., Fleet]
Figure = Callable[[str], None]
PARTS = spread("mail", 4)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(masters=3, replicas=1, node_timeout=NODE_TIMEOUT) as started:
        yield started


@contextlib.contextmanager
def producer(url: str, partitions: int, **settings: Any) -> Iterator[fastq.FastQ]:
    app = fastq.FastQ(url, default_queue="mail", partitions={"mail": partitions}, enqueue_timeout=PATIENCE, **settings)

    @app.task(name="step")
    async def step(key: str, seconds: float) -> None:
        """The one of tests/chaos/jobs.py."""

    yield app
    app.close()


def test_a_worker_and_a_master_die(cluster: Cluster, make_fleet: MakeFleet, figure: Figure) -> None:
    """F-01, F-27: the partitions lie on all masters; a worker that held jobs of all of them and a master are killed, 0 jobs are lost.

    Jobs are confirmed when a replica has them: a failover alone may lose what it had not told it yet (docs/high_availability.md).
    """
    owners = {part: cluster.owner(f"{{{part}}}") for part in PARTS}
    assert {server.port for server in owners.values()} == {server.port for server in cluster.servers[:3]}
    fleet = make_fleet(cluster.url, queues="mail", partitions="mail=4", **SETTINGS).serving()
    with producer(cluster.url, 4, durability="replicated") as app:
        step = app.tasks["step"]
        many = [f"m{number}" for number in range(200)]
        step.enqueue_many_sync([(key, 0.0) for key in many[:50]])
        asyncio.run(_in_many_ways(app, many[50:]))
    fleet.until_done(many)
    load = Load(cluster.url, ["mail"], enqueue_timeout=10.0, partitions="mail=4", durability="replicated")
    with load:
        eventually(load.more(300), PATIENCE)
        killed = fleet.workers()[0]
        fleet.kill(killed)
        eventually(load.more(300), PATIENCE)
        new = cluster.replica_of(owners["mail:0"])
        owners["mail:0"].kill()
        eventually(lambda: cluster.at(new).info("replication")["role"] == "master", PATIENCE)
        cluster.until_whole()
        eventually(load.more(300), PATIENCE)
    load.queues = list(PARTS)
    lost = until_drained(fleet, load, cluster)
    figure(
        f"{len(load.confirmed)} jobs confirmed on {len(set(owners.values()))} masters, {len(lost)} lost, {len(load.refused)} refused, "
        f"{len(fleet.story().repeated())} run twice"
    )
    assert lost == set()
    assert_sound(cluster.url)
    assert [line["pid"] for line in fleet.logged("worker exited")] == [killed]
    assert fleet.logged("scheduler exited") == fleet.logged("monitor exited") == []
    assert fleet.stop() == 0


async def _in_many_ways(app: fastq.FastQ, keys: list[str]) -> None:
    """Replicated: many at a time, a batch, workflows."""
    step = app.tasks["step"]
    await step.enqueue_many([(key, 0.0) for key in keys[:50]])
    await app.enqueue_batch("step", [(key, 0.0) for key in keys[50:80]])
    for first, second in zip(keys[80::2], keys[81::2], strict=True):
        await fastq.chain(step.si(first, 0.0), step.si(second, 0.0)).enqueue()
    await app.aclose()


def load_of(cluster: Cluster) -> dict[int, tuple[int, int]]:
    """What the scripts cost each master so far: port -> calls, µs."""
    found: dict[int, tuple[int, int]] = {}
    for server in cluster.servers[:3]:
        stats: dict[str, Any] = cluster.at(server).info("commandstats").get("cmdstat_evalsha", {})
        found[server.port] = (int(stats.get("calls", 0)), int(stats.get("usec", 0)))
    return found


def test_the_load_is_spread(make_fleet: MakeFleet, figure: Figure) -> None:
    """Issue 7.4: the scripts of one hot queue run on one master; of one with four partitions, on all three."""
    shares: dict[int, float] = {}
    for partitions in (1, 4):
        with Cluster(masters=3) as cluster, producer(cluster.url, partitions) as app:
            fleet = make_fleet(cluster.url, queues="mail", partitions=f"mail={partitions}", concurrency=50).serving()
            before, begun = load_of(cluster), time.monotonic()
            keys = [f"j{number}" for number in range(6_000)]
            app.tasks["step"].enqueue_many_sync([(key, 0.0) for key in keys], ids=False)
            fleet.until_done(keys)
            seconds = time.monotonic() - begun
            after = load_of(cluster)
            used = [(after[port][0] - before[port][0], after[port][1] - before[port][1]) for port in after]
            total = sum(usec for _, usec in used)
            shares[partitions] = max(usec for _, usec in used) / total
            told = ", ".join(f"{calls} calls {usec / 1_000:.0f} ms" for calls, usec in used)
            figure(
                f"partitions={partitions}: {told}; the busiest master has {shares[partitions]:.0%} of the scripts' time; "
                f"{total / len(keys):.1f} µs a job in all, {len(keys) / seconds:,.0f} jobs/s on this machine"
            )
            assert fleet.stop() == 0
    assert shares[1] > 0.9
    assert shares[4] < 0.65, "two of the four partitions on one master, and some chance"


def test_another_number_while_everything_runs(make_server: MakeServer, make_fleet: MakeFleet, figure: Figure) -> None:
    """A fleet that knows nothing of partitions gets some: its workers are replaced by others that serve them, their leases are
    extended, nothing is lost and nothing run twice; then back to fewer, and what lies beyond the number is served."""
    server = make_server()
    fleet = make_fleet(server.url, queues="mail").serving()
    first = fleet.workers()
    keys = [f"long{number}" for number in range(12)]
    with producer(server.url, 1) as before, producer(server.url, 4) as after:
        before.tasks["step"].enqueue_many_sync([("a", 0.01), ("b", 0.01)])
        fleet.until_done("ab")
        begun = time.monotonic()
        after.tasks["step"].enqueue_many_sync([(key, 2 * LEASE) for key in keys])
        fleet.until_done(keys)
        seconds = time.monotonic() - begun
        figure(f"12 jobs of {2 * LEASE:g} s in partitions that nobody served were done after {seconds:.1f} s")
        assert fleet.story().repeated() == set(), "their leases were extended"
        assert not set(first) & set(fleet.workers())
        reasons = {line["reason"] for line in fleet.logged("worker drains")}
        assert any("partitions that it does not serve" in reason for reason in reasons), reasons
        with producer(server.url, 2) as fewer:
            more = [f"m{number}" for number in range(40)]
            after.tasks["step"].enqueue_many_sync([(key, 0.01) for key in more[:20]])
            fewer.tasks["step"].enqueue_many_sync([(key, 0.01) for key in more[20:]])
            fleet.until_done(more)
        killed = fleet.workers()[0]
        gone = [f"gone{number}" for number in range(16)]
        after.tasks["step"].enqueue_many_sync([(key, LEASE) for key in gone])
        fleet.until_started(*gone)
        fleet.kill(killed)
        fleet.until_done(gone)
    assert_sound(server.url)
    client = connect(server.url)
    eventually(lambda: not [name for name in client.keys("*}:running:*") if str(killed).encode() in name], PATIENCE)
    client.close()
    assert fleet.stop() == 0


def test_a_monitor_that_sees_no_partitions_is_found(make_server: MakeServer, make_fleet: MakeFleet) -> None:
    """The planted bug of the test above: what a worker holds in a partition runs out of its lease, and is run once more."""
    server = make_server()
    with producer(server.url, 4) as app:
        app.enqueue_sync("step", "a", 0.0)
        fleet = make_fleet(server.url, queues="mail").serving(plant="sees_no_partitions")
        app.enqueue_sync("step", "long", 3 * LEASE)
        eventually(lambda: "long" in fleet.story().repeated(), PATIENCE)
