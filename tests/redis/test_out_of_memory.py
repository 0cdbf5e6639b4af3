"""F-23: Redis has reached maxmemory (noeviction). No new jobs, but everything that is there goes on and drains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fastq.broker import commands, timing
from fastq.broker.commands import NewJob, Recovered
from fastq.broker.connection import AsyncConnection
from fastq.broker.keys import GlobalKeys
from fastq.broker.pauses import Pause, suspend_queue, suspend_task
from fastq.broker.url import parse_url
from fastq.errors import BrokerOutOfMemory, QueueFull
from tests.conftest import MakeServer, connect
from tests.redis.lab import FAR, LEASE, Lab, envelope, texts

E = envelope()
LARGE = envelope(tag="x" * 10_000)


@pytest.fixture
def full(make_server: MakeServer) -> Iterator[Lab]:
    """A queue that was filled until Redis refused; a worker holds five of its jobs, two are due, one is dead."""
    server = make_server(config={"maxmemory-policy": "noeviction"})
    with connect(server.url) as raw:
        lab = Lab(server.url, raw)
        lab.take("dead", *(f"held{i}" for i in range(5)))
        lab.settle(failed=[("dead", E, b"error")])
        lab.enqueue("pending", NewJob("due1", E, FAR), NewJob("due2", E, FAR))
        raw.zadd(lab.q.due, {"due1": 1, "due2": 2})
        raw.config_set("maxmemory", raw.info("memory")["used_memory"] + 500_000)
        with pytest.raises(BrokerOutOfMemory):
            for i in range(1_000):
                lab.enqueue(NewJob(f"filler{i}", LARGE))
        assert i > 10
        raw.config_set("maxmemory", raw.info("memory")["used_memory"] - 100_000)  # buffers come and go
        yield lab
        lab.conn.close()


def test_enqueue_is_refused_with_its_own_error_and_leaves_nothing(full: Lab) -> None:
    before = full.keys()
    for job in (NewJob("new", E), NewJob("new", E, FAR), NewJob("new", E, unique="k")):
        with pytest.raises(QueueFull, match="maxmemory") as caught:
            full.enqueue(job)
        assert type(caught.value) is BrokerOutOfMemory
        assert full.raw.connection_pool  # the connection is as good as before
    assert full.keys() == before


async def test_the_asynchronous_mover_says_the_same(full: Lab) -> None:
    connection = AsyncConnection(parse_url(full.url))
    with pytest.raises(BrokerOutOfMemory):
        await connection.call(full.enqueue_command(NewJob("new", E)))
    assert connection.connects == 1
    await connection.close()


def test_a_refused_call_may_be_repeated_with_the_same_number(full: Lab) -> None:
    """It has not run: the number is still free when there is room again."""
    command = full.enqueue_command(NewJob("new", E), sequence=1_000_000)
    with pytest.raises(BrokerOutOfMemory):
        full.call(command)
    full.raw.config_set("maxmemory", 0)
    assert full.call(command) == []
    assert "new" in full.jobs()


def test_what_makes_new_jobs_is_refused(full: Lab) -> None:
    with pytest.raises(BrokerOutOfMemory):
        full.call(timing.fire(full.q, 5, "nightly", 1_000, "tick", E, b"definition"))
    with pytest.raises(BrokerOutOfMemory):
        full.call(timing.schedule(full.q, "nightly", b"", b"definition", begin=True, most=9))
    assert full.value("ticks") is None
    with pytest.raises(BrokerOutOfMemory):
        full.call(commands.replay(full.q, [("dead", E)]))
    assert [i for i, _ in full.value("dead")] == ["dead"]


def test_workers_go_on(full: Lab) -> None:
    full.register("another")
    reserved = full.reserve(1)
    assert reserved.ids == [b"pending"]
    assert full.call(commands.resume(full.q, "w")).held == 6
    settled = full.settle(
        succeeded=["held0"],
        recorded=[("60000:1", full.started + FAR, "held1", b"record")],
        later=[("held2", FAR, E)],
        failed=[("held3", E, b"error")],
        released=["held4"],
    )
    assert settled == (1, [])
    assert full.call(commands.extend(full.q, LEASE, ["w", "another"])) == [True, True]


def test_recovery_goes_on(full: Lab) -> None:
    """Also burying: a poison job must not keep killing workers because Redis is full."""
    assert full.recover(charge="started", started=["held0"], max_deliveries=1) == Recovered(4, 1, 0)
    assert sorted(i for i, _ in full.value("dead")) == ["dead", "held0"]


def test_the_scheduler_goes_on(full: Lab) -> None:
    assert full.call(commands.promote(full.q)).moved == 2
    assert {"due1", "due2"} <= set(full.ready())
    assert full.call(commands.lead(GlobalKeys("fastq"), "s", LEASE))
    assert full.call(commands.prune(full.q, LEASE)).buckets == 0
    assert full.call(commands.clamp(full.q, [("w", 1)])) == 1


def test_operators_go_on(full: Lab) -> None:
    assert full.call(commands.status(full.q, "held0", ["w"]))[0] == b"running"
    assert full.call(commands.cancel(full.q, "pending", ["w"], b"record", 60_000)) == "cancelled"
    assert full.call(commands.cancel(full.q, "held0", ["w"], b"record", 60_000)) == "requested"
    assert full.call(commands.cancel(full.q, "due1", ["w"], b"", 0)) == "cancelled"
    assert full.call(commands.discard(full.q, ids=["dead"])) == 1
    assert full.call(suspend_queue(full.q))
    assert full.call(suspend_task(full.q, Pause("t")))
    assert full.call(commands.purge(full.q))[0] > 3


def test_everybody_is_heard(full: Lab) -> None:
    """A worker that starts now is the one that drains; schedulers learn of a schedule that is removed."""
    known = GlobalKeys("fastq")
    assert full.call(commands.register(full.q, "new", LEASE, b"card")) > 0
    assert full.call(commands.announce(known.queues, full.q.queue, "other")) == 2
    assert full.call(timing.revise(known.schedules, full.q.queue)) == 1
    assert texts(full.reserve(1, worker="new").ids)


def test_a_queue_that_drains_takes_jobs_again(full: Lab) -> None:
    while ids := texts(full.reserve(100).ids):
        full.settle(succeeded=ids)
    assert full.enqueue(NewJob("new", LARGE)) == []


def test_every_script_says_what_it_does_without_memory() -> None:
    """A new script has to decide: `allow-oom`, or it makes new jobs (or what will make them)."""
    from fastq.broker import scripts

    heads: dict[str, Any] = {name: scripts.expand(name).partition("\n")[0] for name in scripts.names()}
    assert {name for name, head in heads.items() if head == "#!lua"} == {
        "batch_call",
        "batch_open",
        "enqueue",
        "enqueue_once",
        "enqueue_plain",
        "fire",
        "flow_add",
        "flow_grow",
        "flow_retry",
        "flow_spawn",
        "flow_start",
        "replay",
        "schedule",
        "tag",
    }
    assert all(head.startswith("#!lua") for head in heads.values())
