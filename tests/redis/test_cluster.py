"""redis+cluster://: each command goes to the node that owns its key, also while slots move (F-27).

Failovers are in tests/chaos/test_cluster.py; `--cluster` runs every test here and beside it on a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

import fastq
from fastq.broker import batches, commands, scripts
from fastq.broker.command import Command
from fastq.broker.command import raw as command
from fastq.broker.connection import AsyncConnection, SyncConnection
from fastq.broker.fence import FencedConnection
from fastq.broker.keys import QueueKeys
from fastq.broker.listener import Listener
from fastq.broker.topology import GUARDED
from fastq.broker.url import parse_url
from fastq.broker.wire import Wire
from fastq.errors import BrokerReplyError, BrokerUnavailable
from tests.conftest import MakeServer, children, eventually, eventually_async, key_faults
from tests.nodes import Cluster
from tests.redis.movers import Run, both, closed_port, refusal
from tests.redis.workshop import working

NAMES = [f"key{n}" for n in range(30)]


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    with Cluster(masters=3) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared: Cluster) -> Cluster:
    """An empty cluster of three masters."""
    shared.until_whole()
    shared.flush()
    return shared


@pytest.fixture(autouse=True, scope="module")
def lasting(pytestconfig: pytest.Config, shared: Cluster) -> None:
    from tests.conftest import LASTING

    assert shared.servers
    pytestconfig.stash[LASTING] |= children()


def spread(cluster: Cluster, count: int = 3) -> list[str]:
    """Queues on so many nodes."""
    return [cluster.queue_on(server) for server in cluster.servers[:count]]


def test_commands_go_to_the_owner_of_their_key(cluster: Cluster, run: Run) -> None:
    for number, call in enumerate(both(cluster.url, run)):
        for name in NAMES:
            assert call(command("SET", f"{name}{number}", name)) == b"OK"
    sizes = [cluster.at(server).dbsize() for server in cluster.servers]
    assert sum(sizes) == 2 * len(NAMES)
    assert min(sizes) > 0


def test_many_commands_in_one_call(cluster: Cluster, run: Run) -> None:
    """Replies come in the order of the commands, whatever nodes gave them; keys are found by SCAN on every node."""
    asked = [command("SET", name, name) for name in NAMES] + [command("GET", name) for name in NAMES]
    expected = [b"OK"] * len(NAMES) + [name.encode() for name in NAMES]

    async def asynchronously() -> tuple[list[Any], set[bytes], int]:
        connection = AsyncConnection.to(parse_url(cluster.url))
        replies, cursor, seen = await connection.call_many(asked), b"0", set[bytes]()
        while cursor != b"0" or not seen:
            cursor, names = await connection.call(command("SCAN", cursor, "COUNT", 3))
            seen |= set(names)
        connects = connection.connects
        await connection.close()
        return replies, seen, connects

    replies, seen, connects = run(asynchronously())
    assert replies == expected
    assert seen == {name.encode() for name in NAMES}
    assert connects == 3, "one connection per node"
    blocking = SyncConnection.to(parse_url(cluster.url))
    assert blocking.call_many(asked) == expected
    cursor, seen = b"0", set()
    while cursor != b"0" or not seen:
        cursor, names = blocking.call(command("SCAN", cursor, "COUNT", 3))
        seen |= set(names)
    assert seen == {name.encode() for name in NAMES}
    assert blocking.connects == 3
    blocking.close()


def test_what_goes_to_one_node_leaves_in_one_write(cluster: Cluster, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's settle and reserve, an enqueuer's flight; commands of several nodes go each by itself."""
    near, far = (f"{{{cluster.queue_on(server)}}}" for server in cluster.servers[:2])
    writes: list[int] = []
    real = Wire.send

    def counted(wire: Wire, data: bytes, *waiters: Any) -> None:
        writes.append(len(waiters))
        real(wire, data, *waiters)

    async def use() -> None:
        connection = AsyncConnection.to(parse_url(cluster.url))
        await connection.call_many([command("SET", key, "0") for key in (near, far)])
        monkeypatch.setattr(Wire, "send", counted)
        asked = [command("INCR", near) for _ in range(3)]
        loop = asyncio.get_running_loop()
        assert [await connection.finish(c, f) for c, f in zip(asked, connection.send_all(asked), strict=True)] == [
            1,
            2,
            3,
        ]
        waiters = [loop.create_future() for _ in asked]
        connection.post(asked, waiters)
        assert await asyncio.gather(*waiters) == [4, 5, 6]
        assert await connection.call_many([*asked, command("PING")]) == [7, 8, 9, b"PONG"]
        assert writes == [3, 3, 4]
        assert await connection.call_many([*asked, command("INCR", far)]) == [10, 11, 12, 1]
        assert writes == [3, 3, 4, 1, 1, 1, 1]
        await connection.close()

    run(use())


