"""Isolated handlers in a real fleet: whatever they do, it ends their own job and nothing else, and nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastq
from tests.conftest import alive, eventually
from tests.process.fleet import PATIENCE, Fleet

pytestmark = pytest.mark.versions  # asyncio, signals and forks differ

MakeFleet = Callable[..., Fleet]
APP = ("supervise", "tests.process.isolated_app:app")


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[MakeFleet]:
    """``make_fleet(url, **settings)``: a fleet that is not started yet."""
    with contextlib.ExitStack() as stack:

        def make(url: str, **settings: Any) -> Fleet:
            fleet = Fleet(tmp_path, url, **settings)
            fleet.environ["PYTHONWARNINGS"] = "default:This process:DeprecationWarning"  # 3.12+, of a fork with threads
            stack.callback(fleet.close)
            return fleet

        yield make


@pytest.fixture
def fleet(make_fleet: MakeFleet, redis_url: str) -> Iterator[Fleet]:
    fleet = make_fleet(redis_url, workers=1, concurrency=20, processes=3)
    fleet.start(*APP)
    fleet.until_serving(1)
    yield fleet
    assert fleet.stop() == 0
    assert "DeprecationWarning" not in fleet.said()
    assert fleet.logged("worker died, jobs handed back") == []


def enqueue(fleet: Fleet, task: str, *args: Any) -> fastq.JobHandle[Any]:
    return fleet.producer.enqueue_sync(task, *args)


def result(job: fastq.JobHandle[Any]) -> Any:
    return job.result_sync(timeout=PATIENCE)


def letter(fleet: Fleet, job: fastq.JobHandle[Any]) -> Any:
    with pytest.raises(fastq.JobFailed):
        result(job)
    return fleet.producer.run_sync(fleet.producer.inspector.dead_show(job.id))


def test_what_a_handler_must_not_do_ends_its_own_job(fleet: Fleet) -> None:
    """F-07, F-12, F262, F264: a segfault, os._exit, no memory, an endless loop in C, an ignored cancellation, among good
    jobs that all succeed, in the same worker."""
    (worker,) = fleet.workers()
    bad = {how: enqueue(fleet, "crash", how) for how in ("segfault", "exit", "abort", "kill")}
    late = [enqueue(fleet, "endless_c"), enqueue(fleet, "swallows")]
    big = enqueue(fleet, "hog", 1_000)
    good = [enqueue(fleet, ("good", "isolated")[n % 2], n) for n in range(100)]
    assert [result(job) for job in good] == list(range(100))
    ends = {"segfault": "signal SIGSEGV", "exit": "exit 0", "abort": "signal SIGABRT", "kill": "signal SIGKILL"}
    for how, job in bad.items():
        died = letter(fleet, job)
        assert (died.reason, died.error_type, died.attempts) == ("crash", "JobCrashed", 2), how
        assert f"its process ended by {ends[how]}, with" in died.error_message
    for job in late:
        died = letter(fleet, job)
        assert (died.reason, died.error_type) == ("timeout", "JobTimeout")
    died = letter(fleet, big)
    assert (died.error_type, died.attempts) == ("MemoryError", 2)
    assert re.fullmatch(r"more than max_memory=[\d,]+ bytes", died.error_message)
    assert "in hog" in died.traceback
    assert result(enqueue(fleet, "hog", 1)) == 1 << 20
    assert fleet.workers() == [worker]


def test_arguments_results_and_errors_cross(fleet: Fleet) -> None:
    """Sync and async; what a handler raises is judged by its class, in the process that knows it."""
    assert result(enqueue(fleet, "isolated_async", 7)) == [7, 1, "isolated_async", True]
    (worker,) = fleet.workers()
    pid, parent = result(enqueue(fleet, "who"))
    assert len({pid, parent, worker}) == 3
    mine = letter(fleet, enqueue(fleet, "raises", "mine"))
    assert (mine.reason, mine.error_type, mine.error_message, mine.attempts) == (
        "exception", "MyError", "never again", 1,
    )  # fmt: skip
    assert "in raises" in mine.traceback
    assert "isolated.py" not in mine.traceback
    assert letter(fleet, enqueue(fleet, "raises", "fail")).reason == "fail"
    assert result(enqueue(fleet, "raises", "retry")) == 3
    assert result(enqueue(fleet, "raises", "snooze")) == 1
    unkept = enqueue(fleet, "raises", "unkept")
    with pytest.raises(fastq.ResultNotKept, match="object"):
        result(unkept)


def test_soft_limits(fleet: Fleet) -> None:
    """F262, F263: raised in the process, sync (also while it sleeps) and async."""
    jobs = [enqueue(fleet, "soft", "return"), enqueue(fleet, "soft_async")]
    assert [result(job) for job in jobs] == ["tidy", "tidy"]
    died = letter(fleet, enqueue(fleet, "soft", "raise"))
    assert (died.reason, died.error_type) == ("timeout", "SoftTimeLimitExceeded")


@pytest.mark.parametrize("terminate", [False, True])
def test_cancel(fleet: Fleet, terminate: bool) -> None:
    """F-46: told, it looks at job.cancelled; terminated, it is killed with whatever it has started."""
    job = enqueue(fleet, "waits", str(fleet.folder / "pids"))
    handler, child = pids(fleet.folder / "pids")
    assert fleet.producer.cancel_sync(job.id, terminate=terminate)
    with pytest.raises(fastq.JobCancelled):
        result(job)
    eventually(lambda: not alive(child), PATIENCE)
    if terminate:
        eventually(lambda: not alive(handler), PATIENCE)
    assert result(enqueue(fleet, "isolated", 1)) == 1


def test_cancelled_while_it_waits_for_a_process(make_fleet: MakeFleet, redis_url: str) -> None:
    """It never starts; the one that has the process goes on."""
    fleet = make_fleet(redis_url, workers=1, processes=1, job_log_lines=10)
    fleet.start(*APP)
    fleet.until_serving(1)
    gate = fleet.folder / "gate"
    first = enqueue(fleet, "tells", str(gate))
    eventually(first.logs_sync, PATIENCE)
    told, killed, last = (enqueue(fleet, "isolated", n) for n in range(3))
    for job in (told, killed, last):
        eventually(lambda job=job: job.status_sync().state == "running", PATIENCE)
    assert told.cancel_sync()
    assert killed.cancel_sync(terminate=True)
    with pytest.raises(fastq.JobCancelled):
        result(killed)
    gate.touch()
    assert result(first) == "told"
    with pytest.raises(fastq.JobCancelled):
        result(told)
    assert result(last) == 2
    assert fleet.stop() == 0


def test_reports(make_fleet: MakeFleet, redis_url: str) -> None:
    """Progress and log lines go through the worker to where those of other handlers go."""
    fleet = make_fleet(redis_url, workers=1, job_log_lines=10)
    fleet.start(*APP)
    fleet.until_serving(1)
    gate = fleet.folder / "gate"
    job = enqueue(fleet, "tells", str(gate))

    def progress() -> Any:
        status = job.status_sync()
        return status.progress if status is not None else None

    seen = eventually(progress, PATIENCE)
    assert (seen.current, seen.total, seen.message) == (3, 10, "reading")
    eventually(lambda: any("chapter one" in line for line in job.logs_sync()), PATIENCE)
    gate.touch()
    assert result(job) == "told"
    assert fleet.stop() == 0


def pids(path: Path) -> tuple[int, int]:
    handler, child = eventually(
        lambda: path.exists() and path.read_text().endswith("\n") and path.read_text(), PATIENCE
    ).split()
    return int(handler), int(child)


def test_processes_are_used_again_and_replaced(make_fleet: MakeFleet, redis_url: str) -> None:
    """F-15: a process runs process_jobs jobs; no more of them than processes live at once; none is a zombie."""
    fleet = make_fleet(redis_url, workers=1, processes=1, process_jobs=5)
    fleet.start(*APP)
    fleet.until_serving(1)
    seen = [tuple(result(enqueue(fleet, "who"))) for _ in range(12)]
    assert len({pid for pid, _ in seen}) == 3
    assert [seen.count(each) for each in dict.fromkeys(seen)] == [5, 5, 2]
    (template,) = {parent for _, parent in seen}
    eventually(lambda: len(children_of(template)) == 1, PATIENCE)
    assert fleet.stop() == 0
    assert not alive(template)


def children_of(pid: int) -> list[int]:
    """Zombies included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def test_a_killed_worker_leaves_no_orphan(make_fleet: MakeFleet, redis_url: str) -> None:
    """SIGKILL of the worker ends its nursery and the handlers' processes; the job runs again elsewhere."""
    fleet = make_fleet(redis_url, workers=1, processes=2)
    fleet.start(*APP)
    (worker,) = fleet.until_serving(1)
    job = enqueue(fleet, "waits", str(fleet.folder / "pids"))
    handler, grandchild = pids(fleet.folder / "pids")
    (nursery,) = children_of(worker)
    (template,) = children_of(nursery)
    (fleet.folder / "pids").unlink()
    fleet.kill(worker)
    eventually(lambda: not any(map(alive, (nursery, template, handler))), PATIENCE)
    os.kill(grandchild, signal.SIGKILL)  # what a handler starts outlives a SIGKILL of its worker: nobody tells it
    again, child = pids(fleet.folder / "pids")
    assert again != handler
    assert fleet.producer.cancel_sync(job.id, terminate=True)
    eventually(lambda: not alive(child), PATIENCE)
    assert fleet.stop() == 0


