"""Worker processes with real forks and signals: drain, quiet, roll, recycle, hang, and what they say meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastq
from fastq.broker.inspector import Inspector
from tests.conftest import MakeServer, alive, connect, eventually
from tests.process.fleet import LEASE, PATIENCE, Fleet, free_port, held_by

MakeFleet = Callable[..., Fleet]
READY = "fastq:{default}:ready:5"


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[MakeFleet]:
    """``make_fleet(url, **settings)``: a fleet that is not started yet."""
    with contextlib.ExitStack() as stack:

        def make(url: str, **settings: Any) -> Fleet:
            fleet = Fleet(tmp_path, url, **settings)
            stack.callback(fleet.close)
            return fleet

        yield make


# -- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [3, 10])
def test_sigterm_lets_running_jobs_finish_within_the_grace(
    make_fleet: MakeFleet, redis_url: str, raw: Any, concurrency: int
) -> None:
    """F-11: async and threaded handlers end in peace; nothing new begins; exit 0. With and without free slots."""
    fleet = make_fleet(redis_url, workers=1, concurrency=concurrency).serving()
    running = ["async", "thread", "obedient"]
    for key, task in zip(running, ["gated", "gated_thread", "obedient_thread"], strict=True):
        fleet.enqueue(task, key, str(fleet.gate()))
    fleet.until_started(*running)
    if concurrency == 3:
        fleet.enqueue_many("once", [("new1",), ("new2",)])
    fleet.send(signal.SIGTERM)
    assert fleet.until_logged("worker drains")[0]["running"] == 3
    fleet.gate().touch()
    asked = time.monotonic()
    assert fleet.wait() == 0
    assert time.monotonic() - asked < 2.0, "it waits for nothing else"
    story = fleet.story()
    assert story.done == set(running)
    assert story.starts.keys() == set(running)
    assert raw.llen(READY) == (2 if concurrency == 3 else 0)
    assert fleet.logged("stopped")[0]["killed"] == 0


def test_sigterm_interrupts_what_outlasts_the_grace(make_fleet: MakeFleet, redis_url: str) -> None:
    """F-11: interrupted and handed back without an attempt charged (these tasks have one), exit 0; the next fleet runs them."""
    fleet = make_fleet(redis_url, workers=1, grace=LEASE / 2).serving()
    tasks = {"async": "gated", "thread": "gated_thread", "obedient": "obedient_thread"}
    for key, task in tasks.items():
        fleet.enqueue(task, key, str(fleet.gate()))
    fleet.until_started(*tasks)
    asked = time.monotonic()
    assert fleet.stop() == 0
    took = time.monotonic() - asked
    assert LEASE / 2 <= took < LEASE / 2 + 1.0
    assert {event.key for event in fleet.story().of("c")} >= {"async"}
    assert fleet.logged("stopped")[0]["killed"] == 0
    fleet.gate().touch()
    fleet.serving()
    story = fleet.until_done(tasks)
    assert {len(story.starts[key]) for key in tasks} == {2}
    assert fleet.stop() == 0


def back_after(make_fleet: MakeFleet, redis_url: str, raw: Any) -> float:
    """Seconds from SIGTERM until the jobs that were reserved ahead are in their ready list, while the running ones go on."""
    raw.flushdb()
    fleet = make_fleet(redis_url, workers=1, concurrency=2).serving()
    (worker,) = fleet.workers()
    gate = str(fleet.gate())
    fleet.enqueue_many("step", ((f"quick{n}", 0.002) for n in range(400)))  # they make it reserve ahead
    fleet.enqueue_many("gated", ((f"k{n}", gate) for n in range(50)))

    def ahead() -> bool:
        started = len([key for key in fleet.story().starts if key.startswith("k")])
        return started == 2 and len(held_by(raw, worker)) > 2

    eventually(ahead, PATIENCE)
    fleet.send(signal.SIGTERM)
    asked = time.monotonic()
    eventually(lambda: len(held_by(raw, worker)) == 2, PATIENCE)
    took = time.monotonic() - asked
    assert raw.llen(READY) == 48
    fleet.gate().touch()
    assert fleet.wait() == 0
    assert len(fleet.story().starts) == 402
    return took


def test_unstarted_jobs_are_back_at_once(make_fleet: MakeFleet, redis_url: str, raw: Any) -> None:
    """F-11: within 0.2 s of SIGTERM; once in three times, as a machine may stand still for as long."""
    took: list[float] = []
    while not took or (min(took) >= 0.2 and len(took) < 3):
        took.append(back_after(make_fleet, redis_url, raw))
    assert min(took) < 0.2, took


def test_sigquit_hands_back_at_once(make_fleet: MakeFleet, redis_url: str, raw: Any) -> None:
    """No grace: running jobs are interrupted and handed back uncharged."""
    fleet = make_fleet(redis_url, workers=2).serving()
    fleet.enqueue_many("gated", ((f"k{n}", str(fleet.gate())) for n in range(6)))
    fleet.enqueue("gated_thread", "thread", str(fleet.gate()))
    fleet.until_started("thread", *(f"k{n}" for n in range(6)))
    asked = time.monotonic()
    assert fleet.stop(signal.SIGQUIT) == 0
    assert time.monotonic() - asked < 2.0
    assert raw.llen(READY) == 7
    assert raw.hlen("fastq:{default}:deliveries") == 0
    assert fleet.logged("stopped")[0]["killed"] == 0


SLOW = {
    "plan": "wait()",
    "import": "here.exists() and wait()\nhere.touch()",
    "lifespan": "@app.lifespan\nasync def up():\n    here.touch()\n    await asyncio.sleep(0.2)\n    yield 1",
}
"""Where a start takes long: while the command asks the application, while a worker imports it, in its lifespan."""


@pytest.mark.parametrize("where", SLOW)
def test_sigterm_during_startup(make_fleet: MakeFleet, redis_url: str, where: str) -> None:
    """F-11: a fleet that is not ready yet stops, too, and nobody stays behind."""
    fleet = make_fleet(redis_url, workers=1)
    (fleet.folder / "slow.py").write_text(
        "import asyncio, pathlib, time, fastq\n"
        "app, here = fastq.FastQ(), pathlib.Path('here')\n"
        "def wait():\n"
        "    pathlib.Path('waits').touch()\n"
        "    while not pathlib.Path('gate').exists(): time.sleep(0.01)\n" + SLOW[where]
    )
    fleet.start("supervise", "slow:app")
    eventually((fleet.folder / ("here" if where == "lifespan" else "waits")).exists, PATIENCE)
    asked = time.monotonic()
    assert fleet.stop() == (-signal.SIGTERM if where == "plan" else 0)
    assert time.monotonic() - asked < 2.0
    assert not fleet.logged("worker running")


def test_sigterm_while_redis_is_away(make_fleet: MakeFleet, make_server: MakeServer) -> None:
    """F-11: the outcomes wait for Redis until the grace is over; then the worker goes by itself, not by force."""
    server = make_server(appendonly=True)
    fleet = make_fleet(server.url, workers=1, grace=LEASE / 2).serving()
    fleet.enqueue("gated", "k", str(fleet.gate()))
    fleet.until_started("k")
    server.kill()
    fleet.gate().touch()
    fleet.until_done(["k"])
    fleet.until_logged("redis unavailable, retrying", logger="fastq.worker")
    asked = time.monotonic()
    assert fleet.stop() == 0
    assert time.monotonic() - asked < LEASE / 2 + 3.0
    assert fleet.logged("stopped")[0]["killed"] == 0


# -- signals of a serving fleet ---------------------------------------------------------------------------------------


def test_quiet_and_resume(make_fleet: MakeFleet, redis_url: str, raw: Any) -> None:
    """SIGTSTP: finish, take nothing new; SIGCONT: go on."""
    fleet = make_fleet(redis_url, workers=2).serving()
    fleet.enqueue("gated", "running", str(fleet.gate()))
    fleet.until_started("running")
    fleet.send(signal.SIGTSTP)
    fleet.until_logged("worker quiet", 2)
    fleet.enqueue_many("once", [("a",), ("b",), ("c",)])
    fleet.gate().touch()
    fleet.until_done(["running"])
    eventually(lambda: raw.hlen("fastq:{default}:jobs") == 4, PATIENCE)  # the pad and the three: it was settled
    assert raw.llen(READY) == 3
    waiting = fleet.enqueue("once", "d")
    said = eventually(lambda: (e := fleet.producer.explain_sync(waiting)).causes[0].code == "quiet" and e, PATIENCE)
    assert [cause.code for cause in said.causes] == ["quiet", "behind"]
    assert "2 of 2 are quiet" in str(said)
    resumed = time.monotonic()
    fleet.send(signal.SIGCONT)
    story = fleet.until_done("abcd")
    assert all(story.starts[key][0].at > resumed for key in "abcd")
    eventually(
        lambda: {w.state for w in fleet.producer.run_sync(Inspector("fastq").workers())} == {"running"}, PATIENCE
    )
    assert fleet.stop() == 0


def test_hangup_rolls_the_workers_under_load(make_fleet: MakeFleet, redis_url: str) -> None:
    """New code, one worker after the other, no pause, nothing run twice."""
    fleet = make_fleet(redis_url, workers=2, concurrency=4)
    (fleet.folder / "versioned.py").write_text("from jobs import app, note\nnote('version', '1')\n")
    fleet.serving("supervise", "versioned:app")
    old = fleet.workers()
    (fleet.folder / "versioned.py").write_text("from jobs import app, note\nnote('version', '2')\n# longer\n")
    fleet.send(signal.SIGHUP)
    keys: list[str] = []
    while not fleet.logged("rolling restart done"):
        more = [f"k{len(keys) + n}" for n in range(20)]
        fleet.enqueue_many("once", ((key,) for key in more))
        keys += more
        fleet.until_done(more)
    story = fleet.until_done(keys)
    starts = sorted(event.at for event in story.of("s"))
    assert max(later - earlier for earlier, later in itertools.pairwise(starts)) < 1.0
    assert story.repeated() == set()
    versions = {event.pid: event.key for event in story.of("version")}
    assert {versions[pid] for pid in old} == {"1"}
    assert {versions[pid] for pid in fleet.workers()} == {"2"}
    assert not any(alive(pid) for pid in old)
    assert len(fleet.workers()) == 2
    assert fleet.stop() == 0


def test_more_and_fewer_workers(make_fleet: MakeFleet, redis_url: str) -> None:
    """SIGTTIN and SIGTTOU; the one that goes finishes first."""
    fleet = make_fleet(redis_url, workers=1, concurrency=1).serving()
    fleet.send(signal.SIGTTIN)
    fleet.until_serving(2)
    fleet.enqueue_many("gated", [("a", str(fleet.gate())), ("b", str(fleet.gate()))])
    fleet.until_started("a", "b")
    fleet.send(signal.SIGTTOU)
    fleet.until_logged("worker drains")
    fleet.gate().touch()
    story = fleet.until_done("ab")
    fleet.until_logged("worker exited", exit="exit 0")
    assert len(fleet.workers()) == 1
    assert story.repeated() == set()
    assert fleet.stop() == 0


def test_dump_tells_what_runs_and_where(make_fleet: MakeFleet, redis_url: str) -> None:
    """SIGUSR2: every running job with its stack, every thread with its stack; nothing is disturbed."""
    fleet = make_fleet(redis_url, workers=2, concurrency=1).serving()
    ids = {
        "gated": fleet.enqueue("gated", "async", str(fleet.gate())),
        "gated_thread": fleet.enqueue("gated_thread", "thread", str(fleet.gate())),
    }
    fleet.until_started("async", "thread")
    fleet.send(signal.SIGUSR2)
    lines = {line["task"]: line for line in fleet.until_logged("running job", 2)}
    assert {task: line["job"] for task, line in lines.items()} == ids
    assert lines["gated"]["attempt"] == 1
    assert lines["gated"]["seconds"] >= 0
    assert "in gated\n" in lines["gated"]["traceback"] + "\n"
    threads = eventually(
        lambda: [line for line in fleet.logged("thread") if line["name"].startswith("fastq-handler")], PATIENCE
    )
    assert "in gated_thread\n" in threads[0]["traceback"] + "\n"
    fleet.gate().touch()
    assert fleet.until_done(["async", "thread"]).repeated() == set()
    assert fleet.stop() == 0


# -- recycling --------------------------------------------------------------------------------------------------------


def serving_at_each_time(fleet: Fleet) -> list[int]:
    """How many workers served, after each of them came or went."""
    serving, counts = set[int](), []
    for line in fleet.log():
        if line["event"] == "worker running":
            serving.add(line["pid"])
        elif line["event"] == "worker exited":
            serving.discard(line["pid"])
        else:
            continue
        counts.append(len(serving))
    return counts


@pytest.mark.parametrize("limit", ["max_jobs", "max_rss"])
def test_recycling(make_fleet: MakeFleet, redis_url: str, limit: str) -> None:
    """F-15: workers are replaced one at a time when they have done enough or hold too much; nothing is lost."""
    setting = {"max_jobs": 50} if limit == "max_jobs" else {"max_rss": "160MB"}
    fleet = make_fleet(redis_url, workers=2, concurrency=2, **setting).serving()
    keys: list[str] = []
    while len(fleet.logged("worker drains")) < 2:
        more = [f"k{len(keys) + n}" for n in range(20)]
        keys += more
        fleet.enqueue_many("leak" if limit == "max_rss" else "once", ((key, 1 if limit == "max_rss" else 0.001) for key in more))  # fmt: skip
        fleet.until_done(more)
    fleet.until_logged("worker running", 4)
    assert all(line["reason"].startswith(limit) for line in fleet.logged("worker drains"))
    assert {line["exit"] for line in fleet.logged("worker exited")} == {"exit 0"}
    assert min(serving_at_each_time(fleet)[1:]) >= 1
    story = fleet.story()
    assert story.lost(keys) == story.repeated() == set()
    assert fleet.stop() == 0


def test_the_last_job_of_a_recycled_worker_holds_nobody_up(make_fleet: MakeFleet, redis_url: str) -> None:
    """F-15: also where there is one worker: its successor starts when it begins to leave, not when it has gone."""
    fleet = make_fleet(redis_url, workers=1, concurrency=2, max_jobs=2).serving()
    fleet.enqueue("gated", "long", str(fleet.gate()))
    fleet.until_started("long")
    fleet.enqueue_many("once", [("a",), ("b",)])
    fleet.until_logged("worker drains")
    fleet.enqueue("once", "c")
    fleet.until_done(["a", "b", "c"])
    assert "long" not in fleet.story().done
    fleet.gate().touch()
    fleet.until_done(["long"])
    fleet.until_logged("worker exited", exit="exit 0")
    assert fleet.story().repeated() == set()
    assert fleet.stop() == 0


def test_a_thread_that_does_not_stop_costs_its_worker(make_fleet: MakeFleet, redis_url: str, raw: Any) -> None:
    """F-13: after its timeout the job is over, the others finish, and the worker is replaced."""
    fleet = make_fleet(redis_url, workers=1).serving(plant="impatient")
    (worker,) = fleet.workers()
    fleet.enqueue("gated", "neighbour", str(fleet.gate()))
    fleet.enqueue("overtime", "deaf", str(fleet.gate("never")))
    fleet.until_started("neighbour", "deaf")
    fleet.until_logged("worker drains", reason="a handler does not stop")
    assert raw.zcard("fastq:{default}:dead") == 1
    fleet.gate().touch()
    story = fleet.until_done(["neighbour"])
    fleet.until_logged("worker exited", pid=worker, exit="exit 0")
    fleet.until_logged("worker running", 2)
    assert {len(starts) for starts in story.starts.values()} == {1}
    assert fleet.stop() == 0


# -- starting ---------------------------------------------------------------------------------------------------------


def test_lifespan(make_fleet: MakeFleet, redis_url: str) -> None:
    """Once per worker process, its value in the handlers of that process, ended with it."""
    fleet = make_fleet(redis_url, workers=2, concurrency=1).serving()
    workers = set(fleet.workers())
    keys = [f"k{n}" for n in range(20)]
    fleet.enqueue_many("injected", ((key,) for key in keys))
    story = fleet.until_done(keys)
    assert story.of("foreign") == []
    assert fleet.stop() == 0
    story = fleet.story()
    assert [len(story.of(kind)) for kind in ("up", "down")] == [2, 2]
    assert {event.pid for event in story.of("up")} == {event.pid for event in story.of("down")} == workers


LEAVING = """
import atexit, os, time
import fastq

