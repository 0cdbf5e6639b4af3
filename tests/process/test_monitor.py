"""The monitor of a real fleet: hands back what the dead held, keeps leases, buries poison, tells the truth over HTTP."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fastq.job import culprits
from tests.conftest import MakeServer, eventually
from tests.process.fleet import PATIENCE, Fleet, free_port

MakeFleet = Callable[..., Fleet]
DEAD = "fastq:{default}:dead"


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[MakeFleet]:
    """``make_fleet(url, **settings)``: a fleet that is not started yet; its pages are on a free port."""
    with contextlib.ExitStack() as stack:

        def make(url: str, **settings: Any) -> Fleet:
            fleet = Fleet(tmp_path, url, **{"metrics_port": free_port(), **settings})
            stack.callback(fleet.close)
            return fleet

        yield make


def samples(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """An exposition as name -> sorted labels -> value, by prometheus_client's own parser."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


# -- deaths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("monitor_too", [False, True])
def test_a_killed_workers_jobs_are_handed_back(make_fleet: MakeFleet, redis_url: str, monitor_too: bool) -> None:
    """F-01: within a second, charged a delivery and no attempt; also when the monitor has to be replaced first."""
    fleet = make_fleet(redis_url, workers=2, concurrency=10).serving()
    fleet.until_logged("monitor running")
    keys = [f"k{n}" for n in range(8)]
    fleet.enqueue_many("gated", ((key, str(fleet.gate())) for key in keys))
    story = fleet.until_started(*keys)
    victim = story.starts[keys[0]][0].pid
    mine = {key for key in keys if story.starts[key][0].pid == victim}
    if monitor_too:
        fleet.kill(fleet.pids("monitor")[0])
    killed = time.monotonic()
    fleet.kill(victim)
    eventually(lambda: all(len(fleet.story().starts[key]) == 2 for key in mine), PATIENCE)
    last = max(story.starts[key][1].at for key in mine)
    assert last - killed < 1.0
    (line,) = fleet.until_logged("worker died, jobs handed back")
    assert (line["pid"], line["end"], line["ready"], line["dead"]) == (victim, "signal SIGKILL", len(mine), 0)
    assert line["rss"] > 10 << 20
    fleet.gate().touch()
    story = fleet.until_done(keys)
    assert story.repeated() == mine
    metrics = samples(fleet.get("/metrics")[1])
    assert metrics["fastq_jobs_recovered_total"][()] == len(mine)
    assert metrics["fastq_workers_died_total"][()] == 1
    assert fleet.stop() == 0


@pytest.mark.parametrize("how", ["SIGKILL", "segfault"])
def test_a_job_that_kills_its_worker_is_buried(make_fleet: MakeFleet, redis_url: str, raw: Any, how: str) -> None:
    """F-06, F-07: poison after three deaths, with signal and memory; what was only reserved beside it is not charged."""
    fleet = make_fleet(redis_url, workers=1, concurrency=1).serving()
    fleet.enqueue_many("step", ((f"quick{n}", 0.001) for n in range(200)))  # they make it reserve ahead
    poison = fleet.enqueue("deadly", "poison", how)
    good = [f"good{n}" for n in range(40)]
    fleet.enqueue_many("once", ((key, 0.0) for key in good))
    fleet.until_done(good)
    eventually(lambda: raw.zcard(DEAD) == 1, PATIENCE)
    story = fleet.story()
    (letter,) = fleet.producer.dead.list_sync("default")
    assert (letter.id, letter.reason) == (poison, "poison")
    ended = "SIGKILL" if how == "SIGKILL" else "SIGSEGV"
    assert f"signal {ended}" in letter.error_message
    assert "MiB" in letter.error_message
    assert len(story.starts["poison"]) == 3
    deaths = fleet.logged("worker died, jobs handed back")
    assert [line["started"] for line in deaths] == [[poison]] * 3
    for key in good:  # again only if it had ended a moment before its worker died, and was not settled yet
        *before, _ = [start.pid for start in story.starts[key]]
        assert set(before) <= {line["pid"] for line in deaths}
        assert len(set(before)) == len(before)
    assert raw.hlen("fastq:{default}:deliveries") == 0
    assert fleet.stop() == 0


def test_poison_does_not_take_its_neighbours_along(make_fleet: MakeFleet, redis_url: str, raw: Any) -> None:
    """F-07: jobs that run beside it are charged once at most: after the first death suspects run one at a time."""
    fleet = make_fleet(redis_url, workers=2, concurrency=20).serving()
    good = [f"good{n}" for n in range(200)]
    fleet.enqueue_many("once", ((key, 0.02) for key in good[:100]))
    poison = fleet.enqueue("deadly", "poison", "segfault")
    fleet.enqueue_many("once", ((key, 0.02) for key in good[100:]))
    fleet.until_done(good)
    eventually(lambda: raw.zcard(DEAD) == 1, PATIENCE)
    story = fleet.story()
    (letter,) = fleet.producer.dead.list_sync("default")
    assert letter.id == poison
    assert len(story.starts["poison"]) == 3
    stopped = {key: len(story.starts[key]) - len(story.ends[key]) for key in good}
    assert max(stopped.values()) <= 2, "the other repetitions are outcomes that a dead worker had not told yet"
    eventually(lambda: raw.hlen("fastq:{default}:deliveries") == 0, PATIENCE)
    assert fleet.stop() == 0