def test_a_nursery_that_dies_costs_its_worker(make_fleet: MakeFleet, redis_url: str) -> None:
    """Without it no process can be started: the worker drains and is replaced, and jobs run again."""
    fleet = make_fleet(redis_url, workers=1)
    fleet.start(*APP)
    (worker,) = fleet.until_serving(1)
    assert result(enqueue(fleet, "isolated", 1)) == 1
    (nursery,) = children_of(worker)
    os.kill(nursery, signal.SIGKILL)
    fleet.until_logged("worker drains", reason="it cannot start processes any more")
    assert result(enqueue(fleet, "isolated", 2)) == 2
    assert fleet.stop() == 0


def test_an_application_that_starts_threads_when_it_is_imported(make_fleet: MakeFleet, redis_url: str) -> None:
    """A fork would copy their locks: each process imports the application itself instead."""
    fleet = make_fleet(redis_url, workers=1, processes=1)
    fleet.environ["THREADS_AT_IMPORT"] = "1"
    fleet.start(*APP)
    (worker,) = fleet.until_serving(1)
    pid, parent = result(enqueue(fleet, "who"))
    (nursery,) = children_of(worker)
    assert parent == nursery
    assert pid != nursery
    assert "in crash" not in fleet.said()
    died = letter(fleet, enqueue(fleet, "crash", "segfault"))
    assert died.error_type == "JobCrashed"
    assert "DeprecationWarning" not in fleet.said()
    assert fleet.stop() == 0
    assert not alive(nursery)


def test_a_drain_kills_and_hands_back(make_fleet: MakeFleet, redis_url: str, raw: Any) -> None:
    """F-11: what still runs at the end of the grace is handed back uncharged."""
    fleet = make_fleet(redis_url, workers=1, grace=0.1)
    fleet.start(*APP)
    fleet.until_serving(1)
    enqueue(fleet, "waits", str(fleet.folder / "pids"))
    handler, child = pids(fleet.folder / "pids")
    begun = time.monotonic()
    assert fleet.stop() == 0
    assert time.monotonic() - begun < PATIENCE / 2
    assert not alive(handler)
    assert not alive(child)
    assert raw.llen("fastq:{default}:ready:5") == 1