app = fastq.FastQ()
atexit.register(lambda: open("left", "a").write("x"))
if os.environ.get("NEVER"):
    atexit.register(time.sleep, 600)

@app.task
def in_thread() -> int:
    return os.getpid()

@app.task
async def in_loop() -> int:
    return os.getpid()
"""


@pytest.mark.parametrize("task", ["in_thread", "in_loop"])
@pytest.mark.parametrize("command", ["worker", "supervise"])
def test_what_the_application_registered_for_its_end_runs(
    make_fleet: MakeFleet, redis_url: str, command: str, task: str
) -> None:
    """A client of a tracing service sends its last words there; whether threads live or not, once per worker."""
    fleet = make_fleet(redis_url, workers=1, result_ttl=60)
    (fleet.folder / "leaving.py").write_text(LEAVING)
    fleet.start(command, "leaving:app")
    fleet.until_logged("worker ready")
    job = fleet.producer.enqueue_sync(task)
    assert job.result_sync(timeout=PATIENCE)
    assert fleet.stop() == 0
    assert (fleet.folder / "left").read_text() == "x"
    assert "Traceback" not in fleet.said()


def test_an_end_that_takes_for_ever(make_fleet: MakeFleet, redis_url: str) -> None:
    """It is given five seconds."""
    fleet = make_fleet(redis_url, workers=1, result_ttl=60)
    (fleet.folder / "leaving.py").write_text(LEAVING)
    fleet.environ["NEVER"] = "1"
    fleet.start("worker", "leaving:app")
    fleet.until_logged("worker ready")
    assert fleet.producer.enqueue_sync("in_thread").result_sync(timeout=PATIENCE)
    assert fleet.stop() == 0


def test_an_import_error_is_told_once(make_fleet: MakeFleet, redis_url: str) -> None:
    """F-09: exit 2, no worker, the user's own frames and nothing of ours."""
    fleet = make_fleet(redis_url, workers=3)
    (fleet.folder / "inner.py").write_text("def connect():\n    raise RuntimeError('no such database')\n\nconnect()\n")
    (fleet.folder / "broken.py").write_text("import inner\n")
    fleet.start("supervise", "broken:app")
    assert fleet.wait() == 2
    said = fleet.said()
    assert said.count("RuntimeError: no such database") == 1
    frames = [line.split('"')[1] for line in said.splitlines() if line.startswith("  File ")]
    assert [os.path.basename(frame) for frame in frames] == ["broken.py", "inner.py", "inner.py"]
    assert fleet.logged("worker started") == []


