"""A private server, processes that are ended by their pid, and a drain timed by the handlers themselves."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastq.broker.command import raw
from fastq.broker.connection import SyncConnection
from fastq.broker.embedded import EmbeddedServer
from fastq.broker.url import parse_url

ROOT = Path(__file__).parent.parent.parent
INSIDE = ("subcommand", "config", "info", "command", "client")
"""What commandstats names that no candidate sends for its jobs."""


class Stuck(RuntimeError):
    """A candidate does not get on."""


def until(fact: Callable[[], Any], seconds: float = 60.0, pause: float = 0.002) -> None:
    """Wait for a fact.

    Raises:
        Stuck: it did not come true in time.
    """
    deadline = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > deadline:
            raise Stuck(f"nothing for {seconds:g} s")
        time.sleep(pause)


# -- Redis ------------------------------------------------------------------------------------


class Redis:
    """The private server and what the driver asks of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection = SyncConnection(parse_url(url))

    def call(self, *words: Any) -> Any:
        return self._connection.call(raw(*words))

    def close(self) -> None:
        self._connection.close()

    def info(self, section: str) -> dict[str, str]:
        lines = self.call("INFO", section).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def cpu(self) -> float:
        """Seconds of CPU."""
        info = self.info("cpu")
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    def executed(self) -> int:
        """Commands that the server ran; those inside scripts count, too."""
        stats = self.info("commandstats")
        return sum(
            int(value.split("calls=")[1].split(",")[0])
            for name, value in stats.items()
            if name.startswith("cmdstat_") and not name.startswith(tuple(f"cmdstat_{i}" for i in INSIDE))
        )

    def sent(self) -> int:
        """Commands that clients of fastq and of the floors sent: theirs are scripts and blocking pops, nothing else."""
        stats = self.info("commandstats")
        names = ("evalsha", "eval", "blpop", "fcall", "multi", "exec")
        return sum(
            int(stats[f"cmdstat_{n}"].split("calls=")[1].split(",")[0]) for n in names if f"cmdstat_{n}" in stats
        )

    def reads(self) -> int:
        """Times that the server read from a connection."""
        return int(self.info("stats").get("total_reads_processed", 0))

    def memory(self) -> int:
        return int(self.info("memory")["used_memory"])

    def clear(self) -> None:
        self.call("FLUSHALL")
        self.call("CONFIG", "RESETSTAT")

    def name(self) -> str:
        """Which server this is, with its version."""
        info = self.info("server")
        if "valkey_version" in info:
            return f"Valkey {info['valkey_version'].strip()}"
        return f"Redis {info['redis_version'].strip()}"


@contextmanager
def private_server() -> Iterator[Redis]:
    """A server on a loopback port, nothing written to disk: the system's Redis where there is one, as the rivals expect."""
    system = shutil.which("redis-server")
    with EmbeddedServer(port=0, binary=system) as server:
        redis = Redis(server.url)
        try:
            yield redis
        finally:
            redis.close()


# -- processes --------------------------------------------------------------------------------


class Process:
    """A command in a session of its own: its CPU is that of all its processes, and all of them end with it."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        self.log = log
        self.started = time.monotonic()
        with log.open("ab") as out:
            self.child = subprocess.Popen(
                words, env=os.environ | dict(environ), cwd=ROOT, start_new_session=True, stdout=out, stderr=out
            )

    @property
    def pid(self) -> int:
        return self.child.pid

    def members(self) -> list[int]:
        """The pids of its session."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == self.pid:
                        found.append(int(entry.name))
        return found

    def cpu(self) -> float:
        """Seconds of CPU of all its processes' threads that are alive: in ns, where `stat` counts in 10 ms."""
        total = 0
        for pid in self.members():
            for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                with contextlib.suppress(OSError):
                    total += int(thread.read_text().split()[0])
        return total / 1e9

    def rss(self) -> int:
        """Resident bytes of all its processes."""
        total = 0
        for pid in self.members():
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return total * os.sysconf("SC_PAGESIZE")

    def alive(self) -> bool:
        return self.child.poll() is None

    def stop(self) -> None:
        """End it, politely first."""
        with contextlib.suppress(ProcessLookupError):
            self.child.terminate()
        try:
            self.child.wait(3)
        except subprocess.TimeoutExpired:
            pass
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.child.wait(5)


class Candidate(NamedTuple):
    """Something that can be measured: how to fill its queue, and what to start that empties it."""

    name: str
    fill: Callable[[str, str, int], None]  # url, task, jobs
    worker: Callable[[str, int, str], list[str]]  # url, processes, task -> the command
    environ: Mapping[str, str] = {}


