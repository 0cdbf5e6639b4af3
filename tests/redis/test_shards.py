"""A scheduler and a cluster of which one node is away: the queues on the others are promoted, recovered and ticked as ever (I4)."""

from __future__ import annotations

import time

import pytest

import fastq
from fastq.broker.embedded import EmbeddedServer
from tests.conftest import eventually_async
from tests.nodes import Cluster
from tests.redis.lab import Lab
from tests.redis.test_scheduling import Rig, delayed, events

LATE = 400  # ms that a job may be late: four times what it is when all nodes are there, and far below any timeout
OFTEN = 12


@pytest.mark.parametrize("how", ["kill", "pause"])
@pytest.mark.parametrize("lost", ["the leader's lease", "the list of schedules", "neither"])
async def test_a_node_that_is_away_holds_up_no_queue_of_another(
    how: str, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed or hung, also when it holds what the whole scheduler has in common; and when it is back its queues go on."""
    with Cluster(masters=3, node_timeout=60.0, **{"cluster-require-full-coverage": "no"}) as cluster:
        away = victim(cluster, lost)
        queues = {server: cluster.queue_on(server) for server in cluster.servers}
        labs = {server: Lab(cluster.url, cluster.at(server), queue) for server, queue in queues.items()}
        living = [lab for server, lab in labs.items() if server is not away]
        app = fastq.FastQ(cluster.url)

        @app.every(0.2, name="beat", queue=living[0].q.queue)
        async def beat() -> None: ...

        rig = Rig(cluster.url, app, queues=",".join(queues.values()))
        async with rig.running():
            await eventually_async(lambda: len(living[0].ready()) >= 2, timeout=20)
            getattr(away, how)()
            late = [await lateness(lab, n) for n in range(OFTEN) for lab in living]
            ticked = rig.counted("fired")
            for lab in living:
                lab.register("h.1.x", 1)
                rig.recoverer.service.wake()
                await eventually_async(lambda lab=lab: not lab.value("workers"), timeout=5)  # type: ignore[misc]
            await eventually_async(lambda: rig.counted("fired") >= ticked + 5)
            assert rig.leadership.leading
            assert len(events(caplog, "redis unavailable, retrying")) <= 1, "told once"
            await comes_back(away, how, labs[away])
            await eventually_async(lambda: rig.link._down_since is None)
        for lab in labs.values():
            lab.conn.close()
    assert sorted(late)[len(late) // 2] <= LATE / 4, late
    assert sorted(late)[-3] <= LATE, late  # the machine itself may stand still once


def victim(cluster: Cluster, lost: str) -> EmbeddedServer:
    """The node to lose: the one with the key, or one that has neither."""
    common = {"the leader's lease": "fastq:leader", "the list of schedules": "fastq:schedules"}
    if lost in common:
        return cluster.owner(common[lost])
    return next(server for server in cluster.servers if server not in {cluster.owner(key) for key in common.values()})


async def lateness(lab: Lab, number: int) -> int:
    """How late a delayed job of this queue is promoted, in ms."""
    job = f"d{number}"
    lab.enqueue(delayed(job, 60))
    due = lab.now() + 60
    await eventually_async(lambda: job in lab.ready(), timeout=30)
    return lab.now() - due


async def comes_back(server: EmbeddedServer, how: str, lab: Lab) -> None:
    begun = time.monotonic()
    server.start() if how == "kill" else server.resume()
    await eventually_async(lambda: takes(lab, "back"), timeout=30)
    await eventually_async(lambda: "back" in lab.ready(), timeout=30)
    assert time.monotonic() - begun < 15


def takes(lab: Lab, job: str) -> bool:
    """Whether a delayed job can be enqueued: a node that comes back takes nothing until it has heard from the others."""
    try:
        return lab.enqueue(delayed(job, 50)) == []
    except fastq.BrokerUnavailable:
        return False