def test_redis_is_away_at_the_start(make_fleet: MakeFleet, make_server: MakeServer) -> None:
    """They say so, wait, and serve when it comes."""
    server = make_server()
    server.shutdown()
    fleet = make_fleet(server.url, workers=2).start()
    line = fleet.until_logged("redis unavailable, retrying", 2, logger="fastq.worker")[0]
    assert server.url in line["error"]
    server.start()
    fleet.enqueue("once", "k")
    fleet.until_done("k")
    assert fleet.logged("worker exited") == []
    assert fleet.stop() == 0


def test_a_full_redis_is_drained_by_who_starts_now(make_fleet: MakeFleet, make_server: MakeServer) -> None:
    """F-23: and operators can pause and go on meanwhile."""
    server = make_server(appendonly=True, config={"maxmemory-policy": "noeviction"})
    fleet = make_fleet(server.url, workers=1)
    fleet.enqueue_many("once", ((f"k{n}",) for n in range(50)))
    with connect(server.url) as raw:
        raw.config_set("maxmemory", 1)
        with pytest.raises(fastq.BrokerOutOfMemory):
            fleet.enqueue("once", "refused")
        fleet.start()
        assert fleet.until_done(f"k{n}" for n in range(50)).done == {f"k{n}" for n in range(50)}
        assert fleet.producer.queues.pause_sync("default")
        assert raw.zcard("fastq:{default}:workers") == 1
    assert fleet.stop() == 0
    assert not [line for line in fleet.log() if line["logger"] == "fastq.worker" and line["level"] != "info"]