def test_whom_a_death_is_charged_to() -> None:
    """F-07: everybody who may have been it, until one of them is on its last life."""
    assert culprits(["a", "b"], [0, 0], 3) == ["a", "b"]
    assert culprits(["a", "b"], [1, 0], 3) == ["a", "b"]
    assert culprits(["a", "b", "c"], [1, 2, 0], 3) == ["b"]
    assert culprits(["a", "b"], [0, 0], 1) == ["a", "b"], "the first death is the last one"
    assert culprits([], [], 3) == []


# -- pages ------------------------------------------------------------------------------------------------------------


def test_metrics(make_fleet: MakeFleet, redis_url: str) -> None:
    """Summed over the workers, valid by the format's own parser, only for those who have the token."""
    fleet = make_fleet(redis_url, workers=2, concurrency=5, metrics_token="open sesame").serving()
    fleet.until_logged("metrics served")
    fleet.enqueue_many("once", ((f"k{n}",) for n in range(50)))
    fleet.enqueue("second_try", "again")
    fleet.enqueue("gated", "held", str(fleet.gate()))
    fleet.enqueue("once", "later", delay=3600)
    fleet.until_done(["again", *(f"k{n}" for n in range(50))])
    for wrong in ("", "Bearer", "Bearer open", "Bearer Open Sesame", "Basic open sesame", "open sesame"):
        assert fleet.get("/metrics", wrong)[0] == 401
    assert fleet.get("/metrics", "bearer open sesame")[0] == 200, "the name of a scheme has no case (RFC 9110, 11.1)"
    assert fleet.get("/readyz")[0] == fleet.get("/healthz")[0] == fleet.get("/livez")[0] == 200
    assert fleet.get("/nothing")[0] == 404

    def settled() -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        status, text = fleet.get("/metrics", "Bearer open sesame")
        assert status == 200
        found = samples(text)
        assert found["fastq_queue_depth"][("queue", "default"), ("state", "running")] == 1
        assert found["fastq_worker_slots"][(("state", "busy"),)] == 1
        return found

    found = eventually(settled, PATIENCE)

    def finished(task: str, status: str) -> float:
        return found["fastq_jobs_finished_total"][("queue", "default"), ("status", status), ("task", task)]

    assert finished("once", "success") == 50
    assert (finished("second_try", "retry"), finished("second_try", "success")) == (1, 1)
    assert found["fastq_job_duration_seconds_count"][("queue", "default"), ("task", "once")] == 50
    assert found["fastq_queue_depth"][("queue", "default"), ("state", "scheduled")] == 1
    assert found["fastq_workers"][(("state", "running"),)] == 2
    assert found["fastq_redis_up"][()] == 1
    fleet.gate().touch()
    fleet.until_done(["held"])
    assert fleet.stop() == 0


def test_pages_on_the_newer_loopback(make_fleet: MakeFleet, redis_url: str) -> None:
    fleet = make_fleet(redis_url, workers=1, metrics_host="::1").serving()
    fleet.until_logged("metrics served")
    assert fleet.get("/healthz", host="[::1]") == (200, "ok\n")
    assert fleet.stop() == 0


def test_ready_means_that_somebody_works(make_fleet: MakeFleet, make_server: MakeServer) -> None:
    """Not while everybody is quiet, nor without Redis, nor in a drain; full is ready."""
    server = make_server(appendonly=True)
    fleet = make_fleet(server.url, workers=2, concurrency=1).start(plant="look_closer")
    fleet.until_serving(2)
    fleet.until_logged("metrics served")

    def becomes(status: int, why: str) -> None:
        eventually(lambda: fleet.get("/readyz") == (status, f"{why}\n"), PATIENCE)

    becomes(200, "ok")
    fleet.send(signal.SIGTSTP)
    becomes(503, "draining")
    fleet.send(signal.SIGCONT)
    becomes(200, "ok")
    server.kill()
    down = time.monotonic()
    becomes(503, "no worker has reserved within 2.5 s")
    assert time.monotonic() - down < 2.5 + 1.0
    server.start()
    becomes(200, "ok")
    fleet.enqueue_many("gated", [("a", str(fleet.gate())), ("b", str(fleet.gate()))])
    full = fleet.until_started("a", "b").starts["b"][0].at
    eventually(lambda: fleet.get("/readyz")[0] == 503 or time.monotonic() > full + 2.6, PATIENCE)
    becomes(200, "ok")
    fleet.send(signal.SIGTERM)
    becomes(503, "draining")
    assert fleet.get("/healthz")[0] == 200
    fleet.gate().touch()
    assert fleet.wait() == 0


@pytest.mark.parametrize("words", [("supervise", "jobs:app"), ("worker", "jobs:app")])
def test_the_outside_needs_a_token(make_fleet: MakeFleet, redis_url: str, words: tuple[str, ...]) -> None:
    """An address that others can reach is refused without one: exit 2, and the message says what to set."""
    fleet = make_fleet(redis_url, workers=1, metrics_host="0.0.0.0").start(*words)
    assert fleet.wait() == 2
    assert "metrics_token (FASTQ_METRICS_TOKEN)" in fleet.said()
    assert "Traceback" not in fleet.said()
    assert "traceback" not in str(fleet.log())
    assert len(fleet.logged("monitor started")) <= 1
