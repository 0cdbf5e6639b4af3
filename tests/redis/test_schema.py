"""F-42: the version of the keys is agreed on before anything is touched; an envelope that only a newer release reads waits for one."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

import fastq
from fastq.broker import schema
from fastq.broker.commands import NewJob, enqueue
from fastq.broker.connection import SyncConnection
from fastq.broker.doctor import examine
from fastq.broker.url import parse_url
from fastq.errors import BrokerReplyError, SchemaMismatch
from fastq.job import VERSION, Envelope, Extra, JobState, encode
from tests.conftest import MakeServer, connect
from tests.nodes import Cluster
from tests.redis.workshop import Workshop, working

KEY = "fastq:schema"


@pytest.fixture
def connection(redis_url: str) -> Any:
    made = SyncConnection.to(parse_url(redis_url))
    yield made
    made.close()


def test_who_comes_first_writes_it_down(connection: SyncConnection, raw: Any) -> None:
    for _ in range(2):
        connection.run(schema.agree("fastq"))
        assert raw.get(KEY) == b"%d" % schema.SCHEMA


def test_looking_writes_nothing(connection: SyncConnection, raw: Any) -> None:
    connection.run(schema.look("fastq"))
    assert raw.dbsize() == 0


@pytest.mark.parametrize(
    ("found", "word"), [(b"2", "upgrade this one"), (b"0", "too old"), (b"9" * 5_000, "upgrade"), (b"\xff\n", "upgrade"), (b"", "upgrade")]
)  # fmt: skip
@pytest.mark.parametrize("how", [schema.agree, schema.look])
def test_an_unknown_version_is_refused_in_one_line(
    connection: SyncConnection, raw: Any, found: bytes, word: str, how: Any
) -> None:
    raw.set(KEY, found)
    with pytest.raises(SchemaMismatch, match=word) as caught:
        connection.run(how("fastq"))
    assert "'fastq'" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    assert raw.get(KEY) == found


@pytest.mark.other_user("its user may touch the keys of one prefix only")
def test_another_prefix_has_another_version(connection: SyncConnection, raw: Any) -> None:
    raw.set(KEY, 2)
    connection.run(schema.agree("other"))
    assert raw.get("other:schema") == b"%d" % schema.SCHEMA
    raw.delete("other:schema")


def test_a_release_may_know_two(connection: SyncConnection, raw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step from one version to the next: a release that knows both works with the one that is there."""
    raw.set(KEY, 1)
    monkeypatch.setattr(schema, "SCHEMA", 2)
    monkeypatch.setattr(schema, "KNOWN", (1, 2))
    connection.run(schema.agree("fastq"))
    assert raw.get(KEY) == b"1"
    monkeypatch.setattr(schema, "KNOWN", (2,))
    with pytest.raises(SchemaMismatch, match="too old"):
        connection.run(schema.agree("fastq"))


def test_a_worker_agrees_without_memory(make_server: MakeServer) -> None:
    """F-23: workers must start where Redis is full, or nothing drains it."""
    server = make_server(config={"maxmemory-policy": "noeviction"})
    with connect(server.url) as raw:
        raw.config_set("maxmemory", 1)
        connection = SyncConnection(parse_url(server.url))
        connection.run(schema.agree("fastq"))
        connection.close()
        assert raw.get(KEY) == b"%d" % schema.SCHEMA


async def test_a_worker_touches_nothing_of_a_newer_layout(redis_url: str, raw: Any) -> None:
    app = fastq.FastQ(redis_url)
    app.task(name="t")(_nothing)
    job = await app.enqueue("t")
    raw.set(KEY, 2)
    before = {key: raw.dump(key) for key in raw.scan_iter()}
    shop = Workshop(app)
    with pytest.raises(SchemaMismatch):
        await asyncio.wait_for(shop.loop.run(), 10)
    await shop.helper.close()
    assert {key: raw.dump(key) for key in raw.scan_iter()} == before
    raw.delete(KEY)
    async with working(app) as shop:
        assert (await shop.ended(job)).state is JobState.SUCCESS
    await app.aclose()