@contextmanager
def running(words: Sequence[str], url: str, **environ: str) -> Iterator[tuple[Process, Marks]]:
    """A process with its marks, ended at the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder) / "marks"
        marks.mkdir()
        variables = {
            "BENCH_MARKS": str(marks),
            "BENCH_REDIS_URL": url,
            "FASTQ_REDIS_URL": url,
            "FASTQ_METRICS_PORT": "0",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "",  # as installed packages are: compiled once, not at every start
            **environ,
        }
        process = Process(words, variables, Path(folder) / "log")
        try:
            yield process, Marks(marks)
        except Stuck as error:
            said = process.log.read_text(errors="replace")[-1500:]
            raise Stuck(f"{error}: {' '.join(words)[:200]}\n{said}") from None
        finally:
            process.stop()


# -- the stopwatch ----------------------------------------------------------------------------


class Marks:
    """What the handlers wrote (benchmarks/tally.py)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def lines(self) -> list[list[tuple[int, int]]]:
        """Per process its (ns, value) lines."""
        found = []
        for path in self._folder.iterdir():
            text = path.read_text()
            rows = text[: text.rfind("\n") + 1].splitlines()
            found.append([(int(ns), int(value)) for ns, _, value in (row.partition(" ") for row in rows)])
        return found

    def count(self) -> int:
        """Jobs started so far, to within 100 per process."""
        total = 0
        for path in self._folder.iterdir():
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 64))
                lines = file.read().splitlines()
            total += int(lines[-1].split()[1]) if lines and len(lines[-1].split()) == 2 else 0
        return total

    def laps(self) -> list[float]:
        """Sorted seconds of all laps."""
        return sorted(value / 1e9 for rows in self.lines() for _, value in rows)

    def between(self, low: int, high: int) -> tuple[float, int]:
        """Seconds from the ``low``-th to the ``high``-th job over all processes, and how many jobs these were."""
        events = []
        for rows in self.lines():
            before = 0
            for ns, value in rows:
                events.append((ns, value - before))
                before = value
        done, begun = 0, (0, 0)
        for ns, jobs in sorted(events):
            done += jobs
            if not begun[0] and done >= low:
                begun = (ns, done)
            if done >= high:
                return (ns - begun[0]) / 1e9, done - begun[1]
        raise Stuck(f"{done} of {high} jobs were run")


class Drain(NamedTuple):
    """A queue that was emptied."""

    jobs_per_second: float
    worker_us: float  # CPU of the worker's processes per job
    redis_us: float  # CPU of Redis per job, once it is stored
    stored_us: float  # CPU of Redis per job until then
    sent: float  # commands from the client per job, fastq and floors only
    executed: float  # commands that Redis ran per job, those in scripts included
    reads: float  # times that Redis read from a connection per job: round trips, and a few more for writes over 16 KB


def drain(
    redis: Redis, candidate: Candidate, jobs: int, *, processes: int = 1, task: str = "noop", seconds: float = 60.0
) -> Drain:
    """Fill the queue, start the worker and time it from 10 % to 90 % of the jobs.

    Raises:
        Stuck: the jobs were not run in ``seconds``.
    """
    redis.clear()
    before = redis.cpu()
    candidate.fill(redis.url, task, jobs)
    stored = redis.cpu() - before
    low, high = jobs // 10, jobs * 9 // 10
    redis.call("CONFIG", "RESETSTAT")
    with running(candidate.worker(redis.url, processes, task), redis.url, **candidate.environ) as (process, marks):
        until(lambda: marks.count() >= low, seconds)
        first, own, theirs = marks.count(), process.cpu(), redis.cpu()
        sent, executed, reads = redis.sent(), redis.executed(), redis.reads()
        until(lambda: marks.count() >= high, seconds)
        last = marks.count()
        own, theirs = process.cpu() - own, redis.cpu() - theirs
        reads = redis.reads() - reads - 4  # the driver's own
        sent, executed = redis.sent() - sent, redis.executed() - executed
        spent, done = marks.between(low, high)
    measured = last - first
    sent, executed, reads = (count / measured for count in (sent, executed, reads))
    return Drain(
        done / spent, own / measured * 1e6, theirs / measured * 1e6, stored / jobs * 1e6, sent, executed, reads
    )


def module(*words: str) -> list[str]:
    """A module of this checkout, run by this interpreter."""
    return [sys.executable, "-m", *words]
