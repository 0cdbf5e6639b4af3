"""durability="replicated": `enqueue` returns when replicas have the job, and says so when they have not (F-28, F-29)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import fastq
from tests.conftest import MakeServer, connect, eventually
from tests.nodes import Cluster

REPLICATED: Any = {"durability": "replicated"}


class Pair:
    """A master and its replica, which can be cut off."""

    def __init__(self, make_server: MakeServer) -> None:
        config = {"repl-diskless-sync-delay": "0"}
        self.master, self.replica = make_server(port=0, config=config), make_server(port=0, config=config)
        self.follow()

    def follow(self) -> None:
        self.replica.ask(b"REPLICAOF", b"127.0.0.1", str(self.master.port).encode())
        self.until_acknowledged()

    def until_acknowledged(self) -> None:
        """The replica says what it has: Redis 7.0 lets it do so a second after it has come."""
        with connect(self.master.url) as client:
            eventually(lambda: client.set("~written", "1") and client.wait(1, 100) == 1)


@pytest.fixture
def pair(make_server: MakeServer) -> Pair:
    return Pair(make_server)


@pytest.fixture(params=["async", "sync"])
def enqueue(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Enqueues one job either way; the handle."""

    def either(app: fastq.FastQ, **options: Any) -> Any:
        if request.param == "sync":
            try:
                return app.options(**options).enqueue_sync("task", 1)
            finally:
                app.close()

        async def once() -> Any:
            try:
                return await app.options(**options).enqueue("task", 1)
            finally:
                await app.aclose()

        return asyncio.run(once())

    return either


def test_the_replica_has_what_was_confirmed(pair: Pair, enqueue: Callable[..., Any]) -> None:
    app = fastq.FastQ(pair.master.url)
    for _ in range(20):
        job = enqueue(app, **REPLICATED)
        with connect(pair.replica.url) as client:
            assert client.hexists("fastq:{default}:jobs", job.id)


def test_it_may_be_the_settings_choice(pair: Pair, enqueue: Callable[..., Any]) -> None:
    """The setting is for every call, and a call may say otherwise."""
    app = fastq.FastQ(pair.master.url, durability="replicated", replicas=2, replication_timeout=1.0)
    with pytest.raises(fastq.NotReplicated, match="1 of 2 replicas"):
        enqueue(app)
    assert enqueue(app, durability="stored").created


def test_no_replica_in_time(pair: Pair, enqueue: Callable[..., Any]) -> None:
    """The job exists. The same id again creates no second one, and waits for the replicas again, as nothing else would."""
    pair.replica.pause()
    app = fastq.FastQ(pair.master.url, replication_timeout=0.1)
    with pytest.raises(fastq.NotReplicated, match=r"0 of 1 replicas confirmed it within 0\.1 s") as caught:
        enqueue(app, **REPLICATED)
    (job_id,) = caught.value.job_ids
    with pytest.raises(fastq.NotReplicated) as again:
        enqueue(app, job_id=job_id, **REPLICATED)
    assert again.value.job_ids == (job_id,)
    pair.replica.resume()
    pair.until_acknowledged()
    assert not enqueue(app, job_id=job_id, **REPLICATED).created
    with connect(pair.replica.url) as client:
        assert client.llen("fastq:{default}:ready:5") == 1


def test_many_at_a_time(pair: Pair) -> None:
    """Concurrent calls share a WAIT; other jobs do not wait behind it."""

    async def use() -> None:
        app = fastq.FastQ(pair.master.url, replication_timeout=30.0, enqueue_timeout=30.0)
        with connect(pair.master.url) as client:
            client.config_resetstat()
            await asyncio.gather(*(app.options(**REPLICATED).enqueue("task", n) for n in range(200)))
            assert client.info("commandstats")["cmdstat_wait"]["calls"] <= 5
            app_bulk = await app.options(**REPLICATED).enqueue("task", 0)
            assert app_bulk.created
            pair.replica.pause()
            slow = asyncio.create_task(app.options(**REPLICATED).enqueue("task", "slow"))
            while not client.info("clients")["blocked_clients"]:
                await asyncio.sleep(0.005)
            async with asyncio.timeout(2.0):
                for n in range(20):
                    await app.enqueue("task", n)
            assert not slow.done()
            pair.replica.resume()
            assert (await slow).created
        await app.aclose()

    asyncio.run(use())


def test_streams_of_jobs(pair: Pair) -> None:
    app = fastq.FastQ(pair.master.url, replication_timeout=0.1)

    @app.task
    async def count(n: int) -> None: ...

    async def use() -> None:
        bulk = await count.options(**REPLICATED).enqueue_many([(n,) for n in range(1_200)])
        assert bulk.created == 1_200
        with connect(pair.replica.url) as client:
            assert client.llen("fastq:{default}:ready:5") == 1_200
        pair.replica.pause()
        with pytest.raises(fastq.NotReplicated) as caught:
            await count.options(**REPLICATED).enqueue_many([(n,) for n in range(10)])
        assert len(caught.value.job_ids) == 10
        await app.aclose()

    asyncio.run(use())
    with pytest.raises(fastq.NotReplicated):
        count.options(**REPLICATED).enqueue_many_sync([(1,)])
    app.close()
    pair.replica.resume()


def test_an_unknown_durability() -> None:
    app = fastq.FastQ("redis://127.0.0.1:1/0")
    with pytest.raises(fastq.InvalidOption, match="neither 'stored' nor 'replicated'"):
        app.options(durability="fsync").enqueue_sync("task")  # type: ignore[typeddict-item]
    with pytest.raises(fastq.ConfigError):
        fastq.FastQ("redis://127.0.0.1:1/0", durability="fsync")


