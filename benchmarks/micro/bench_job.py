"""What one job costs in Python, without Redis: made by its producer, read by its worker, run by the executor.

    pytest benchmarks/micro/bench_job.py --benchmark-enable

The times are per 500 jobs, of this machine; what must hold everywhere is the ratio to bare Tasks.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop
from pytest_benchmark.fixture import BenchmarkFixture

from fastq import FastQ
from fastq._core import take_in
from fastq.board import Board
from fastq.broker.commands import Batch, enqueue
from fastq.broker.connection import pack
from fastq.broker.keys import QueueKeys
from fastq.context import JobContext
from fastq.job import PLAIN, Envelope, encode, plain_envelope, plain_head, read_envelope
from fastq.metrics import WorkerMetrics
from fastq.worker.executor import Executor

JOBS = 500
KEYS = QueueKeys("fastq", "default")
MOST_RATIO = 5.0  # of a job of the executor to a bare Task: measured 1.5 to 2.4

app = FastQ(result_ttl=0, concurrency=JOBS, threads=32)


@app.task
async def noop(number: int) -> None:
    """Nothing, in a Task."""


@app.task
def noop_sync(number: int) -> None:
    """Nothing, in a thread."""


@app.task(result_ttl=60)
async def noop_kept(number: int) -> int:
    """Its result is kept."""
    return number


@app.task
async def injected(number: int, job: JobContext) -> None:
    """It has a look at its job: compiled code alone does not drive it."""


# -- the producer ------------------------------------------------------------------------------


@pytest.mark.benchmark(group="encode, 500 jobs")
@pytest.mark.parametrize("part", ["arguments", "envelope", "call", "command"])
def test_encode(benchmark: BenchmarkFixture, part: str) -> None:
    """Arguments bound, encoded and checked; the envelope around them; both, with id and options; all of them as one call."""
    body = noop.arguments.encode((1,), {})
    jobs = [noop._call((n,), {}, app).job for n in range(JOBS)]
    parts: dict[str, Callable[[], object]] = {
        "arguments": lambda: [noop.arguments.encode((n,), {}) for n in range(JOBS)],
        "envelope": lambda: [plain_envelope(plain_head(5, "noop"), body, 1 << 41) for _ in range(JOBS)],
        "call": lambda: [noop._call((n,), {}, app) for n in range(JOBS)],
        "command": lambda: pack(enqueue(KEYS, 5, "0" * 12, 1 << 50, jobs)),
    }
    benchmark(parts[part])


# -- the worker --------------------------------------------------------------------------------


class Line:
    """An executor on a loop of its own, and the jobs of a reply."""

    def __init__(self, task: str) -> None:
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        slot = Board(1).claim("worker")
        assert slot is not None
        self.batch = Batch()
        self.metrics = WorkerMetrics(slot, queues=("default",), tasks=app.tasks)
        body = app.tasks[task].arguments.encode((1,), {})
        self.ids = [f"{n:024x}".encode() for n in range(JOBS)]
        self.envelopes = [encode(Envelope(5, PLAIN, task, body, int(time.time() * 1_000))) for _ in self.ids]
        self.executor: Executor = self.runner.run(self._make())

    async def _make(self) -> Executor:
        self.over = asyncio.Event()
        return Executor(app, self.metrics, {"default": self.batch}, lambda: int(time.time() * 1_000), self._ended, JOBS)

    def _ended(self) -> None:
        if self.executor.runner.free == JOBS:
            self.over.set()

    def take(self) -> deque[JobContext]:
        """Make jobs of a reply."""
        held: dict[str, Any] = {}
        backlog: deque[JobContext] = deque()
        odd = take_in(self.ids, self.envelopes, [], "default", held, backlog, read_envelope, JobContext, PLAIN, 1 << 20)
        assert not odd
        return backlog

    def run(self, backlog: deque[JobContext]) -> None:
        """All of them, to their outcomes."""
        self.runner.run(self._run(backlog))
        self.batch.succeeded.clear()
        self.batch.recorded.clear()

    async def _run(self, backlog: deque[JobContext]) -> None:
        executor = self.executor
        self.over.clear()
        while backlog:
            if executor.runner.fill(backlog, executor.plans, {}, 2):
                executor.runner.free -= 1
                executor.start(backlog.popleft())
        await self.over.wait()

    def close(self) -> None:
        self.executor.close()
        self.runner.close()


@pytest.fixture
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    line = Line(request.param)
    yield line
    line.close()


@pytest.mark.benchmark(group="decode, 500 jobs")
@pytest.mark.parametrize("line", ["noop"], indirect=True)
def test_decode(benchmark: BenchmarkFixture, line: Line) -> None:
    """Envelopes of a reply made into jobs."""
    benchmark(line.take)


@pytest.mark.benchmark(group="executor, 500 jobs")
@pytest.mark.parametrize("line", ["noop", "noop_kept", "injected", "noop_sync"], indirect=True)
def test_executor(benchmark: BenchmarkFixture, line: Line) -> None:
    """From the backlog to their outcomes: arguments, run, board, counters."""
    benchmark.pedantic(line.run, setup=lambda: ((line.take(),), {}), rounds=60, warmup_rounds=3)
    assert line.executor.finished >= JOBS  # once, or as often as it is timed
    assert line.executor.finished % JOBS == 0


@pytest.mark.benchmark(group="executor, 500 jobs")
def test_bare_tasks(benchmark: BenchmarkFixture) -> None:
    """What asyncio takes for as many Tasks that do nothing."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        benchmark.pedantic(lambda: runner.run(_bare()), rounds=60, warmup_rounds=3)


async def _bare() -> None:
    tasks = [asyncio.create_task(noop(n)) for n in range(JOBS)]
    await tasks[-1]


@pytest.mark.parametrize("line", ["noop"], indirect=True)
def test_ratio(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    """An executor's job beside a bare Task, in turns: the best of each."""

    def timed(act: Callable[[], object]) -> float:
        begun = time.perf_counter()
        act()
        return time.perf_counter() - begun

    own, bare = [], []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for _ in range(40):
            own.append(timed(functools.partial(line.run, line.take())))
            bare.append(timed(lambda: runner.run(_bare())))
    ratio = min(own) / min(bare)
    with capsys.disabled():
        print(f"\na job of the executor takes {ratio:.1f} bare Tasks ({min(own) / JOBS * 1e6:.2f} µs)")
    assert ratio < MOST_RATIO
