"""`make demo` in small: its proof holds, it sees what is planted, and it leaves nothing behind however it ends."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.conftest import connect, eventually

ROOT = Path(__file__).parents[2]
READY, JOBS = "fastq:{default}:ready:5", "fastq:{default}:jobs"


class Demo:
    """One run as a process; `output` is what it has said so far."""

    def __init__(self, folder: Path, *options: str, terminal: int | None = None, **environ: str) -> None:
        self.folder = folder
        self._out = folder.parent / f"{folder.name}.out"
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "examples" / "demo.py"), *options],
                env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), **environ},
                cwd=folder.parent,
                stdin=subprocess.DEVNULL,
                stdout=out if terminal is None else terminal,
                stderr=subprocess.STDOUT if terminal is None else out,
                start_new_session=True,  # as a terminal would: Ctrl-C goes to the whole group
            )

    @property
    def output(self) -> str:
        return self._out.read_text("utf-8")

    def wait(self) -> int:
        return self.process.wait(100)

    def until(self, text: str) -> None:
        """Wait until it has said `text`."""
        eventually(lambda: text in self.output or self.process.poll() is not None, 60)
        assert text in self.output

    @contextlib.contextmanager
    def redis(self) -> Iterator[Any]:
        """Its private Redis, as soon as it is there."""
        socket = eventually(lambda: next(self.folder.glob("fastq-*/redis.sock"), None), 30)
        with connect(f"unix://{socket}?db=0") as client:
            eventually(client.ping)
            yield client

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)


@pytest.fixture
def folder() -> Iterator[Path]:
    """The demo's temporary folder: short enough for a socket in it, and empty when the demo has ended."""
    parent = Path(tempfile.mkdtemp(prefix="fq-", dir="/tmp"))
    made = parent / "t"
    made.mkdir()
    yield made
    shutil.rmtree(parent)


@pytest.fixture
def demo(folder: Path) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def start(*options: str, **more: Any) -> Demo:
            made = Demo(folder, *options, **more)
            stack.callback(made.close)
            return made

        yield start


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_nothing_is_lost_although_a_worker_is_killed(demo, folder):
    """The proof of the spine: F-08 on real input. The user's own settings have no part in it."""
    run = demo("--files", "300", FASTQ_PREFIX="mine", FASTQ_QUEUES="other", REDIS_URL="redis://127.0.0.1:1/0")
    assert run.wait() == 0, run.output
    said = run.output
    assert "\n300 enqueued, 300 done, 0 lost\n" in said
    assert "300 of 300 equal to a direct computation" in said
    assert re.search(r"worker \d+ is killed with SIGKILL, with \d+ jobs in its hands", said)
    assert re.search(r"\n  retries     [1-9]\d*, each of them planned\n", said)
    assert re.search(r"\n  duplicates  \d+ runs started again because of the kill.*, 0 for another reason\n", said)
    replaced = re.search(r"a new worker took its first job after ([\d.]+) (m?s)\n", said)
    assert replaced, said
    assert float(replaced[1]) / (1_000 if replaced[2] == "ms" else 1) < 15, "not by the end of the lease"
    assert re.search(
        r"\n *\d+\.\d s  pending +\d+  later \d+  running \d+  done \d+  retried \d+  dead 0  \d+ jobs/s", said
    )
    assert "FAULT" not in said
    assert "\x1b" not in said  # not a terminal
    assert left_in(folder) == []


def test_a_job_that_vanishes_is_missed(demo, folder):
    run = demo("--files", "150", "--no-kill")
    with run.redis() as redis:
        job = eventually(lambda: redis.rpop(READY), 60)  # the last one: far from its turn
        assert redis.hdel(JOBS, job) == 1
    assert run.wait() == 1
    assert "\n150 enqueued, 149 done, 1 lost\n" in run.output
    assert f"\nFAULT  lost: job {job.decode()} of " in run.output
    assert "149 of 150 equal" in run.output
    assert left_in(folder) == []


def test_a_result_that_differs_is_found(demo, folder):
    run = demo("--files", "150", "--no-kill")
    with run.redis() as redis:
        bucket = eventually(lambda: next(redis.scan_iter("fastq:{default}:done:*"), None), 60)
        job, data = redis.hrandfield(bucket, 1, withvalues=True)
        record = msgspec.msgpack.decode(data)
        record[6]["sha256"] = "0" * 64
        redis.hset(bucket, job, msgspec.msgpack.encode(record))
    assert run.wait() == 1
    assert "\n150 enqueued, 150 done, 0 lost\n" in run.output
    assert "\nFAULT  differs: " in run.output
    assert "149 of 150 equal" in run.output
    assert left_in(folder) == []


@pytest.mark.parametrize(("moment", "options"), [("jobs/s", []), ("comparing", ["--files", "300", "--no-kill"])])
def test_ctrl_c_ends_it_quietly_and_leaves_nothing(demo, folder, moment, options):
    """F-09: no traceback, no process (the suite looks for them), no folder."""
    run = demo(*options)
    run.until(moment)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait() == 130
    assert "Traceback" not in run.output
    assert " done, " not in run.output, "it had ended by itself"
    assert left_in(folder) == []


def test_a_killed_demo_takes_its_processes_and_its_folder_along(demo, folder):
    run = demo()
    run.until("jobs/s")
    run.process.kill()
    run.wait()
    eventually(lambda: left_in(folder) == [])


def test_a_terminal_is_redrawn(demo, folder):
    ours, theirs = pty.openpty()
    try:
        run = demo("--files", "40", "--no-kill", terminal=theirs, COLUMNS="40")
        os.close(theirs)
        said = read_all(ours)
    finally:
        os.close(ours)
    assert run.wait() == 0, said
    assert "\x1b[8A" in said
    assert "100%" in said
    assert "\r\n40 enqueued, 40 done, 0 lost\r\n" in said
    rows = [line for line in said.split("\r\n") if line.endswith("\x1b[K")]
    assert rows
    assert max(len(re.sub(r"\x1b\[\d*[A-Z]", "", row)) for row in rows) <= 39, "a row that wraps shifts the rest"


def read_all(fd: int) -> str:
    """Whatever comes until the other side is closed."""
    data = b""
    with contextlib.suppress(OSError):  # EIO is how Linux says it
        while more := os.read(fd, 65_536):
            data += more
    return data.decode("utf-8")


def test_the_example_of_asking() -> None:
    """examples/asking.py: what docs/results.md, time_limits.md, once.md, queues.md and consumer.md describe, as one program."""
    path = Path(__file__).parents[2] / "examples" / "asking.py"
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].endswith("no live worker serves queue default; it is the next one")
    assert said[1:] == [
        "its result: 5 pages | what happened: ['progress', 'started', 'succeeded']",
        "its status: success after 1 attempt; unknown: None",
        "cancelled: True",
        "with the tag: 3 cancelled",
        "unique: True | created: [True, False]",
        "idempotent: [8, 8, 8] from 1 job",
        "paused: ['paused', 'no_worker', 'next']",
        "left: 1 | purged: 1",
    ]