def test_a_password_that_is_refused_at_the_start(make_fleet: MakeFleet, make_server: MakeServer) -> None:
    """Waiting does not help: exit 2, one line, also without a supervisor. One that has served goes on trying."""
    server = make_server(port=0)
    with connect(server.url) as raw:
        raw.execute_command("ACL", "SETUSER", "app", "on", ">s3cret", "~*", "&*", "+@all")
        wrong = make_fleet(f"redis://app:wr0ng@127.0.0.1:{server.port}/0").start("worker", "jobs:app")
        assert wrong.wait() == 2
        (said,) = wrong.logged("worker cannot work")
        assert said["error"].startswith("WRONGPASS")
        assert "wr0ng" not in wrong.said()
        assert "Traceback" not in wrong.said()
        right = make_fleet(f"redis://app:s3cret@127.0.0.1:{server.port}/0").start("worker", "jobs:app")
        right.until_logged("worker ready")
        raw.execute_command("ACL", "SETUSER", "app", "resetpass", ">other")
        raw.execute_command("CLIENT", "KILL", "USER", "app")
        right.until_logged("redis refuses, retrying")
        raw.execute_command("ACL", "SETUSER", "app", ">s3cret")
        right.until_logged("redis is back")
    assert right.stop() == 0


def test_a_redis_that_refuses_writes_is_told_once_and_again_when_it_is_back(
    make_fleet: MakeFleet, make_server: MakeServer
) -> None:
    """It answers whatever only reads: that is not "redis is back"; and each try is no worker of its own."""
    server = make_server(appendonly=True)
    with connect(server.url) as raw:
        raw.config_set("min-replicas-to-write", 1)
        fleet = make_fleet(server.url, workers=1).start("worker", "jobs:app")
        eventually(lambda: raw.info("errorstats").get("errorstat_NOREPLICAS", {"count": 0})["count"] > 8, PATIENCE)
        raw.config_set("min-replicas-to-write", 0)
        fleet.until_logged("worker ready")
        fleet.enqueue("once", "now")
        fleet.until_done(["now"])
        assert raw.zcard("fastq:{default}:workers") == 1
    assert fleet.stop() == 0
    told = [
        line["event"] for line in fleet.log() if line["logger"] == "fastq.worker" and line["event"].startswith("redis")
    ]
    assert told == ["redis unavailable, retrying", "redis is back"]