def kill_waiting(client: Any, killed: list[int], most: int = 2) -> bool:
    """Cut whoever waits for replicas, until so many were; whether they were."""
    for row in client.client_list():
        if row["cmd"] == "wait" and int(row["id"]) not in killed and len(killed) < most:
            killed.append(int(row["id"]))
            client.client_kill_filter(_id=row["id"])
    return len(killed) == most


def test_the_connection_is_lost_between_the_job_and_its_replicas(pair: Pair, enqueue: Callable[..., Any]) -> None:
    """WAIT over another connection says nothing of this job: the call is made again, and waited for again."""
    killed: list[int] = []
    pair.replica.pause()
    app = fastq.FastQ(pair.master.url, replication_timeout=30.0)
    with (
        connect(pair.master.url) as client,
        _thread(lambda: eventually(lambda: kill_waiting(client, killed), 20) and pair.replica.resume()),
    ):
        job = enqueue(app, **REPLICATED)
    assert len(killed) == 2
    with connect(pair.replica.url) as client:
        assert client.lrange("fastq:{default}:ready:5", 0, -1) == [job.id.encode()]


class _thread:
    def __init__(self, target: Callable[[], Any]) -> None:
        import threading

        self._thread = threading.Thread(target=target)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join()


def test_in_a_cluster(enqueue: Callable[..., Any]) -> None:
    """WAIT goes to the node of the queue."""
    with Cluster(masters=2, replicas=1) as cluster:
        app = fastq.FastQ(cluster.url, replication_timeout=0.2)
        near, far = (cluster.queue_on(server) for server in cluster.servers[:2])
        cluster.replica_of(cluster.servers[0]).pause()
        with pytest.raises(fastq.NotReplicated):
            enqueue(app, queue=near, **REPLICATED)
        assert enqueue(app, queue=far, **REPLICATED).created


# -- workflows and batches ------------------------------------------------------------------------


@pytest.fixture(params=["async", "sync"])
def begin(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Begins a workflow of two jobs either way; the handle."""

    def either(app: fastq.FastQ, **options: Any) -> Any:
        steps = [("task", (1,)), ("task", (2,))]
        if request.param == "sync":
            try:
                return app.chain_sync(steps, **options)
            finally:
                app.close()

        async def once() -> Any:
            try:
                return await app.chain(steps, **options)
            finally:
                await app.aclose()

        return asyncio.run(once())

    return either


def test_the_replica_has_a_workflow_that_was_confirmed(pair: Pair, begin: Callable[..., Any]) -> None:
    """By an option of the call or by the setting; and a call may do without."""
    with connect(pair.replica.url) as client:
        for settings, options in (({}, REPLICATED), (REPLICATED, {})):
            flow = begin(fastq.FastQ(pair.master.url, **settings), **options)
            assert client.exists(f"fastq:{{default}}:flow:{flow.id}")
            assert f"{flow.id}.0".encode() in client.lrange("fastq:{default}:ready:5", 0, -1)
    pair.replica.pause()
    assert begin(fastq.FastQ(pair.master.url, **REPLICATED), durability="stored").id
    with pytest.raises(fastq.InvalidOption, match="neither 'stored' nor 'replicated'"):
        begin(fastq.FastQ(pair.master.url), durability="fsync")


def test_a_workflow_without_a_replica_in_time(pair: Pair, begin: Callable[..., Any]) -> None:
    """It has begun, and the error says which one it is."""
    pair.replica.pause()
    app = fastq.FastQ(pair.master.url, replication_timeout=0.1)
    with pytest.raises(
        fastq.NotReplicated, match=r"the workflow, and 0 of 1 replicas confirmed it within 0\.1 s"
    ) as caught:
        begin(app, **REPLICATED)
    (flow_id,) = caught.value.job_ids
    assert app.get_workflow(flow_id).status_sync().state == "running"
    app.close()


def test_the_connection_is_lost_between_a_workflow_and_its_replicas(pair: Pair, begin: Callable[..., Any]) -> None:
    """It is begun again, which does nothing where it has begun, and waited for again."""
    killed: list[int] = []
    pair.replica.pause()
    app = fastq.FastQ(pair.master.url, replication_timeout=30.0)
    with (
        connect(pair.master.url) as client,
        _thread(lambda: eventually(lambda: kill_waiting(client, killed, 1), 20) and pair.replica.resume()),
    ):
        flow = begin(app, **REPLICATED)
    with connect(pair.replica.url) as client:
        assert client.lrange("fastq:{default}:ready:5", 0, -1) == [f"{flow.id}.0".encode()]


@pytest.mark.parametrize("blocking", [False, True])
def test_the_end_of_a_batchs_filling_is_confirmed(pair: Pair, blocking: bool) -> None:
    """A batch whose last call a failover forgot would be filled for ever. Its jobs are whole: it is not given up for this."""
    app = fastq.FastQ(pair.master.url, durability="replicated", replication_timeout=1.0)
    items, size = [(n,) for n in range(4)], 2

    def pause(result: fastq.BatchResult) -> None:
        if result.total == len(items):
            pair.replica.pause()

    async def use(progress: Any = None) -> fastq.BatchResult:
        try:
            return await app.enqueue_batch("task", items, size, progress=progress)
        finally:
            await app.aclose()

    def fill(progress: Any = None) -> fastq.BatchResult:
        return (
            app.enqueue_batch_sync("task", items, size, progress=progress) if blocking else asyncio.run(use(progress))
        )

    batch = fill()
    with connect(pair.replica.url) as client:
        assert client.hget(f"fastq:{{default}}:batch:{batch.id}", "state") == b"running"
    with pytest.raises(fastq.NotReplicated, match="the batch") as caught:
        fill(pause)
    status = app.batch(caught.value.job_ids[0], queue="default").status_sync()
    assert (status.state, status.total) == ("running", 4)
    app.close()