async def test_a_consumer_touches_nothing_of_a_newer_layout(redis_url: str, raw: Any) -> None:
    raw.set(KEY, 2)
    app = fastq.FastQ(redis_url)
    async with app.consume("default") as consumer:
        with pytest.raises(SchemaMismatch):
            await anext(consumer)
    await app.aclose()
    assert raw.keys() == [KEY.encode()]


def test_the_doctor_names_it(connection: SyncConnection, raw: Any) -> None:
    raw.set(KEY, 2)
    (finding,) = (each for each in connection.run(examine("fastq", connection.endpoint)) if each.name == "schema")
    assert finding.level == "fault"
    assert "upgrade" in finding.fix
    raw.delete(KEY)
    raw.rpush(KEY, "x")
    with pytest.raises(BrokerReplyError, match="WRONGTYPE"):
        connection.run(schema.agree("fastq"))
    raw.delete(KEY)


# -- producers --------------------------------------------------------------------------------------------------


def dumped(raw: Any) -> dict[bytes, bytes]:
    return {key: raw.dump(key) for key in raw.scan_iter()}


async def refused(app: fastq.FastQ) -> None:
    """Whichever way a job takes, it is refused at once, and with the reason."""
    begun = time.monotonic()
    with pytest.raises(SchemaMismatch, match="upgrade this one"):
        await app.enqueue("t")
    with pytest.raises(SchemaMismatch, match="upgrade this one"):
        await app.tasks["t"].enqueue_many([(1,), (2,)])
    with pytest.raises(SchemaMismatch, match="upgrade this one"):
        app.enqueue_sync("t")
    with pytest.raises(SchemaMismatch, match="upgrade this one"):
        await app.options(durability="replicated").enqueue("t")
    assert time.monotonic() - begun < app.settings.enqueue_timeout, "nobody waits for what will not be"


async def test_a_producer_touches_nothing_of_a_newer_layout(redis_url: str, raw: Any) -> None:
    """F-42: an old release that only enqueues would write where nobody looks, or over what it does not know."""
    raw.set(KEY, 2)
    before = dumped(raw)
    app = fastq.FastQ(redis_url)
    app.task(name="t")(_nothing)
    await refused(app)
    assert dumped(raw) == before
    raw.set(KEY, 1)
    assert (await app.enqueue("t")).created
    assert app.enqueue_sync("t").created
    await app.aclose()
    app.close()


async def test_a_producer_that_was_connected_asks_again(redis_url: str, raw: Any) -> None:
    """The others were upgraded while it lived: each new connection asks, no job does."""
    app = fastq.FastQ(redis_url)
    app.task(name="t")(_nothing)
    raw.config_resetstat()
    for _ in range(50):
        await app.enqueue("t")
    assert raw.info("commandstats")["cmdstat_get"]["calls"] == 1
    raw.flushall()
    raw.set(KEY, 2)
    raw.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    before = dumped(raw)
    await refused(app)
    assert dumped(raw) == before
    raw.flushall()
    raw.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await app.enqueue("t")
    assert raw.get(KEY) is None, "a producer only asks: it is for those who know the layout to write it down"
    await app.aclose()
    app.close()


async def test_who_may_not_ask_is_not_refused(make_server: MakeServer) -> None:
    """An ACL of before, without that key, is no reason to take no jobs."""
    server = make_server(port=0)
    rules = (b"~fastq:{*", b"~fastq:queues", b"+@all")
    assert server.ask(b"ACL", b"SETUSER", b"app", b"on", b">pw", *rules) == b"+OK\r\n"
    app = fastq.FastQ(f"redis://app:pw@127.0.0.1:{server.port}/0")
    app.task(name="t")(_nothing)
    assert (await app.enqueue("t")).created
    await app.aclose()


