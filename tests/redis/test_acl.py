"""The ACL user of docs/security.md: enough for everything that fastq does, and for nothing else (A-01, A-08)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import fastq
from fastq.broker import checker, doctor
from fastq.broker.command import raw
from fastq.broker.connection import SyncConnection
from fastq.broker.fence import FencedConnection
from fastq.broker.inspector import Inspector
from fastq.broker.url import parse_url
from fastq.errors import BrokerReplyError
from tests.conftest import MakeServer, acl_rules, eventually_async
from tests.nodes import Cluster
from tests.redis.workshop import working

USER = (b"ACL", b"SETUSER", b"fastq", b"on", b">s3cret")


@pytest.fixture
def url(make_server: MakeServer) -> str:
    """A server on which the documented user is the only one that may do anything."""
    server = make_server(port=0, appendonly=True)
    assert server.ask(*USER, *acl_rules()) == b"+OK\r\n"
    return f"redis://fastq:s3cret@127.0.0.1:{server.port}/0"


@pytest.fixture(params=["one server", "cluster"])
def either(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same, or a cluster with that user on every node."""
    if request.param == "one server":
        yield request.getfixturevalue("url")
        return
    with Cluster(masters=2, appendonly="yes") as cluster:
        assert [server.ask(*USER, *acl_rules()) for server in cluster.servers] == [b"+OK\r\n"] * 2
        yield cluster.url.replace("://", "://fastq:s3cret@")


async def test_producers_and_a_worker(either: str) -> None:
    """Results with their message, retries, delays, unique jobs, steps, progress, limits, dead letters: under that user."""
    app = fastq.FastQ(either)

    @app.task(max_attempts=2, retry=0, unique=True)
    async def work(number: int, job: fastq.JobContext) -> int:
        if job.attempt == 1:
            raise ValueError("once more")
        return int(await job.once("step", lambda: number))

    @app.task(rate_limit="1000/s", max_attempts=1)
    async def limited() -> None:
        raise ValueError("no")

    async with working(app) as shop:
        jobs = [await work.enqueue(n) for n in range(5)]
        late = await work.options(delay=0.01).enqueue(99)
        dead = await limited.enqueue()
        for job in (*jobs, late):
            ended = await shop.ended(job)
            assert ended is not None
            assert ended.state == "success"
        status = await shop.ended(dead)
        assert status is not None
        assert status.state == "failed"
        assert await shop.extend()
        assert await jobs[0].result(timeout=5) == 0


def test_operators(either: str) -> None:
    connection = SyncConnection.to(parse_url(either))
    inspector = Inspector("fastq")
    app = fastq.FastQ(either)
    job_id = app.enqueue_sync("nobody").id
    app.close()
    assert connection.run(inspector.cancel(job_id)) == "cancelled"
    assert [info.name for info in connection.run(inspector.overview())] == ["default"]
    assert connection.run(inspector.pause("default"))
    assert connection.run(inspector.purge("default")) == 0
    assert connection.run(checker.check("fastq", repair=True)).faults == []
    findings = connection.run(doctor.examine("fastq", connection.endpoint))
    assert {finding.name for finding in findings if finding.level == "fault"} <= {"queues", "scheduler", "workers"}
    assert "permissions" in {finding.name for finding in findings if finding.level == "ok"}
    connection.close()


async def test_a_lost_connection_can_be_ended(url: str, caplog: pytest.LogCaptureFixture) -> None:
    connection = FencedConnection(parse_url(url))
    await connection.connect()
    before: Any = connection._before
    connection.drop()
    await connection.connect()
    await eventually_async(lambda: connection.connected)
    assert connection._before not in (None, before)
    assert not caplog.records
    await connection.close()


@pytest.mark.parametrize(
    "words",
    [("FLUSHALL",), ("KEYS", "*"), ("CONFIG", "GET", "*"), ("SET", "other", "1"), ("GET", "other:{q}:jobs"), ("SHUTDOWN",),
     ("PUBLISH", "other", "1"), ("BGREWRITEAOF",), ("ACL", "LIST"), ("EVAL", "return redis.call('GET', 'other')", "0")],
    ids=" ".join,
)  # fmt: skip
def test_nothing_else(url: str, words: tuple[str, ...]) -> None:
    connection = SyncConnection.to(parse_url(url))
    with pytest.raises(BrokerReplyError, match=r"(?i)noperm|permission|ACL|can't access"):
        connection.call(raw(*words))
    connection.close()