def test_a_slot_that_moved_is_followed(cluster: Cluster, run: Run) -> None:
    """MOVED: once, and the layout is known from then on."""
    key = f"{{{cluster.queue_on(cluster.servers[0])}}}:k"
    blocking = SyncConnection.to(parse_url(cluster.url))
    blocking.call(command("SET", key, "1"))

    async def follow() -> None:
        connection = AsyncConnection.to(parse_url(cluster.url))
        assert await connection.call(command("INCR", key)) == 2
        assert cluster.move(key, cluster.servers[1]) == 1
        assert await connection.call(command("INCR", key)) == 3
        cluster.at(cluster.servers[0]).config_resetstat()
        assert await connection.call(command("INCR", key)) == 4
        assert "cmdstat_incr" not in cluster.at(cluster.servers[0]).info("commandstats")
        await connection.close()

    run(follow())
    assert blocking.call_many([command("INCR", key), command("INCR", key)]) == [5, 6]
    blocking.close()


def test_a_slot_that_is_moving(cluster: Cluster, run: Run) -> None:
    """ASK for a key that has gone, scripts included; TRYAGAIN while only a part of a call's keys has, told as an outage."""
    q = QueueKeys("fastq", cluster.queue_on(cluster.servers[0]))
    jobs, leases = q.jobs.decode(), q.workers.decode()
    source, target = cluster.servers[:2]
    blocking = SyncConnection.to(parse_url(cluster.url))
    blocking.call_many([commands.register(q, "w", 60_000, b"card"), commands.extend(q, 60_000, ["w"])])

    def half_way() -> None:
        moved = leases if cluster.at(target).execute_command("ASKING") and not _has(cluster, source, leases) else jobs
        for call in both(cluster.url, run):
            assert call(command("EXISTS", moved)) == 1
            assert call(commands.extend(q, 60_000, ["w"])) == [True]
            with pytest.raises(BrokerUnavailable, match="TRYAGAIN"):
                call(commands.reserve(q, "w", 5))
        assert blocking.call(commands.extend(q, 60_000, ["w"])) == [True]

    cluster.move(leases, target, between=half_way)
    assert blocking.call(commands.reserve(q, "w", 5)).held == 0
    blocking.close()