async def test_a_producer_on_a_cluster_asks_too() -> None:
    """The version lies on one of its nodes, the queue mostly on another one."""
    with Cluster(masters=2) as cluster:
        owner = cluster.owner(KEY)
        (other,) = (server for server in cluster.servers if server.port != owner.port)
        app = fastq.FastQ(cluster.url)
        for server in (owner, other):
            app.task(name=f"t{server.port}", queue=cluster.queue_on(server))(_nothing)
        cluster.at(owner).set(KEY, 2)
        for server in (owner, other):
            with pytest.raises(SchemaMismatch, match="upgrade"):
                await app.enqueue(f"t{server.port}")
            with pytest.raises(SchemaMismatch, match="upgrade"):
                app.enqueue_sync(f"t{server.port}")
        assert (cluster.at(owner).dbsize(), cluster.at(other).dbsize()) == (1, 0)
        cluster.at(owner).set(KEY, 1)
        for server in (owner, other):
            assert (await app.enqueue(f"t{server.port}")).created
            assert app.enqueue_sync(f"t{server.port}").created
        await app.aclose()
        app.close()


# -- envelopes ------------------------------------------------------------------------------------------------


async def _nothing(number: int = 0) -> None:
    """A handler."""


def newer(enqueued_at: int, extra: Extra | None = None) -> bytes:
    """What a release of next year writes: a version more, a field at the end, and one among the rare ones."""
    fields = [
        5,
        VERSION + 1,
        "t",
        b"\x90",
        enqueued_at,
        0,
        {"zz": 7, **({"d": extra.due_at} if extra else {})},
        "field",
    ]
    return encode(fields)


def stored(app: fastq.FastQ, **jobs: bytes) -> None:
    connection = SyncConnection.to(app.endpoint())
    connection.call(
        enqueue(app.keys("default"), 5, "p", connection.clock.now_us(), [NewJob(i, e) for i, e in jobs.items()])
    )
    connection.close()


async def test_a_newer_releases_job_waits_for_it_unchanged(redis_url: str, raw: Any) -> None:
    """Not one byte of it is changed: what an old release does not know must not get lost on its way through it."""
    app = fastq.FastQ(redis_url)
    app.task(name="t")(_nothing)
    now = int(time.time() * 1_000)
    fresh, late, never = newer(now), newer(0), newer(2**62)
    waited = newer(0, Extra(due_at=now))
    stored(app, fresh=fresh, late=late, never=never, waited=waited)
    async with working(app) as shop:
        other = await app.enqueue("t")
        assert (await shop.ended(other)).state is JobState.SUCCESS, "its neighbours run"
        letters = {letter.id: letter.reason for letter in await app.dead.list()}
    assert letters == {"late": "undecodable", "never": "undecodable"}, "ten minutes are over since it was enqueued"
    assert set(raw.zrange("fastq:{default}:due", 0, -1)) == {b"fresh", b"waited"}
    assert raw.hget("fastq:{default}:jobs", "fresh") == fresh
    assert raw.hget("fastq:{default}:jobs", "waited") == waited
    await app.aclose()


async def test_a_consumer_lets_it_wait_too(redis_url: str, raw: Any) -> None:
    app = fastq.FastQ(redis_url)
    now = int(time.time() * 1_000)
    fresh = newer(now)
    stored(app, fresh=fresh, late=newer(0), good=encode(Envelope(5, 1, "t", b"\x90", now)))
    async with app.consume("default") as consumer:
        message = await anext(consumer)
        assert message.id == "good"
        await message.ack()
    assert [letter.id for letter in await app.dead.list()] == ["late"]
    assert raw.hget("fastq:{default}:jobs", "fresh") == fresh
    assert raw.zrange("fastq:{default}:due", 0, -1) == [b"fresh"]
    await app.aclose()


async def test_any_number_of_strays_is_a_number(redis_url: str) -> None:
    """F-40: a foreign producer's count of tries must not keep a worker busy for ever."""
    app = fastq.FastQ(redis_url)
    app.task(name="t")(_nothing)
    now = int(time.time() * 1_000)
    stored(
        app,
        many=encode(Envelope(5, 1, "unknown", b"\x90", now, 0, Extra(strays=2**62))),
        few=encode(Envelope(5, 1, "unknown", b"\x90", now, 0, Extra(strays=-(2**62)))),
    )
    async with working(app) as shop:
        job = await app.enqueue("t")
        assert (await shop.ended(job)).state is JobState.SUCCESS
        assert [letter.id for letter in await app.dead.list()] == ["many"]
    await app.aclose()
