"""`fastq doctor` of a cluster: every master is looked at, and what becomes of the queues of one that dies (A-08, F-24)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fastq.broker.connection import SyncConnection
from fastq.broker.doctor import Finding, examine, startup_warnings
from fastq.broker.embedded import EmbeddedServer
from fastq.broker.topology import LAYOUT
from fastq.broker.url import parse_url
from tests.conftest import LASTING, children, eventually
from tests.nodes import Cluster

SOUND = {"appendonly": "yes", "maxmemory": "100mb", "cluster-node-timeout": "5000"}


@pytest.fixture(scope="module")
def shared(pytestconfig: pytest.Config) -> Iterator[Cluster]:
    """Three masters with a replica each, set up as the documentation recommends."""
    before = children()
    with Cluster(masters=3, replicas=1, **SOUND) as cluster:
        pytestconfig.stash[LASTING] |= children() - before
        for server in cluster.servers[:3]:
            cluster.at(server).set(cluster.queue_on(server), 1)  # a replica that has got nothing yet counts as none
        for server in cluster.servers:
            eventually(lambda server=server: all(len(row) > 3 for row in slots(cluster, server)), 30)  # type: ignore[misc]
        cluster.flush()
        yield cluster


def slots(cluster: Cluster, server: EmbeddedServer) -> Any:
    """As a connection of fastq's own gets them."""
    connection = SyncConnection.to(parse_url(server.url))
    try:
        return connection.call(LAYOUT)
    finally:
        connection.close()


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """Every master as it was when the test ends."""
    masters = shared.servers[:3]
    names = ("appendonly", "maxclients", "maxmemory-policy", "cluster-node-timeout", "cluster-require-full-coverage")
    before = {name: shared.at(masters[0]).config_get(name)[name] for name in names}
    yield shared
    for server in masters:
        for name, value in before.items():
            shared.at(server).config_set(name, value)


def seen(cluster: Cluster, host: str = "127.0.0.1") -> list[Finding]:
    """But for a known hole of the server that the suite happens to run on."""
    return [finding for finding in ask(cluster, examine, host) if finding.name != "security"]


def ask(cluster: Cluster, operation: Any, host: str = "127.0.0.1") -> Any:
    url = cluster.url.replace("127.0.0.1", host)
    connection = SyncConnection.to(parse_url(url), connect_timeout=1.0, response_timeout=1.0)
    try:
        return connection.run(operation("fastq", connection.endpoint))
    finally:
        connection.close()


def wrong(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if finding.level != "ok"}


def test_what_is_well_in_other_words_at_each_is_said_once(cluster: Cluster) -> None:
    cluster.at(cluster.servers[1]).config_set("maxclients", 9_000)
    clients = [finding for finding in seen(cluster) if finding.name == "clients"]
    assert [finding.level for finding in clients] == ["ok"]
    assert "the others are well, too" in clients[0].message


def test_a_sound_cluster(cluster: Cluster) -> None:
    """Each thing is said once for all masters, and nothing is written."""
    findings = seen(cluster)
    whole = "cluster replicas cluster-node-timeout cluster-require-full-coverage"
    each = "server persistence fsync eviction memory clients access clock latency scripts permissions"
    assert [finding.name for finding in findings] == [*whole.split(), *each.split()]
    assert wrong(findings) == {}
    assert ask(cluster, startup_warnings) == []
    assert not list(cluster.scan())


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize(
    ("directive", "value", "name", "level", "fix"),
    [
        ("maxmemory-policy", "allkeys-lru", "eviction", "fault", "maxmemory-policy noeviction"),
        ("appendonly", "no", "persistence", "warn", "appendonly yes"),
    ],
)
def test_a_fault_of_one_master_is_found_and_it_is_named(
    cluster: Cluster, number: int, directive: str, value: str, name: str, level: str, fix: str
) -> None:
    """Whichever it is: before, one of them was looked at."""
    server = cluster.servers[number]
    cluster.at(server).config_set(directive, value)
    found = wrong(seen(cluster))
    assert found.keys() == {name}
    assert found[name].level == level
    assert found[name].message.startswith(f"127.0.0.1:{server.port}: ")
    assert fix in found[name].fix
    (warning,) = ask(cluster, startup_warnings)
    assert warning.startswith(f"127.0.0.1:{server.port}: ")


def test_a_fault_of_all_masters_is_said_once(cluster: Cluster) -> None:
    for server in cluster.servers[:3]:
        cluster.at(server).config_set("maxmemory-policy", "allkeys-lru")
    found = [finding for finding in seen(cluster) if finding.level != "ok"]
    assert [finding.name for finding in found] == ["eviction"]
    assert found[0].message.startswith("maxmemory-policy is allkeys-lru")


@pytest.mark.parametrize(
    ("milliseconds", "words"),
    [(60_000, "replaced after 60 s at the earliest"), (200, "busy for 0.2 s is taken for dead")],
)
def test_a_failover_that_comes_late_or_for_nothing(cluster: Cluster, milliseconds: int, words: str) -> None:
    for server in cluster.servers[:3]:
        cluster.at(server).config_set("cluster-node-timeout", milliseconds)
    found = wrong(seen(cluster))
    assert found.keys() == {"cluster-node-timeout"}
    assert words in found["cluster-node-timeout"].message
    assert found["cluster-node-timeout"].fix == "cluster-node-timeout 5000"


@pytest.mark.parametrize(
    ("directive", "value"), [("cluster-node-timeout", "9000"), ("cluster-require-full-coverage", "no")]
)
def test_masters_that_do_not_agree(cluster: Cluster, directive: str, value: str) -> None:
    odd = cluster.servers[1]
    cluster.at(odd).config_set(directive, value)
    found = wrong(seen(cluster))
    assert found.keys() == {directive}
    assert f"{value} at 127.0.0.1:{odd.port}" in found[directive].message


def test_masters_without_replicas_and_slots_without_a_master() -> None:
    """What would stand still when a node dies, and what does when one has."""
    quorum = {**SOUND, "cluster-require-full-coverage": "yes"}
    with Cluster(masters=3, node_timeout=5.0, **quorum) as cluster:
        found = wrong(seen(cluster))
        assert found.keys() == {"replicas", "cluster-require-full-coverage"}
        assert all(str(server.port) in found["replicas"].message for server in cluster.servers)
        assert "the others refuse, too" in found["cluster-require-full-coverage"].message
        for server in cluster.servers:
            cluster.at(server).config_set("cluster-require-full-coverage", "no")
        assert wrong(seen(cluster)).keys() == {"replicas"}
        dead, *alive = sorted(cluster.servers, key=lambda server: server.port)  # the one that would be asked first
        dead.kill()
        for host in ("127.0.0.1", "localhost"):  # by another name than the cluster's own for the one that answered
            down = wrong(seen(cluster, host))
            assert down["cluster"].level == "fault"
            assert f"127.0.0.1:{dead.port}: this master cannot be reached" in down["cluster"].message
        slot = 16_384 * cluster.servers.index(dead) // 3 + 100
        for server in alive:
            cluster.at(server).execute_command("CLUSTER", "DELSLOTS", slot)
        gone = [finding.message for finding in seen(cluster) if finding.level == "fault"]
        assert "1 of 16,384 slots are served by no node" in gone
        for server in alive:
            cluster.at(server).config_set("cluster-require-full-coverage", "yes")
        living = f"127.0.0.1:{alive[0].port}"
        messages = eventually(
            lambda: [f.message for f in seen(cluster) if living in f.message and "lives and serves nobody" in f.message]
        )
        assert "CLUSTERDOWN" in messages[0]
