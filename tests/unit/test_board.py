"""The board: what one process writes, every other one of the host reads."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from pathlib import Path

import pytest

from fastq import board as board_module
from fastq.board import NAMES_SIZE, ROW_SIZE, ROWS, Board, Slot, SlotState, exit_text

FIELDS = {
    "pid": 4_194_304,
    "exit_status": 9,
    "rss": 1 << 40,
    "busy": 10_000,
    "concurrency": 10_000,
    "generation": 7,
    "stopping": True,
    "recycling": True,
    "started_at": 1.5,
    "ticked_at": 2.5,
    "reserved_at": 3.5,
    "role": "scheduler",
    "worker_id": "host-" + "é" * 57,
    "state": SlotState.QUIET,
}


def small(slots: int = 3) -> Board:
    return Board(slots, cells=16, rows=8)


def start(slot: Slot, row: int, job_id: str) -> None:
    slot.rows[row * ROW_SIZE + 1 : row * ROW_SIZE + 1 + len(job_id)] = job_id.encode()
    slot.rows[row * ROW_SIZE] = len(job_id)


def claim(board: Board, role: str = "worker") -> Slot:
    slot = board.claim(role)
    assert slot is not None
    return slot


def in_child(act: object) -> int:
    """The exit status of a forked child that calls `act`."""
    pid = os.fork()
    if pid == 0:
        try:
            act()  # type: ignore[operator]
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def test_every_field_crosses_processes() -> None:
    board = small()

    def write() -> None:
        for name, value in FIELDS.items():
            setattr(board[1], name, value)
        board[1].cells[15] = 0.25
        board[1].names[NAMES_SIZE - 1] = 255
        start(board[1], 7, "job-7")
        board.stopping = board.quiet = True

    assert in_child(write) == 0
    assert {name: getattr(board[1], name) for name in FIELDS} == FIELDS
    assert (board[1].cells[15], board[1].names[-1], board[1].running_ids()) == (0.25, 255, ["job-7"])
    assert (board.stopping, board.quiet) == (True, True)


def test_neighbours_and_fields_do_not_touch_each_other() -> None:
    board = small()
    slot = board[1]
    for name, value in FIELDS.items():
        setattr(slot, name, value)
    slot.cells[:] = memoryview(struct.pack("16d", *range(1, 17))).cast("d")
    slot.names[:] = b"\x07" * NAMES_SIZE
    slot.rows[:] = (b"\x7f" + b"x" * (ROW_SIZE - 1)) * 8
    assert {name: getattr(slot, name) for name in FIELDS} == FIELDS
    assert list(slot.cells) == list(range(1, 17))
    assert bytes(slot.names) == b"\x07" * NAMES_SIZE
    assert slot.running_ids() == ["x" * 127] * 8
    for other in (board[0], board[2]):
        assert other.state is SlotState.FREE
        assert (other.role, other.worker_id, other.pid, other.running_ids()) == ("", "", 0, [])
        assert not any(other.cells)
        assert not any(other.names)
    assert not board.stopping


def test_the_shape_that_the_others_count_on() -> None:
    board = Board(2)
    assert len(board) == 2
    assert [slot.index for slot in board] == [0, 1]
    slot = board[0]
    assert (slot.cells.format, len(slot.cells), slot.cells.readonly) == ("d", board_module.CELLS, False)
    assert (slot.rows.format, len(slot.rows)) == ("B", ROWS * ROW_SIZE)
    assert [state.value for state in SlotState] == list(range(7))
    with pytest.raises(ValueError, match="at least one slot"):
        Board(0)


def test_numbers_are_written_whole() -> None:
    """A reader in another process sees the one value or the other, never a mixture of their bytes."""
    board = small()
    values = (0x0101010101010101, 0x7E7E7E7E7E7E7E7E)
    board[0].rss = values[0]

    def write() -> None:
        while not board.stopping:
            board[0].rss = values[0]
            board[0].rss = values[1]

    pid = os.fork()
    if pid == 0:
        write()
        os._exit(0)
    seen = {board[0].rss for _ in range(200_000)}
    board.stopping = True
    assert os.waitpid(pid, 0)[1] == 0
    assert seen <= set(values)


def test_claim_takes_the_first_free_slot_and_resets_it() -> None:
    board = small()
    before = time.monotonic()
    slot = claim(board)
    assert (slot.index, slot.role, slot.state) == (0, "worker", SlotState.STARTING)
    assert before <= slot.started_at <= time.monotonic()
    assert claim(board, "scheduler").index == 1
    for name, value in FIELDS.items():
        setattr(slot, name, value)
    slot.cells[3] = 5.0
    slot.names[0] = 1
    start(slot, 2, "left-over")
    slot.state = SlotState.FREE  # by somebody who did not clean up
    assert claim(board, "monitor") is slot
    cleared = {name for name in FIELDS if not getattr(slot, name)}
    assert cleared == FIELDS.keys() - {"role", "state", "started_at"}
    assert slot.role == "monitor"
    assert slot.running_ids() == []
    assert (slot.cells[3], slot.names[0]) == (5.0, 1), "counters only grow, whoever has the slot"


def test_claim_when_all_are_taken() -> None:
    board = small(2)
    first, _second = claim(board), claim(board)
    assert board.claim("worker") is None
    first.state = SlotState.DEAD
    assert board.claim("worker") is None, "a dead worker's jobs come first"
    first.free()
    assert board.claim("worker") is first


def test_alive() -> None:
    (slot,) = small(1)
    found = []
    for state in SlotState:
        slot.state = state
        if slot.alive:
            found.append(state.name)
    assert found == ["STARTING", "BOOTED", "RUNNING", "QUIET", "DRAINING"]


def test_running_jobs() -> None:
    slot = claim(small())
    assert slot.running_ids() == []
    start(slot, 0, "a")
    start(slot, 5, "b" * 120)
    slot.rows[5 * ROW_SIZE + 121] = 200  # what a longer id has left behind
    assert slot.running_ids() == ["a", "b" * 120]
    slot.rows[0] = 0
    assert slot.running_ids() == ["b" * 120]
    slot.rows[7 * ROW_SIZE : 7 * ROW_SIZE + 3] = b"\x02\xff\xfe"
    assert slot.running_ids()[1] == "��", "torn bytes do not stop the reader"
    slot.clear_rows()
    assert slot.running_ids() == []


def test_texts_are_bounded() -> None:
    slot = claim(small())
    slot.worker_id = "x" * 119
    with pytest.raises(ValueError, match="120 bytes long; the board holds 119"):
        slot.worker_id = "x" * 120
    with pytest.raises(ValueError, match="the board holds 31"):
        slot.role = "x" * 32
    assert slot.worker_id == "x" * 119
    assert slot.role == "worker"


def test_one_recycles_at_a_time() -> None:
    """F-15"""
    board = Board(5, cells=1, rows=1)
    one, two, three = (claim(board) for _ in range(3))
    for slot in board:
        slot.peers = 3
    claim(board, "scheduler")
    one.state = two.state = SlotState.RUNNING
    assert not board.may_recycle(one), "the third does not serve yet"
    three.state = SlotState.QUIET
    assert board.may_recycle(one), "a scheduler that starts is no worker"
    assert board.may_recycle(one), "asking again changes nothing"
    assert not board.may_recycle(two)
    assert not two.recycling
    one.state = SlotState.DRAINING
    assert not board.may_recycle(two), "its successor has not been started yet"
    four = claim(board)
    assert not board.may_recycle(two)
    four.state, four.peers = SlotState.BOOTED, 3
    assert not board.may_recycle(two), "its successor does not serve yet"
    four.state = SlotState.RUNNING
    assert board.may_recycle(two), "its successor serves, though it has not gone"
    assert not board.may_recycle(three)
    assert not board.may_recycle(four)


def test_exit_texts() -> None:
    assert exit_text(0) == "exit 0"
    assert exit_text(2 << 8) == "exit 2"
    assert exit_text(signal.SIGSEGV) == "signal SIGSEGV"
    assert exit_text(50) in {"signal 50", "signal SIGRTMIN+16"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_slot_costs_memory_only_where_it_is_written() -> None:
    """64 slots of full size reserve 110 MB of addresses and use a few pages."""

    def shared_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssShmem:")[2].split()[0])

    before = shared_kib()
    board = Board(64)
    for slot in board:
        claim(board).state = SlotState.RUNNING
        slot.worker_id = "w"
        slot.cells[0] = 1.0
    assert shared_kib() - before <= 64 * 8 + 64