def test_every_child_has_connections_of_its_own(make_fleet: MakeFleet, redis_url: str, raw: Any) -> None:
    """F-14: no two processes share a socket; and an idle worker keeps its connections."""
    fleet = make_fleet(redis_url, workers=2, response_timeout=0.5).serving()
    fleet.until_logged("monitor running")
    fleet.until_logged("scheduler running")
    pids = [pid for pid in fleet.family() if pid != fleet.pid]
    assert len(pids) == 4

    def clients() -> dict[int, set[int]]:
        by_pid: dict[int, set[int]] = {pid: set() for pid in pids}
        for client in raw.client_list():
            name, pid, *_ = [*client["name"].split(":"), ""]
            if name == "fastq" and int(pid) in by_pid:
                by_pid[int(pid)].add(int(client["id"]))
        return by_pid

    before = eventually(lambda: (all((found := clients()).values())) and found, PATIENCE)
    assert sum(map(len, before.values())) == len(set().union(*before.values()))
    sockets = [
        {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if os.path.islink(fd)}
        for pid in (fleet.pid, *pids)
    ]
    found = [{link for link in links if link.startswith("socket:")} for links in sockets]
    assert sum(map(len, found)) == len(set().union(*found))
    assert found[0] == set(), "the supervisor has none"
    workers = fleet.workers()
    eventually(lambda: [c for c in raw.client_list() if c["cmd"] == "blpop" and int(c["age"]) >= 2], PATIENCE)
    assert {pid: clients()[pid] for pid in workers} == {pid: before[pid] for pid in workers}
    assert fleet.stop() == 0


