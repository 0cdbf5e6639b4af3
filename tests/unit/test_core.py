"""The compiled ledger: what lands in which byte, what is refused, and what a killed process leaves behind."""

# ruff: noqa: TID251  the core itself is tested here
from __future__ import annotations

import gc
import math
import mmap
import os
import signal
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastq import _core, board
from fastq._core import ROW_SIZE, RUN_BUCKETS, RUN_CELL, SERIES_CELLS, STATUS_COUNT, WAIT_BUCKETS, WAIT_CELL, Ledger

pytestmark = pytest.mark.versions

CELLS = 4 + 2 * SERIES_CELLS
ROWS = 3


class Memory:
    """Cells and rows as a slot has them."""

    def __init__(self) -> None:
        self.cells = memoryview(bytearray(CELLS * 8)).cast("d")
        self.rows = memoryview(bytearray(ROWS * ROW_SIZE))
        self.ledger = Ledger(self.cells, self.rows)

    def row(self, row: int) -> bytes:
        at = row * ROW_SIZE
        return bytes(self.rows[at + 1 : at + 1 + self.rows[at]])

    def written(self) -> dict[int, float]:
        return {at: n for at, n in enumerate(self.cells) if n}


@pytest.fixture
def memory() -> Memory:
    return Memory()


def test_layout_is_the_one_that_board_and_metrics_know() -> None:
    assert board.ROW_SIZE == ROW_SIZE
    assert STATUS_COUNT == WAIT_CELL
    assert WAIT_CELL + len(WAIT_BUCKETS) + 2 == RUN_CELL
    assert RUN_CELL + len(RUN_BUCKETS) + 2 == SERIES_CELLS
    for bounds in (WAIT_BUCKETS, RUN_BUCKETS):
        assert len(bounds) <= 12, "F-A15: at most 12 buckets"
        assert list(bounds) == sorted(set(bounds))


def test_counts_what_it_was_given(memory: Memory) -> None:
    assert (memory.ledger.cell_count, memory.ledger.row_count) == (CELLS, ROWS)


# -- observe ------------------------------------------------------------------------------------------


def test_observe_writes_five_cells_of_one_series(memory: Memory) -> None:
    base = 4 + SERIES_CELLS
    memory.ledger.observe(base, 2, 0.03, 0.2)
    wait_bucket, run_bucket = 2, 4  # ≤ 0.05, ≤ 0.25
    assert memory.written() == {
        base + 2: 1.0,
        base + WAIT_CELL + wait_bucket: 1.0,
        base + WAIT_CELL + len(WAIT_BUCKETS) + 1: 0.03,
        base + RUN_CELL + run_bucket: 1.0,
        base + RUN_CELL + len(RUN_BUCKETS) + 1: 0.2,
    }


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_time_falls_into_the_first_bucket_that_is_not_below_it(wait: float, run: float) -> None:
    memory = Memory()
    memory.ledger.observe(0, 0, wait, run)
    for start, bounds, seconds in ((WAIT_CELL, WAIT_BUCKETS, wait), (RUN_CELL, RUN_BUCKETS, run)):
        counts = memory.cells[start : start + len(bounds) + 1].tolist()
        expected = next((i for i, bound in enumerate(bounds) if seconds <= bound), len(bounds))
        assert [i for i, n in enumerate(counts) if n] == [expected]
        assert memory.cells[start + len(bounds) + 1] == seconds