def test_a_script_does_not_begin_where_it_could_not_end(
    cluster: Cluster, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a slot moves, a node ends a script when it reaches a key that is not there: it must not have begun.

    Without the guard the callback of a batch is noted, and never enqueued.
    """
    q = QueueKeys("fastq", cluster.queue_on(cluster.servers[0]))
    blocking = SyncConnection.to(parse_url(cluster.url))
    callback = batches.batch_call(q, "b1", "complete", b"\x96\x05envelope")
    noted = command("HEXISTS", q.batch("b1"), "on:complete")

    def ended_batch() -> None:
        blocking.call_many([batches.batch_open(q, name, {"ttl": 60_000}) for name in ("b1", "b2")])
        assert blocking.call(batches.batch_close(q, "b1", "whole")) == "success"

    def refused() -> None:
        for call in both(cluster.url, run):
            with pytest.raises(BrokerUnavailable, match="TRYAGAIN"):
                call(callback)

    ended_batch()
    cluster.move(q.jobs.decode(), cluster.servers[1], before=refused)
    assert blocking.call(noted) == 0
    assert blocking.call(callback) == 2
    assert blocking.call(command("HLEN", q.jobs)) == 1
    cluster.flush()
    monkeypatch.setattr("fastq.broker.topology.GUARDED", frozenset())
    ended_batch()
    answers: list[int] = []
    cluster.move(q.jobs.decode(), cluster.servers[0], before=lambda: answers.append(blocking.call(callback)))
    assert answers == [2], "it says that the callback was enqueued"
    assert blocking.call(command("HLEN", q.jobs)) == 0, "the guard is not what keeps this from happening"
    blocking.close()


def test_scripts_that_reach_keys_that_they_do_not_name() -> None:
    """Each is guarded, or names so many keys that never exist all at once (levels, wake tokens) that it needs none."""
    reaches = {
        name
        for name in scripts.names()
        if re.search(r"redis\.call\('[A-Z]+', [^,)]*\.\.", scripts.load(name).text.decode())
    }
    many = {
        "cancel",
        "check",
        "enqueue",
        "enqueue_once",
        "mend",
        "park",
        "purge",
        "recover",
        "reserve",
        "settle",
        "status",
    }
    assert reaches == GUARDED | many


def _has(cluster: Cluster, server: Any, key: str) -> bool:
    slot = cluster.at(server).execute_command("CLUSTER", "KEYSLOT", key)
    return key.encode() in cluster.at(server).execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100)


def test_a_node_that_is_away_keeps_no_other_back(make_cluster: Any) -> None:
    """I4: what is on the other nodes is done; the error names the node."""
    with Cluster(masters=3, node_timeout=60.0, **{"cluster-require-full-coverage": "no"}) as cluster:
        dead, *_ = queues = spread(cluster)
        blocking = SyncConnection.to(parse_url(cluster.url), response_timeout=5.0)
        blocking.call_many([command("SET", f"{{{queue}}}", "0") for queue in queues])
        cluster.servers[0].kill()

        async def asynchronously() -> None:
            connection = AsyncConnection.to(parse_url(cluster.url))
            asked = [command("INCR", f"{{{queue}}}") for queue in queues]
            with pytest.raises(BrokerUnavailable, match=f"127.0.0.1:{cluster.servers[0].port} of redis\\+cluster"):
                await connection.call_many(asked)
            assert await connection.call_many(asked[1:]) == [2, 2]
            await connection.close()

        asyncio.run(asynchronously())
        with pytest.raises(BrokerUnavailable, match=f"127.0.0.1:{cluster.servers[0].port} of redis\\+cluster"):
            blocking.call_many([command("INCR", f"{{{queue}}}") for queue in queues])
        assert blocking.call_many([command("INCR", f"{{{queue}}}") for queue in queues[1:]]) == [4, 4]
        cluster.servers[0].start()
        eventually(lambda: _answer(blocking, command("SET", f"{{{dead}}}", "1")) == b"OK", 30)
        blocking.close()


def _answer(connection: SyncConnection, asked: Command[Any]) -> Any:
    try:
        return connection.call(asked)
    except BrokerUnavailable:  # a node that comes back takes nothing until it has heard from the others
        return None


@pytest.fixture
def make_cluster(cluster: Cluster) -> None:
    """After the shared one, so that it is not taken for this test's."""


def test_what_is_no_cluster(make_server: MakeServer, cluster: Cluster, run: Run) -> None:
    """The error says which URL to use instead."""
    server = make_server(port=0)
    url = f"redis+cluster://127.0.0.1:{server.port}"
    assert f"use redis://127.0.0.1:{server.port}/0" in refusal(url, run, BrokerReplyError)
    plain = f"redis://127.0.0.1:{cluster.servers[0].port}"
    elsewhere = command("GET", cluster.queue_on(cluster.servers[1]))
    assert "use redis+cluster://" in refusal(plain, run, BrokerReplyError, elsewhere)
    nowhere = f"redis+cluster://127.0.0.1:{closed_port()},127.0.0.1:{closed_port()}"
    assert "cannot reach" in refusal(nowhere, run, BrokerUnavailable)


def test_a_node_in_the_url_that_is_away(cluster: Cluster, run: Run) -> None:
    url = f"redis+cluster://127.0.0.1:{closed_port()},127.0.0.1:{cluster.servers[1].port}"
    for call in both(url, run):
        assert call(command("GET", "nothing")) is None


def test_a_connection_that_was_cut(cluster: Cluster, run: Run) -> None:
    """The next call connects anew; the count of connections says that something may have been missed."""

    async def cut() -> None:
        for kind in (AsyncConnection, FencedConnection):
            connection = kind.to(parse_url(cluster.url))
            await connection.call(command("SET", "key", "1"))
            before = connection.connects
            for server in cluster.servers:
                cluster.at(server).client_kill_filter(_type="normal", skipme=True)
            await eventually_async(lambda connection=connection: not connection.connected)  # type: ignore[misc]
            assert connection.connects > before
            assert await connection.call(command("GET", "key")) == b"1"
            await connection.close()

    run(cut())


def test_a_forked_child_has_connections_of_its_own(cluster: Cluster) -> None:
    blocking = SyncConnection.to(parse_url(cluster.url))
    blocking.call(command("SET", "key", "0"))
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            os._exit(0 if blocking.call_many([command("INCR", "key")] * 100)[-1] == 100 else 1)
        os._exit(2)
    replies = blocking.call_many([command("STRLEN", "other")] * 100)
    assert replies == [0] * 100
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    blocking.close()


def test_messages_reach_a_listener_on_any_node(cluster: Cluster, run: Run) -> None:
    async def listen() -> None:
        heard: list[bytes] = []
        ear = Listener(parse_url(cluster.url), "channel", heard.append, lambda: None)
        await ear.listen()
        connection = AsyncConnection.to(parse_url(cluster.url))
        for server in cluster.servers:
            cluster.at(server).publish("channel", server.port)
        await eventually_async(lambda: len(heard) == len(cluster.servers))
        await ear.close()
        await connection.close()

    run(listen())


def _joining(app: fastq.FastQ, queue: str) -> tuple[Any, Any]:
    @app.task(queue=queue)
    async def count(n: int) -> int:
        return n

    @app.task(queue=queue)
    async def total(counts: list[int]) -> int:
        return sum(counts)

    return count, total


def test_a_queue_per_node(cluster: Cluster) -> None:
    """One worker serves queues on every node: jobs of all kinds, retries, results, limits, workflows, an idle wake-up."""
    names = spread(cluster)
    app = fastq.FastQ(cluster.url, queues=",".join(names), concurrency=8, enqueue_timeout=10.0)
    runs: list[str] = []

    @app.task(max_attempts=3)
    async def plain(key: str) -> str:
        runs.append(key)
        return key

    @app.task(max_attempts=2, retry=fastq.Fixed(0.01))
    async def fails_once(ctx: fastq.JobContext) -> int:
        if ctx.attempt == 1:
            raise ValueError("once")
        return ctx.attempt

    @app.task(rate_limit="1000/s")
    async def limited() -> None:
        runs.append("limited")

    joins = _joining(app, names[2])

    async def use() -> None:
        async with working(app) as shop:
            handles = [await plain.options(queue=name).enqueue(f"{name}.{n}") for name in names for n in range(5)]
            assert [await handle.result(timeout=10) for handle in handles] == [
                f"{name}.{n}" for name in names for n in range(5)
            ]
            again = [await fails_once.options(queue=name).enqueue() for name in names]
            for handle in again:
                assert (await shop.ended(handle)).state == "success"
            for name in names:
                assert (await shop.ended(await limited.options(queue=name).enqueue())).state == "success"
            bulk = await plain.options(queue=names[1]).enqueue_many([(f"bulk{n}",) for n in range(2_000)])
            await eventually_async(lambda: sum(key.startswith("bulk") for key in runs) == 2_000)
            assert len(bulk) == 2_000
            for name in names:  # by now the worker blocks on all three wake lists: nobody waits for its next look
                await eventually_async(lambda: not shop.loop.executor.running)
                await asyncio.sleep(0.05)
                begun = asyncio.get_running_loop().time()
                assert await (await plain.options(queue=name).enqueue("wake")).result(timeout=10) == "wake"
                assert asyncio.get_running_loop().time() - begun < 1.0
            count, total = joins
            flow = await fastq.chord([count.s(n) for n in range(4)], total.s()).enqueue()
            assert await flow.result(timeout=10) == 6

    asyncio.run(use())
    faults = [fault for server in cluster.servers for fault in key_faults(cluster.at(server))]
    assert not faults, faults
