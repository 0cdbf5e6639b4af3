"""The network loses replies, or goes silent without a word (F-30, F-33, F-37)."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastq
from fastq.broker.embedded import EmbeddedServer
from fastq.worker.waker import IDLE_WAIT
from tests.chaos.proxy import HOLD, PASS, FaultProxy, every_other
from tests.conftest import eventually
from tests.process.fleet import LEASE, PATIENCE, Fleet, held_by

MakeFleet = Callable[..., Fleet]
Figure = Callable[[str], None]

LOST = 200  # replies of each script


@pytest.fixture
def proxy(redis_server: EmbeddedServer, redis_url: str) -> Iterator[FaultProxy]:
    with FaultProxy(redis_server.url) as proxy:
        yield proxy


async def confirm(url: str, keys: Iterator[str], enough: Callable[[], bool]) -> list[str]:
    """Enqueue with several calls at a time until enough is lost; the keys, all of which were confirmed."""
    app = fastq.FastQ(url, enqueue_timeout=PATIENCE)
    confirmed: list[str] = []

    async def lane() -> None:
        while not enough():
            key = next(keys)
            assert (await app.enqueue("once", key)).created
            confirmed.append(key)

    await asyncio.gather(*(lane() for _ in range(4)))
    await app.aclose()
    return confirmed


def test_lost_replies_to_enqueue(
    make_fleet: MakeFleet, redis_url: str, raw: Any, proxy: FaultProxy, figure: Figure
) -> None:
    """F-37: what was stored is known to be stored: one job per call, with the reply lost for every second one."""
    fleet = make_fleet(redis_url, workers=2).serving()
    proxy.rule = every_other(proxy, enqueue=LOST, announce=20)
    keys = (f"k{n}" for n in range(10**6))
    confirmed = asyncio.run(confirm(proxy.url, keys, lambda: proxy.dropped["enqueue"] >= LOST // 2))
    app = fastq.FastQ(proxy.url, enqueue_timeout=PATIENCE)
    while proxy.dropped["enqueue"] < LOST:
        confirmed.append(next(keys))
        app.enqueue_sync("once", confirmed[-1])
    app.close()
    story = fleet.until_done(confirmed)
    figure(f"{proxy.dropped['enqueue']} replies lost, {len(confirmed)} jobs enqueued, {len(story.done)} done")
    assert story.done == set(confirmed)
    assert story.repeated() == set()
    assert fleet.stop() == 0


def test_lost_replies_to_reserve_and_settle(
    make_fleet: MakeFleet, redis_url: str, raw: Any, proxy: FaultProxy, figure: Figure
) -> None:
    """F-33: jobs whose reserve was not heard of run, jobs whose settle was not heard of do not run again."""
    fleet = make_fleet(proxy.url, workers=4, concurrency=2).serving()
    fleet.url = redis_url
    proxy.rule = every_other(proxy, reserve=LOST, settle=LOST)
    keys: list[str] = []
    began = time.monotonic()
    while min(proxy.dropped["reserve"], proxy.dropped["settle"]) < LOST:
        more = [f"k{len(keys) + n}" for n in range(200)]
        fleet.enqueue_many("once", ((key,) for key in more))
        keys += more
        story = fleet.until_done(more)
    figure(f"lost: {dict(proxy.dropped)} of {dict(proxy.seen)}; {len(keys)} jobs in {time.monotonic() - began:.1f} s")
    assert story.repeated() == set()
    assert fleet.stop() == 0
    assert raw.keys("*:running:*") == []


def test_a_worker_that_forgets_lost_replies_is_found(
    make_fleet: MakeFleet, redis_url: str, raw: Any, proxy: FaultProxy
) -> None:
    """The analysis of F-33 turns red when a worker does not ask what it holds after a lost connection."""
    fleet = make_fleet(proxy.url, workers=2, concurrency=2).serving(plant="forgets_lost_replies")
    fleet.url = redis_url
    proxy.rule = every_other(proxy, reserve=5, settle=5)
    keys = [f"k{n}" for n in range(200)]
    fleet.enqueue_many("once", ((key,) for key in keys))
    eventually(lambda: min(proxy.dropped["reserve"], proxy.dropped["settle"]) >= 5, PATIENCE)
    with pytest.raises(AssertionError):
        fleet.until_done(keys, LEASE)


def test_half_open_connections(make_fleet: MakeFleet, redis_url: str, proxy: FaultProxy, figure: Figure) -> None:
    """F-30: nobody says that the other end is gone; it is noticed, and the work goes on with nothing run twice."""
    fleet = make_fleet(proxy.url, workers=2, response_timeout=LEASE, lease=2 * LEASE).serving()
    fleet.url = redis_url
    keys = [f"k{n}" for n in range(10)]
    fleet.enqueue_many("gated", ((key, str(fleet.gate())) for key in keys))
    fleet.until_started(*keys)
    silent = time.monotonic()
    assert proxy.silence() >= 4
    fleet.gate().touch()
    fleet.enqueue("once", "after")
    story = fleet.until_done([*keys, "after"])
    figure(f"silence at 0, next job started after {story.starts['after'][0].at - silent:.3f} s")
    # Its token may have gone to a worker that only waits: the pop may last so long, and then its silence has to be noticed.
    assert story.starts["after"][0].at - silent <= IDLE_WAIT + 1.25 * LEASE + 1.0
    assert story.repeated() == set()
    assert fleet.logged("worker exited") == fleet.logged("worker lost its lease") == []
    assert fleet.stop() == 0


def test_a_slow_redis(make_fleet: MakeFleet, redis_url: str, proxy: FaultProxy, figure: Figure) -> None:
    """F-31: every reply 200 ms late, for longer than two leases: fewer jobs a second, none of them twice, no lease is lost."""
    fleet = make_fleet(proxy.url, workers=2, lease=2 * LEASE).serving()
    fleet.url = redis_url
    proxy.delay = 0.2
    begun = time.monotonic()
    long = [f"long{n}" for n in range(6)]
    fleet.enqueue_many("gated", ((key, str(fleet.gate())) for key in long))
    keys = [f"k{n}" for n in range(100)]
    fleet.enqueue_many("once", ((key, 0.01) for key in keys))
    fleet.until_done(keys)
    eventually(lambda: time.monotonic() > begun + 4 * LEASE, PATIENCE)
    fleet.gate().touch()
    story = fleet.until_done([*keys, *long])
    last = max(event.at for key in keys for event in story.ends[key])
    figure(f"replies 200 ms late: {len(keys)} jobs of 10 ms on 20 slots in {last - begun:.1f} s, 0 run twice")
    assert story.repeated() == set()
    assert fleet.logged("worker exited") == fleet.logged("worker lost its lease") == []
    assert fleet.logged("outcomes dropped, lease lost") == []
    assert fleet.stop() == 0


def test_a_reserve_that_is_answered_after_sigterm(
    make_fleet: MakeFleet, redis_url: str, raw: Any, proxy: FaultProxy
) -> None:
    """F-11: jobs that arrive when the worker has been told to go are not begun; they go back untouched."""
    fleet = make_fleet(proxy.url, workers=1).serving()
    fleet.url = redis_url
    (worker,) = fleet.workers()
    proxy.rule = lambda names: HOLD if "reserve" in names else PASS
    eventually(lambda: proxy.held, PATIENCE)  # the reserve behind the next blocking pop
    fleet.enqueue_many("gated", ((f"k{n}", str(fleet.gate())) for n in range(5)))
    eventually(lambda: len(held_by(raw, worker)) == 5, PATIENCE)
    fleet.send(signal.SIGTERM)
    fleet.until_logged("worker drains")
    proxy.release()
    assert fleet.wait() == 0
    assert not fleet.story().starts
    assert raw.llen("fastq:{default}:ready:5") == 5
    assert fleet.logged("stopped")[0]["killed"] == 0


def test_a_lease_that_nobody_extends_is_found(make_fleet: MakeFleet, redis_url: str, proxy: FaultProxy) -> None:
    """The planted bug `never_extends`: the analysis of F-31 sees that a lease is lost, and jobs run twice."""
    fleet = make_fleet(proxy.url, workers=1, lease=2 * LEASE).serving(plant="never_extends")
    fleet.url = redis_url
    proxy.delay = 0.2
    fleet.enqueue("gated", "long", str(fleet.gate()))
    fleet.until_started("long")
    fleet.until_logged("worker lost its lease")
    eventually(lambda: fleet.story().repeated() == {"long"}, PATIENCE)
    fleet.gate().touch()


def test_a_connection_whose_silence_nobody_hears_is_found(
    make_fleet: MakeFleet, redis_url: str, proxy: FaultProxy
) -> None:
    """The planted bug `deaf`: the analysis of F-30 sees that the work does not go on in time."""
    fleet = make_fleet(proxy.url, workers=1, response_timeout=0.5, lease=2 * LEASE).serving(plant="deaf")
    fleet.url = redis_url
    fleet.enqueue("step", "before")
    fleet.until_done(["before"])
    assert proxy.silence() >= 2
    fleet.enqueue("once", "after")
    with pytest.raises(AssertionError, match="not true within"):
        fleet.until_done(["after"], IDLE_WAIT + 1.25 * 0.5 + 1.0)