@pytest.mark.parametrize("bound", range(len(RUN_BUCKETS)))
def test_a_bound_belongs_to_its_own_bucket(memory: Memory, bound: int) -> None:
    memory.ledger.observe(0, 0, 0.0, RUN_BUCKETS[bound])
    memory.ledger.observe(0, 0, 0.0, math.nextafter(RUN_BUCKETS[bound], math.inf))
    assert memory.cells[RUN_CELL + bound : RUN_CELL + bound + 2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("none", [math.nan, math.inf, -math.inf])
def test_a_time_that_is_no_number_is_left_out_of_its_histogram_only(memory: Memory, none: float) -> None:
    memory.ledger.observe(0, 5, 0.1, none)
    assert memory.cells[5] == 1.0
    assert memory.cells[RUN_CELL:SERIES_CELLS].tolist() == [0.0] * (SERIES_CELLS - RUN_CELL)
    assert sum(memory.cells[WAIT_CELL : WAIT_CELL + len(WAIT_BUCKETS) + 1]) == 1.0


def test_a_negative_time_counts_as_zero(memory: Memory) -> None:
    memory.ledger.observe(0, 0, -3.0, 0.0)
    assert memory.cells[WAIT_CELL] == 1.0
    assert memory.cells[WAIT_CELL + len(WAIT_BUCKETS) + 1] == 0.0


@pytest.mark.parametrize("base", [-1, CELLS - SERIES_CELLS + 1, CELLS, 2**62, -(2**62)])
def test_a_series_outside_is_refused(memory: Memory, base: int) -> None:
    with pytest.raises(IndexError, match=f"series at cell {base} of {CELLS}"):
        memory.ledger.observe(base, 0, 0.0, 0.0)
    assert memory.written() == {}


@pytest.mark.parametrize("status", [-1, STATUS_COUNT, 2**62])
def test_a_status_outside_is_refused(memory: Memory, status: int) -> None:
    with pytest.raises(IndexError, match=f"status {status}"):
        memory.ledger.observe(0, status, 0.0, 0.0)
    assert memory.written() == {}


def test_the_last_series_that_fits_is_accepted(memory: Memory) -> None:
    memory.ledger.observe(CELLS - SERIES_CELLS, STATUS_COUNT - 1, 1e9, 1e9)
    assert memory.cells[CELLS - 1] == 1e9


@pytest.mark.parametrize(
    "arguments", [("0", 0, 0.0, 0.0), (0, 0.5, 0.0, 0.0), (0, 0, "x", 0.0), (0, 0, 0.0, None), (0,)]
)
def test_a_wrong_type_is_refused(memory: Memory, arguments: tuple[object, ...]) -> None:
    with pytest.raises(TypeError):
        memory.ledger.observe(*arguments)  # type: ignore[arg-type]
    assert memory.written() == {}


def test_a_number_beyond_64_bits_is_refused(memory: Memory) -> None:
    with pytest.raises(OverflowError):
        memory.ledger.observe(2**64, 0, 0.0, 0.0)


# -- add ----------------------------------------------------------------------------------------------


def test_add_sums(memory: Memory) -> None:
    memory.ledger.add(3, 1)
    memory.ledger.add(3, 2.5)
    memory.ledger.add(CELLS - 1, 1)
    assert memory.written() == {3: 3.5, CELLS - 1: 1.0}


@pytest.mark.parametrize("cell", [-1, CELLS, 2**62])
def test_a_cell_outside_is_refused(memory: Memory, cell: int) -> None:
    with pytest.raises(IndexError, match=f"cell {cell} of {CELLS}"):
        memory.ledger.add(cell, 1.0)
    assert memory.written() == {}


# -- rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job_id", ["a", "mail-17", "0" * 32, "x" * (ROW_SIZE - 1), b"as-bytes"])
def test_start_writes_the_id_and_finish_forgets_it(memory: Memory, job_id: str | bytes) -> None:
    memory.ledger.start(1, job_id)
    assert memory.row(1) == (job_id.encode() if isinstance(job_id, str) else job_id)
    assert memory.row(0) == memory.row(2) == b"", "its neighbours are untouched"
    memory.ledger.finish(1)
    assert memory.row(1) == b""


def test_a_shorter_id_replaces_a_longer_one(memory: Memory) -> None:
    memory.ledger.start(0, "a-long-job-id")
    memory.ledger.start(0, "b")
    assert memory.row(0) == b"b"


@pytest.mark.parametrize("row", [-1, ROWS, 2**62])
def test_a_row_outside_is_refused(memory: Memory, row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row} of {ROWS}"):
        memory.ledger.start(row, "a")
    with pytest.raises(IndexError, match=f"row {row} of {ROWS}"):
        memory.ledger.finish(row)
    assert not any(memory.rows)


@pytest.mark.parametrize("job_id", ["", "x" * ROW_SIZE, b"", b"x" * ROW_SIZE, "é", "日本", b"\xff", "a\ud800"])
def test_what_cannot_be_an_id_is_refused(memory: Memory, job_id: str | bytes) -> None:
    with pytest.raises(ValueError, match="job id"):
        memory.ledger.start(0, job_id)
    assert not any(memory.rows)


@pytest.mark.parametrize("job_id", [None, 7, ["a"], bytearray(b"a")])
def test_an_id_of_another_type_is_refused(memory: Memory, job_id: object) -> None:
    with pytest.raises(TypeError, match=f"must be str or bytes, not {type(job_id).__name__}"):
        memory.ledger.start(0, job_id)  # type: ignore[arg-type]


def test_the_board_reads_what_the_ledger_writes() -> None:
    slot = board.Board(1, rows=3)[0]
    ledger = Ledger(slot.cells, slot.rows)
    ledger.start(0, "first")
    ledger.start(2, b"third")
    assert slot.running_ids() == ["first", "third"]
    ledger.finish(0)
    assert slot.running_ids() == ["third"]


# -- memory -------------------------------------------------------------------------------------------


def test_the_mmap_cannot_be_closed_under_a_ledger() -> None:
    shared = mmap.mmap(-1, 8192)
    view = memoryview(shared)
    ledger = Ledger(view[:4096].cast("d"), view[4096:])
    view.release()
    with pytest.raises(BufferError):
        shared.close()
    ledger.add(0, 1.0)  # and its memory is still there
    del ledger
    gc.collect()  # the views in between are held by nothing else
    shared.close()


@pytest.mark.parametrize(
    ("cells", "rows", "error"),
    [
        (bytearray(80), bytearray(ROW_SIZE), ValueError),  # bytes, no doubles
        (memoryview(bytearray(80)).cast("f"), bytearray(ROW_SIZE), ValueError),
        (memoryview(bytearray(80)).cast("q"), bytearray(ROW_SIZE), ValueError),
        (memoryview(bytearray(80)).cast("d"), bytearray(ROW_SIZE + 1), ValueError),
        (memoryview(bytearray(80)).cast("d"), memoryview(bytearray(ROW_SIZE * 8)).cast("d"), ValueError),
        (memoryview(bytearray(80)).cast("d"), memoryview(bytearray(ROW_SIZE * 2))[::2], BufferError),
        (memoryview(bytearray(80)).cast("d")[::2], bytearray(ROW_SIZE), BufferError),
        (memoryview(bytes(80)).cast("d"), bytearray(ROW_SIZE), BufferError),  # read-only
        (memoryview(bytearray(80)).cast("d"), bytes(ROW_SIZE), BufferError),
        (None, bytearray(ROW_SIZE), TypeError),
    ],
)
def test_a_buffer_of_another_shape_is_refused(cells: bytearray, rows: bytearray, error: type[Exception]) -> None:
    with pytest.raises(error):
        Ledger(cells, rows)
    if isinstance(cells, bytearray):
        cells.append(0)  # a refused buffer is not held


def test_a_ledger_over_nothing_refuses_everything() -> None:
    ledger = Ledger(memoryview(bytearray()).cast("d"), bytearray())
    with pytest.raises(IndexError):
        ledger.observe(0, 0, 0.0, 0.0)
    with pytest.raises(IndexError):
        ledger.start(0, "a")


def test_calls_keep_no_reference(memory: Memory) -> None:
    job_id, tag = "job-" + str(os.getpid()), b"job-" + str(os.getpid()).encode()
    amount = float(os.getpid())
    before = [sys.getrefcount(thing) for thing in (job_id, tag, amount, memory.ledger)]
    for _ in range(100):
        memory.ledger.start(0, job_id)
        memory.ledger.start(1, tag)
        memory.ledger.add(0, amount)
        memory.ledger.observe(0, 0, amount, amount)
        with pytest.raises(IndexError):
            memory.ledger.start(ROWS, job_id)
    assert [sys.getrefcount(thing) for thing in (job_id, tag, amount, memory.ledger)] == before


# -- what a killed process leaves behind ---------------------------------------------------------------


def start_and_finish_forever(ledger: Ledger) -> None:
    while True:
        ledger.start(0, "a" * 120)
        ledger.add(0, 1.0)
        ledger.finish(0)
        ledger.start(0, "b" * 7)
        ledger.finish(0)


def test_a_killed_process_leaves_a_whole_id_or_none(eventually: Callable[..., object]) -> None:
    """F-01: the suspects of a SIGKILL are read from shared memory; half an id would blame nobody, or the wrong job."""
    slot = board.Board(1, rows=1)[0]
    ledger = Ledger(slot.cells, slot.rows)
    for _ in range(20):
        slot.cells[0] = 0.0
        pid = os.fork()
        if pid == 0:
            try:
                start_and_finish_forever(ledger)
            finally:
                os._exit(1)
        try:
            eventually(lambda: slot.cells[0] > 1_000)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert slot.running_ids() in ([], ["a" * 120], ["b" * 7])
        slot.clear_rows()


def test_the_module_exports_what_the_stub_says() -> None:
    """The stub is compared by `make check`; this keeps a stale build from hiding behind it."""
    names = {name for name in vars(_core) if not name.startswith("__")}
    assert names == {
        "Ledger", "PlainCalls", "ROW_SIZE", "RUN_BUCKETS", "RUN_CELL", "Run", "Runner", "SERIES_CELLS", "STATUS_COUNT", "Tokens", "UnitCount",
        "WAIT_BUCKETS", "WAIT_CELL", "forget", "new_id", "pack_listed", "pack_plain", "plain_envelope", "take_in",
    }  # fmt: skip