# -- one worker, no supervisor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGINT, signal.SIGINT], [signal.SIGINT], [signal.SIGTERM], [signal.SIGQUIT], [signal.SIGHUP]],
)
def test_a_worker_alone(make_fleet: MakeFleet, redis_url: str, raw: Any, signals: list[signal.Signals]) -> None:
    """``fastq worker``: the first Ctrl-C and SIGTERM drain, the second and SIGQUIT stop now; exit 0, no traceback."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a child inherits that it is ignored
    fleet = make_fleet(redis_url).start("worker", "jobs:app")
    signal.signal(signal.SIGHUP, before)
    fleet.until_logged("worker ready")
    fleet.enqueue("gated", "k", str(fleet.gate()))
    fleet.until_started("k")
    fleet.send(signal.SIGUSR1)
    fleet.send(signals[0])
    fleet.until_logged("worker drains")
    for number in signals[1:]:
        fleet.send(number)
    drains = signals in ([signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP])
    if drains:
        fleet.gate().touch()
    asked = time.monotonic()
    assert fleet.wait() == 0
    assert time.monotonic() - asked < 2.0
    assert raw.llen(READY) == (0 if drains else 1)
    assert raw.keys("*:running:*") == []
    assert "Traceback" not in fleet.said()
    assert [event.kind for event in fleet.story().events] == ["up", "s", "d" if drains else "c", "down"]


# -- hanging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("supervise", "jobs:app"), ("worker", "jobs:app")])
def test_a_blocked_loop_keeps_its_lease(make_fleet: MakeFleet, redis_url: str, words: tuple[str, ...]) -> None:
    """F-04: a handler computes for longer than the lease; its jobs run once, and the log says which line it is."""
    fleet = make_fleet(redis_url, workers=1, metrics_port=free_port()).start(*words)
    fleet.until_logged("worker ready")
    fleet.until_logged("metrics served")
    fleet.enqueue("gated", "neighbour", str(fleet.gate()))
    fleet.until_started("neighbour")
    fleet.enqueue("spin", "k", 1.5 * LEASE)
    eventually(lambda: re.search(r"(?m)^fastq_loop_blocked_seconds\{.*\} [1-9]", fleet.get("/metrics")[1]), PATIENCE)
    fleet.gate().touch()
    story = fleet.until_done(["k", "neighbour"])
    (line,) = fleet.logged("event loop blocked")
    assert "jobs.py" in line["traceback"]
    assert "in spin" in line["traceback"]
    assert fleet.stop() == 0
    assert {len(starts) for starts in story.starts.values()} == {1}
    assert fleet.logged("worker lost its lease") == []


def test_a_handler_that_holds_the_gil(make_fleet: MakeFleet, redis_url: str) -> None:
    """F-05: C code stops loop and threads; after hang_timeout the worker is killed, its jobs run elsewhere."""
    hang = 2.0
    fleet = make_fleet(redis_url, workers=2, concurrency=2, hang_timeout=hang).serving()
    fleet.enqueue_many("gated", ((f"k{n}", str(fleet.gate())) for n in range(3)))
    fleet.until_started("k0", "k1", "k2")
    fleet.enqueue("backtrack", "evil")
    story = fleet.until_started("evil")
    evil = story.starts["evil"][0]
    line = fleet.until_logged("worker died, jobs handed back")[0]
    killed = time.monotonic()
    assert (line["pid"], line["end"]) == (evil.pid, "signal SIGABRT")
    assert hang - 0.2 < killed - evil.at < hang + 1.0
    fleet.gate().touch()
    story = fleet.until_done(["evil", "k0", "k1", "k2"])
    for key, starts in story.starts.items():
        assert len(starts) == (2 if starts[0].pid == evil.pid else 1), key
    assert "in backtrack" in fleet.said(), "the stack that hung is on stderr"
    assert fleet.stop() == 0


def test_a_dead_letter_says_that_its_worker_hung(make_fleet: MakeFleet, redis_url: str) -> None:
    """SIGABRT alone looks like a crash of C code."""
    fleet = make_fleet(redis_url, workers=1, hang_timeout=2, max_deliveries=1).serving()
    job = fleet.enqueue("backtrack", "evil")
    (letter,) = eventually(lambda: fleet.producer.dead.list_sync(), PATIENCE)
    assert letter.id == job
    assert "ended by signal SIGABRT (its event loop stood still for hang_timeout=2 s)" in letter.error_message
    assert fleet.stop() == 0
