"""Redis is killed, comes back empty, or forgets its scripts, all under load (F-17, F-18, F-25)."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from fastq.broker import connection, enqueuer
from tests.chaos.load import Load
from tests.conftest import MakeServer, connect, eventually
from tests.process.fleet import LEASE, PATIENCE, Fleet, percentile
from tests.sound import assert_sound

MakeFleet = Callable[..., Fleet]
Figure = Callable[[str], None]


def test_redis_is_killed_and_comes_back(make_fleet: MakeFleet, make_server: MakeServer, figure: Figure) -> None:
    """F-17: with an append-only file every confirmed job is done, once; nobody exits; work resumes by itself."""
    server = make_server(appendonly=True, config={"appendfsync": "everysec"})
    fleet = make_fleet(server.url, workers=2, concurrency=10).serving()
    ready: list[float] = []
    with Load(server.url) as load:
        for _ in range(5):
            eventually(load.more(200), PATIENCE)
            server.kill()
            server.start()
            ready.append(time.monotonic())
        eventually(load.more(200), PATIENCE)
    story = fleet.until_done(load.confirmed)
    starts = [event.at for event in story.of("s")]
    resumed = sorted(min(at for at in starts if at > since) - since for since in ready)
    figure(
        f"{len(load.confirmed)} jobs confirmed and done over {len(ready)} kills, {len(load.refused)} refused, "
        f"{len(story.repeated())} run twice; first job after Redis was back p50 {percentile(resumed, 0.5):.3f} s, "
        f"max {resumed[-1]:.3f} s"
    )
    assert resumed[-1] <= 2.0
    assert_sound(server.url)
    assert story.repeated() == set()
    assert fleet.logged("worker exited") == fleet.logged("scheduler exited") == fleet.logged("monitor exited") == []
    assert fleet.stop() == 0


def test_redis_is_away_for_longer_than_a_lease(make_fleet: MakeFleet, make_server: MakeServer) -> None:
    """F-32: when it is back, nobody takes the jobs of workers that could not extend their leases meanwhile."""
    server = make_server(appendonly=True)
    fleet = make_fleet(server.url, workers=2, concurrency=10).serving()
    keys = [f"k{n}" for n in range(10)]
    fleet.enqueue_many("gated", ((key, str(fleet.gate())) for key in keys))
    fleet.until_started(*keys)
    fleet.until_logged("scheduler leads")
    server.kill()
    down = time.monotonic()
    eventually(lambda: time.monotonic() > down + 2 * LEASE, PATIENCE)
    server.start()
    fleet.until_logged("redis is back", logger="fastq.monitor")
    fleet.enqueue("step", "later", delay=LEASE)
    fleet.until_done(["later"])  # by then the scheduler has looked for lost leases
    fleet.gate().touch()
    story = fleet.until_done(keys)
    assert story.repeated() == set()
    assert not fleet.logged("worker lost its lease")
    assert fleet.stop() == 0


def test_redis_comes_back_empty(make_fleet: MakeFleet, make_server: MakeServer) -> None:
    """F-18: nobody exits, everybody registers again and says loudly what was lost."""
    server = make_server()
    fleet = make_fleet(server.url, workers=2).serving()
    fleet.enqueue("gated", "before", str(fleet.gate()))
    fleet.until_started("before")
    server.kill()
    server.start()
    fleet.until_logged("worker lost its lease", 2)
    fleet.until_logged("worker ready", 4)
    fleet.enqueue_many("once", [("after",), ("later",)])
    fleet.until_done(["after", "later"])
    assert fleet.until_logged("lease lost")[0]["task"] == "gated"
    fleet.enqueue("once", "due", delay=0.1)
    fleet.until_done(["due"])
    assert fleet.logged("worker exited") == fleet.logged("scheduler exited") == fleet.logged("monitor exited") == []
    assert fleet.stop() == 0


def test_scripts_are_flushed_under_load(make_fleet: MakeFleet, make_server: MakeServer, figure: Figure) -> None:
    """F-25: NOSCRIPT is nobody's business: every job is confirmed and done exactly once."""
    server = make_server(appendonly=True)
    fleet = make_fleet(server.url, workers=2, concurrency=10).serving()
    with connect(server.url) as client, Load(server.url) as load:
        for _ in range(20):
            eventually(load.more(50), PATIENCE)
            client.script_flush()
        eventually(load.more(50), PATIENCE)
    story = fleet.until_done(load.confirmed)
    figure(f"{len(load.confirmed)} jobs over 20 flushes")
    assert load.refused == []
    assert story.repeated() == set()
    told = [line["event"] for line in fleet.log() if line["level"] in ("warning", "error")]
    assert set(told) <= {"running as root"}
    assert fleet.stop() == 0


def test_a_worker_that_ends_without_redis_is_found(make_fleet: MakeFleet, make_server: MakeServer) -> None:
    """The planted bug `gives_up`: what the tests above ask of the log is there to be found."""
    server = make_server(appendonly=True)
    fleet = make_fleet(server.url, workers=1).serving(plant="gives_up")
    server.kill()
    fleet.until_logged("worker exited")
    server.start()


def test_who_does_not_send_the_text_of_a_script_is_found(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug of F-25: NOSCRIPT is taken for the end."""
    server = make_server()
    for module in (connection, enqueuer):
        monkeypatch.setattr(module, "is_noscript", lambda reply: False)
    with connect(server.url) as client, Load(server.url) as load:
        client.script_flush()
        eventually(lambda: len(load.refused) > 1, PATIENCE)
