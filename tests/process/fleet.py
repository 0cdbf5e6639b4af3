"""A real fleet: the command, its processes and signals, its log as facts, and what its handlers wrote.

A fleet runs ``fastq supervise jobs:app`` (tests/chaos/jobs.py) in a folder of the test's own. Its log is JSON and is
read as facts (`Fleet.logged`); what its handlers did is read from an append-only file (`Story`) and judged afterwards.
Every time that a test relies on derives from `LEASE`. Only processes that the fleet's own log or process table names as
its children are ever signalled.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, NamedTuple

import fastq
from tests.chaos import jobs
from tests.conftest import alive, eventually

__all__ = ["LEASE", "PATIENCE", "ROOT", "Event", "Fleet", "Kill", "Story", "free_port", "held_by", "percentile"]

ROOT = Path(__file__).parent.parent.parent
CHAOS = ROOT / "tests" / "chaos"

LEASE = 1.5
"""Seconds; every other time of these tests is a multiple of it."""

PATIENCE = 20 * LEASE
"""How long a fact may take on a busy machine before the test fails."""


class Fleet:
    """One command of ``fastq`` and what became known of it. ``settings`` are those of fastq.config."""

    def __init__(self, folder: Path, url: str, **settings: Any) -> None:
        self.folder = folder
        self.url = url
        self.process: subprocess.Popen[bytes] | None = None
        self._producer: fastq.FastQ | None = None
        self._story, self._read = Story(), 0
        self._lines, self._logged = list[dict[str, Any]](), 0
        chosen = {
            "url": url, "workers": 2, "concurrency": 10, "lease": LEASE, "grace": 10 * LEASE, "metrics_port": 0,
            "log_format": "json",
        }  # fmt: skip
        self.environ = {
            **os.environ,
            **{f"FASTQ_{name.upper()}": str(value) for name, value in {**chosen, **settings}.items()},
            "PYTHONPATH": f"{folder}{os.pathsep}{CHAOS}{os.pathsep}{ROOT}",
        }
        self.events = folder / "events"

    # -- its life -------------------------------------------------------------------------------

    def start(self, *words: str, plant: str = "") -> Fleet:
        """Run ``fastq WORDS``; default: ``supervise jobs:app``."""
        program = [str(CHAOS / "planted.py"), plant] if plant else ["-m", "fastq"]
        command = [sys.executable, "-X", "faulthandler", *program, *(words or ("supervise", "jobs:app"))]
        with (self.folder / "out").open("ab") as out, (self.folder / "err").open("ab") as err:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env={**self.environ, "EVENTS": str(self.events)}, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True,
            )  # fmt: skip
        return self

    def serving(self, *words: str, plant: str = "") -> Fleet:
        """Start, and wait until every worker serves."""
        self.start(*words, plant=plant)
        self.until_serving(int(self.environ["FASTQ_WORKERS"]))
        return self

    def until_serving(self, count: int) -> list[int]:
        """Wait for so many serving workers (not counting those that have ended); their pids."""
        return eventually(lambda: len(found := self.workers()) >= count and found, PATIENCE)

    @property
    def pid(self) -> int:
        """Of the command."""
        assert self.process is not None
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        """Signal the command."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit status, once it has ended."""
        assert self.process is not None
        return self.process.wait(timeout)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to stop; its exit status."""
        self.send(number)
        return self.wait()

    def close(self) -> None:
        """Leave nothing behind, whatever the test has come to."""
        if self._producer is not None:
            self._producer.close()
        if self.process is None:
            return
        family = self.family()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in family:
            if pid != self.process.pid and alive(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        said = [line for line in self.said().splitlines() if '"event":"queue not served here"' not in line]
        print(f"--- log of {self.folder.name}", *said[-30:], sep="\n")  # pytest shows it when the test has failed

    # -- its processes --------------------------------------------------------------------------

    def family(self) -> list[int]:
        """The command and its living children, by the process table."""
        return [self.pid, *(pid for pid in _children(self.pid) if alive(pid))]

    def pids(self, role: str, event: str = "running") -> list[int]:
        """Of the children of a role that came to serve and have not ended, in that order."""
        ended = {line["pid"] for line in self.logged(f"{role} exited")}
        return [line["pid"] for line in self.logged(f"{role} {event}") if line["pid"] not in ended]

    def workers(self) -> list[int]:
        """The pids of the serving workers."""
        return [pid for pid in self.pids("worker") if alive(pid)]

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal a child of this fleet."""
        assert pid in _children(self.pid), f"{pid} is no child of {self.pid}"
        os.kill(pid, number)

    def freeze(self, pid: int) -> None:
        """SIGSTOP a child; returns once it stands still."""
        self.kill(pid, signal.SIGSTOP)
        eventually(lambda: _state(pid) == "T", PATIENCE)

    def kill_holding(self, pid: int, client: Any, names: Mapping[str, str]) -> Kill:
        """SIGKILL a worker, and know what it held: it is stopped first, so that it holds no less afterwards.

        ``names`` gives the keys of job ids.
        """
        self.freeze(pid)
        held = frozenset(names[job] for job in held_by(client, pid))
        at = time.monotonic()
        self.kill(pid)
        eventually(lambda: not alive(pid), PATIENCE)  # or it might be chosen once more
        return Kill(pid, at, held)

    # -- its log --------------------------------------------------------------------------------

    def log(self) -> list[dict[str, Any]]:
        """The JSON lines on stderr, without what else was printed there."""
        path = self.folder / "err"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._logged)
                new = file.read().rpartition(b"\n")
            self._logged += len(new[0] + new[1])
            self._lines += [json.loads(line) for line in new[0].splitlines() if line.startswith(b'{"time"')]
        return self._lines

    def said(self) -> str:
        """Everything that is whole on stderr."""
        path = self.folder / "err"
        return path.read_text(errors="replace").rpartition("\n")[0] if path.exists() else ""

    def logged(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The lines of one event whose fields have these values."""
        return [
            line
            for line in self.log()
            if line["event"] == event and all(line.get(name) == value for name, value in fields.items())
        ]

    def until_logged(self, event: str, count: int = 1, **fields: Any) -> list[dict[str, Any]]:
        """Wait for so many lines of an event; the lines."""
        return eventually(lambda: len(found := self.logged(event, **fields)) >= count and found, PATIENCE)

    # -- its jobs -------------------------------------------------------------------------------

    @property
    def producer(self) -> fastq.FastQ:
        """An application that enqueues for this fleet."""
        if self._producer is None:
            self._producer = fastq.FastQ(self.url, enqueue_timeout=PATIENCE)
            self._producer.include(jobs.tasks)
        return self._producer

    def enqueue(self, task: str, *args: Any, **options: Any) -> str:
        """Enqueue one job; its id."""
        return self.producer.options(**options).enqueue_sync(task, *args).id

    def enqueue_many(self, task: str, calls: Iterable[tuple[Any, ...]]) -> list[str]:
        """Enqueue jobs; their ids in that order."""
        assert self.producer
        return list(jobs.tasks.tasks[task].enqueue_many_sync(calls))

    def story(self) -> Story:
        """What the handlers have written so far: always the same object, which grows."""
        if self.events.exists():
            with self.events.open("rb") as file:
                file.seek(self._read)
                new = file.read().rpartition(b"\n")
            self._read += len(new[0] + new[1])
            self._story.read(new[0].decode())
        return self._story

    def until_done(self, keys: Iterable[str], timeout: float = PATIENCE) -> Story:
        """Wait until all of these have been done at least once."""
        wanted = set(keys)
        return eventually(lambda: wanted <= (story := self.story()).done and story, timeout)

    def until_started(self, *keys: str) -> Story:
        """Wait until all of these have been started."""
        return eventually(lambda: set(keys) <= set((story := self.story()).starts) and story, PATIENCE)

    def gate(self, name: str = "gate") -> Path:
        """The path of a gate; it is closed until it is touched."""
        return self.folder / name

    # -- its pages ------------------------------------------------------------------------------

    def get(self, path: str, authorization: str = "", host: str = "127.0.0.1") -> tuple[int, str]:
        """Status and text of a page of the monitor."""
        port = self.environ["FASTQ_METRICS_PORT"]
        request = urllib.request.Request(f"http://{host}:{port}{path}")
        if authorization:
            request.add_header("Authorization", authorization)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _children(pid: int) -> list[int]:
    if sys.platform == "linux":
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(path.parent.name))
        return found
    listing = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(child) for child, parent in map(str.split, listing.splitlines()) if int(parent) == pid]


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- what happened ----------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """A line of the event file; ``at`` is ``time.monotonic()``, one clock for all processes of the host."""

    kind: str
    key: str
    pid: int
    at: float


class Kill(NamedTuple):
    """A process that was killed, and which jobs it held in Redis at that moment."""

    pid: int
    at: float
    held: frozenset[str] = frozenset()


class Story:
    """The events of a run, for judging it when it is over."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.starts: dict[str, list[Event]] = defaultdict(list)
        self.ends: dict[str, list[Event]] = defaultdict(list)

    def read(self, text: str) -> None:
        """Take more lines of the file in."""
        for line in text.splitlines():
            kind, key, pid, at = line.split()
            event = Event(kind, key, int(pid), float(at))
            self.events.append(event)
            if kind == "s":
                self.starts[key].append(event)
            elif kind == "d":
                self.ends[key].append(event)

    @property
    def done(self) -> AbstractSet[str]:
        """The keys of the jobs that were done."""
        return self.ends.keys()

    def of(self, kind: str, key: str = "") -> list[Event]:
        """The events of a kind, of all jobs or of one."""
        return [event for event in self.events if event.kind == kind and key in ("", event.key)]

    def lost(self, keys: Iterable[str]) -> set[str]:
        """Those that were never done (I1)."""
        return set(keys) - self.done

    def repeated(self) -> set[str]:
        """Those that were started more than once."""
        return {key for key, starts in self.starts.items() if len(starts) > 1}

    def interrupted(self, kill: Kill) -> set[str]:
        """Those that a killed process had started and not done."""
        began = {key for key, starts in self.starts.items() if any(e.pid == kill.pid for e in starts)}
        return {key for key in began if not any(e.pid == kill.pid for e in self.ends.get(key, ()))}

    def unexplained(self, kills: Iterable[Kill]) -> list[Event]:
        """Starts that were followed by another one although no kill had taken the job from their process (I5)."""
        held = {kill.pid: kill.held for kill in kills}
        return [
            start
            for starts in self.starts.values()
            for start in starts[:-1]
            if start.key not in held.get(start.pid, ())
        ]

    def in_flight(self, kills: Iterable[Kill]) -> int:
        """Jobs whose handler had started in a killed process that still held them."""
        return sum(
            any(start.pid == kill.pid for start in self.starts.get(key, ())) for kill in kills for key in kill.held
        )

    def recoveries(self, kills: Iterable[Kill]) -> list[float]:
        """Seconds from each kill to the next start of each job that it interrupted, sorted."""
        waits = []
        for kill in kills:
            for key in self.interrupted(kill):
                again = [e.at for e in self.starts[key] if e.pid != kill.pid and e.at > kill.at]
                waits += [min(again) - kill.at] if again else []
        return sorted(waits)


def percentile(values: list[float], part: float) -> float:
    """Of sorted values; 0 when there are none."""
    return values[min(int(len(values) * part), len(values) - 1)] if values else 0.0


def held_by(client: Any, pid: int, prefix: str = "fastq") -> set[str]:
    """Ids of the jobs that a worker process holds, as an independent client sees them in Redis."""
    found: set[str] = set()
    for key in client.scan_iter(match=f"{prefix}:*:running:*.{pid}.*", count=1000):
        found |= {member.decode() for member in client.smembers(key)}
    return {member for member in found if not member.startswith("~")}
