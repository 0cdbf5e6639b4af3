"""What one job costs the worker's books: compiled, and the same written in Python, in one run.

    pytest benchmarks/micro/bench_core.py --benchmark-enable

The times are of this machine; the ratio is what must hold everywhere.
"""

from __future__ import annotations

import timeit
from bisect import bisect_left
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastq._core import ROW_SIZE, RUN_BUCKETS, RUN_CELL, STATUS_COUNT, WAIT_BUCKETS, WAIT_CELL
from fastq.board import Board, Slot
from fastq.exposition import Exposition
from fastq.metrics import OTHER, WorkerMetrics, aggregate

JOB_ID = "0123456789abcdef0123456789abcdef"
LEAST_RATIO = 5.0  # measured: 13 to 19, on a busy machine of two cores once 9
CALLS = 1_000


class PythonLedger:
    """The same cells and rows, with the same checks, in plain Python."""

    def __init__(self, slot: Slot) -> None:
        self.cells = slot.cells
        self.rows = slot.rows

    def start(self, row: int, job_id: str) -> None:
        at = row * ROW_SIZE
        data = job_id.encode("ascii")
        if not (0 <= at < len(self.rows) and 0 < len(data) < ROW_SIZE):
            raise IndexError(row)
        self.rows[at] = 0
        self.rows[at + 1 : at + 1 + len(data)] = data
        self.rows[at] = len(data)

    def finish(self, row: int) -> None:
        self.rows[row * ROW_SIZE] = 0

    def observe(self, base: int, status: int, wait: float, run: float) -> None:
        if not 0 <= status < STATUS_COUNT:
            raise IndexError(status)
        cells = self.cells
        cells[base + status] += 1
        cells[base + WAIT_CELL + bisect_left(WAIT_BUCKETS, wait)] += 1
        cells[base + WAIT_CELL + len(WAIT_BUCKETS) + 1] += wait
        cells[base + RUN_CELL + bisect_left(RUN_BUCKETS, run)] += 1
        cells[base + RUN_CELL + len(RUN_BUCKETS) + 1] += run


@pytest.fixture
def slot() -> Slot:
    return Board(1)[0]


def calls(ledger: WorkerMetrics | PythonLedger) -> dict[str, Callable[[], None]]:
    """Each part of a job's bookkeeping, `CALLS` times."""
    base = 64
    start, finish, observe = ledger.start, ledger.finish, ledger.observe
    rounds = range(CALLS)

    def starts() -> None:
        for _ in rounds:
            start(5, JOB_ID)

    def finishes() -> None:
        for _ in rounds:
            finish(5)

    def observes() -> None:
        for _ in rounds:
            observe(base, 0, 0.012, 0.2)

    def jobs() -> None:
        for _ in rounds:
            start(5, JOB_ID)
            finish(5)
            observe(base, 0, 0.012, 0.2)

    return {"start": starts, "finish": finishes, "observe": observes, "job": jobs}


@pytest.mark.parametrize("part", ["start", "finish", "observe", "job"])
def test_compiled(benchmark: BenchmarkFixture, slot: Slot, part: str) -> None:
    benchmark.extra_info["calls"] = CALLS
    benchmark(calls(WorkerMetrics(slot))[part])


@pytest.mark.parametrize("part", ["start", "finish", "observe", "job"])
def test_python(benchmark: BenchmarkFixture, slot: Slot, part: str) -> None:
    benchmark.extra_info["calls"] = CALLS
    benchmark(calls(PythonLedger(slot))[part])


def test_ratio(slot: Slot, capsys: pytest.CaptureFixture[str]) -> None:
    """The best of many short rounds, the two taken in turn: a busy machine slows both."""
    compiled, python = calls(WorkerMetrics(slot)), calls(PythonLedger(slot))
    ratios = {}
    for part in compiled:
        rounds = [(timeit.timeit(compiled[part], number=1), timeit.timeit(python[part], number=1)) for _ in range(200)]
        fast, slow = (min(times) / CALLS * 1e9 for times in zip(*rounds, strict=True))
        ratios[part] = slow / fast
        with capsys.disabled():
            print(f"\n  {part:8} {fast:6.0f} ns compiled {slow:6.0f} ns in Python: {ratios[part]:.1f} times", end="")
    assert ratios["observe"] >= LEAST_RATIO


def test_both_write_the_same(slot: Slot) -> None:
    """Otherwise the ratio would compare two different things."""
    other = Board(1)[0]
    WorkerMetrics(other)
    compiled, python = WorkerMetrics(slot), PythonLedger(other)
    for wait, run in ((0.0, 0.0), (0.01, 0.1), (3.0, 5_000.0)):
        compiled.observe(64, 1, wait, run)
        python.observe(64, 1, wait, run)
    compiled.start(3, JOB_ID)
    python.start(3, JOB_ID)
    assert slot.cells.tobytes() == other.cells.tobytes()
    assert slot.rows.tobytes() == other.rows.tobytes()


@pytest.mark.parametrize("series", [10, 1_000])
def test_scrape(benchmark: BenchmarkFixture, series: int) -> None:
    """Summing eight workers and writing the answer: once per scrape interval, in the monitor."""
    board = Board(8)
    tasks = [f"task-{i}" for i in range(series)]
    for slot in board:
        counting = WorkerMetrics(slot, queues=["default"], tasks=tasks)
        for task in tasks:
            counting.observe(counting.series("default", task), 0, 0.01, 0.1)
    assert any(t.queue == OTHER for t in aggregate(board).tasks)
    benchmark(Exposition(board).render)
