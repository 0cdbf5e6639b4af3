"""rediss+cluster://: a cluster over TLS, end to end: the layout, redirections and every connection to a node are verified."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fastq
from fastq.broker.command import raw as command
from fastq.broker.connection import AsyncConnection, SyncConnection
from fastq.broker.doctor import examine
from fastq.broker.url import parse_url
from fastq.errors import BrokerUnavailable
from tests.chaos.proxy import FaultProxy
from tests.conftest import LASTING, children, eventually_async
from tests.nodes import SPEAK_TLS, Cluster
from tests.redis.movers import QUOTED, Run, both, refusal
from tests.redis.workshop import working


class Secured(NamedTuple):
    cluster: Cluster
    url: str


@pytest.fixture(scope="module", params=["front", *SPEAK_TLS])
def shared(request: pytest.FixtureRequest, pytestconfig: pytest.Config, certificate: Path) -> Iterator[Secured]:
    """Three masters; TLS is spoken by a front before each, or by nodes that can, among each other, too."""
    before = children()
    if request.param != "front":
        with Cluster(binary=request.param, tls=certificate) as cluster:
            pytestconfig.stash[LASTING] |= children() - before
            yield Secured(cluster, cluster.tls_url)
        return
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate / "server.crt", certificate / "server.key")
    with Cluster() as cluster, FaultProxy(cluster.url, context) as front:
        pytestconfig.stash[LASTING] |= children() - before
        yield Secured(cluster, f"{front.url}?ssl_ca_certs={certificate}/server.crt")


@pytest.fixture
def secured(shared: Secured) -> Secured:
    shared.cluster.until_whole()
    shared.cluster.flush()
    return shared


def test_commands_go_to_every_node_and_follow_a_slot(secured: Secured, run: Run) -> None:
    """MOVED names the port at which TLS is spoken, not the plain one."""
    cluster = secured.cluster
    key = f"{{{cluster.queue_on(cluster.servers[0])}}}:k"
    for call in both(secured.url, run):
        cluster.flush()
        assert [call(command("SET", f"key{n}", "x" * n)) for n in range(30)] == [b"OK"] * 30
        assert min(cluster.at(server).dbsize() for server in cluster.servers) > 0

    async def follow() -> list[Any]:
        connection = AsyncConnection.to(parse_url(secured.url))
        counts = [await connection.call(command("INCR", key))]
        cluster.move(key, cluster.servers[1])
        counts.append(await connection.call(command("INCR", key)))
        await connection.close()
        return counts

    blocking = SyncConnection.to(parse_url(secured.url))
    blocking.connect()
    assert run(follow()) == [1, 2]
    assert blocking.call(command("INCR", key)) == 3
    blocking.close()
    cluster.move(key, cluster.servers[0])


def test_an_unknown_certificate_is_refused(secured: Secured, run: Run) -> None:
    """Verified at each node before the password is sent."""
    unknown = secured.url.partition("?")[0].replace("://", f"://:{QUOTED}@", 1)
    assert "certificate verify failed" in refusal(unknown, run, BrokerUnavailable)
    unverified = secured.url.partition("?")[0] + "?ssl_cert_reqs=none"
    assert [call(command("GET", "nothing")) for call in both(unverified, run)] == [None, None]


def test_no_tls_to_a_cluster_that_wants_it(secured: Secured, run: Run) -> None:
    plain = secured.url.partition("?")[0].replace("rediss+", "redis+")
    refusal(plain, run, BrokerUnavailable, connect_timeout=1.0)


async def test_jobs_from_end_to_end(secured: Secured) -> None:
    """Both producers, a worker with queues on every node, a wake-up from idleness, results that are pushed, retries, limits, a chord."""
    names = [secured.cluster.queue_on(server) for server in secured.cluster.servers]
    app = fastq.FastQ(secured.url, queues=",".join(names), concurrency=8, enqueue_timeout=10.0)

    @app.task(max_attempts=2, retry=fastq.Fixed(0.01))
    async def twice(ctx: fastq.JobContext, n: int) -> int:
        if ctx.attempt == 1:
            raise ValueError("once")
        return 2 * n

    @app.task(rate_limit="1000/s", queue=names[1])
    async def count(n: int) -> int:
        return n

    @app.task(queue=names[1])
    async def total(counts: list[int]) -> int:
        return sum(counts)

    async with working(app) as shop:
        for number, name in enumerate(names):
            job = await twice.options(queue=name).enqueue(number)
            assert (await shop.ended(job)).state == "success"
            assert await job.result(timeout=10) == 2 * number
            other = await asyncio.to_thread(twice.options(queue=name).enqueue_sync, 5)
            assert (await shop.ended(other)).state == "success"
        await eventually_async(lambda: not shop.loop.executor.running)
        begun = asyncio.get_running_loop().time()
        assert await (await count.enqueue(7)).result(timeout=10) == 7
        assert asyncio.get_running_loop().time() - begun < 1.0
        flow = await fastq.chord([count.s(n) for n in range(4)], total.s()).enqueue()
        assert await flow.result(timeout=10) == 6


def test_the_doctor_says_that_it_is_encrypted(secured: Secured) -> None:
    connection = SyncConnection.to(parse_url(secured.url))
    findings = connection.run(examine("fastq", connection.endpoint))
    connection.close()
    assert re.match("3 masters serve all slots", next(each.message for each in findings if each.name == "cluster"))
    assert {each.level for each in findings if each.name in {"scripts", "permissions", "server"}} == {"ok"}
