"""The board: one piece of shared memory that carries the liveness and the counters of every child process.

The supervisor makes it before the first fork, so every process of the host sees the same bytes and nobody needs a
socket, a lock or a thread to tell the others how it is. Each field of a slot has one writer at a time:

=============  ====================================================================================
supervisor     role, pid, started_at, generation, peers, stopping, exit_status; states STARTING and DEAD;
               ``rss`` once the child is dead (its peak, from the kernel)
child          states BOOTED, RUNNING, QUIET, DRAINING; worker_id, ticked_at, reserved_at, rss, busy,
               concurrency, recycling, cells, names, rows
monitor        state FREE, after it handed a dead child's jobs back (the supervisor, where nothing is to hand back)
=============  ====================================================================================

Every number lies on an 8-byte boundary and is read and written whole (``memoryview`` copies eight bytes at once), so a
reader sees an old or a new value, never half of one.

``fastq/board.py`` is imported by every child: it takes the standard library only and must never import the supervisor.
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, overload

__all__ = [
    "CELLS",
    "NAMES_SIZE",
    "ROWS",
    "ROW_SIZE",
    "SERVING",
    "Board",
    "ChildContext",
    "Slot",
    "SlotState",
    "exit_text",
    "run_exit_functions",
]

CELLS = 40_000  # doubles: 1,000 series of two histograms and seven counters need 33,000; the rest is worker-wide
NAMES_SIZE = 256 * 1024  # bytes: 1,000 series names of up to 256 bytes
ROWS = 10_000  # the largest concurrency of one worker
ROW_SIZE = 128  # one length byte and a job id of at most 120 characters

_PAGE = 4096
_HEADER = 512  # of a slot: sixteen integers, eight doubles, two texts
_INTS = 16
_DOUBLES_AT = _INTS * 8
_DOUBLES = 8
_ROLE_AT = _DOUBLES_AT + _DOUBLES * 8
_ROLE_SIZE = 32
_WORKER_ID_AT = _ROLE_AT + _ROLE_SIZE
_WORKER_ID_SIZE = 120


class SlotState(enum.IntEnum):
    """Where the child of a slot is in its life."""

    FREE = 0
    STARTING = 1  # forked; importing the application
    BOOTED = 2  # imported; waiting for Redis
    RUNNING = 3  # serving
    QUIET = 4  # finishes what it has, takes nothing new
    DRAINING = 5  # on its way out
    DEAD = 6  # reaped; its jobs wait to be handed back


SERVING = (SlotState.RUNNING, SlotState.QUIET)
_ALIVE = frozenset({SlotState.STARTING, SlotState.BOOTED, SlotState.RUNNING, SlotState.QUIET, SlotState.DRAINING})


class _Int:
    """An integer of the slot's header."""

    def __init__(self, at: int) -> None:
        self._at = at

    @overload
    def __get__(self, slot: None, owner: type) -> _Int: ...
    @overload
    def __get__(self, slot: Slot, owner: type) -> int: ...
    def __get__(self, slot: Slot | None, owner: type) -> _Int | int:
        return self if slot is None else slot._ints[self._at]

    def __set__(self, slot: Slot, value: int) -> None:
        slot._ints[self._at] = value


class _Flag(_Int):
    """A truth value of the slot's header."""

    def __get__(self, slot: Slot | None, owner: type) -> Any:
        return self if slot is None else bool(slot._ints[self._at])


class _Double:
    """A floating-point number of the slot's header."""

    def __init__(self, at: int) -> None:
        self._at = at

    @overload
    def __get__(self, slot: None, owner: type) -> _Double: ...
    @overload
    def __get__(self, slot: Slot, owner: type) -> float: ...
    def __get__(self, slot: Slot | None, owner: type) -> _Double | float:
        return self if slot is None else slot._doubles[self._at]

    def __set__(self, slot: Slot, value: float) -> None:
        slot._doubles[self._at] = value


class Slot:
    """One child's part of the board. Times are ``time.monotonic()`` seconds, one clock for the whole host."""

    pid = _Int(1)
    exit_status = _Int(2)  # as waitpid() gave it; see exit_text()
    rss = _Int(3)  # bytes; the peak once the child is dead
    busy = _Int(4)  # handlers that run now
    concurrency = _Int(5)  # handlers that may run at once
    generation = _Int(6)  # counts the rolling restarts
    stopping: bool = _Flag(7)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # the supervisor told this child to go
    peers = _Int(9)  # how many of its role are to serve, itself included; 0 = nobody counts them
    recycling: bool = _Flag(8)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # this child goes by itself: max_jobs or max_rss

    started_at = _Double(0)  # when it was forked
    ticked_at = _Double(1)  # last turn of its event loop, each 100 ms; 0 before the first
    reserved_at = _Double(2)  # last successful reserve; 0 before the first

    def __init__(self, index: int, memory: memoryview, cells: int, rows: int) -> None:
        self.index = index
        self._header = memory[:_HEADER]
        self._ints = self._header[:_DOUBLES_AT].cast("q")
        self._doubles = self._header[_DOUBLES_AT:_ROLE_AT].cast("d")
        names_at = _HEADER + cells * 8
        rows_at = names_at + NAMES_SIZE
        self.cells: memoryview[float] = memory[_HEADER:names_at].cast("d")
        """The counters of this child. Never zeroed when the slot is used again: sums over the board only grow."""
        self.names = memory[names_at:rows_at]
        """The names of the series in ``cells``; they stay with the cells."""
        self.rows = memory[rows_at : rows_at + rows * ROW_SIZE]
        """One row per running handler: a length byte (0 = no handler), then the job id."""

    def __repr__(self) -> str:
        return f"<Slot {self.index} {self.state.name} {self.role or '-'} pid={self.pid}>"

    @property
    def state(self) -> SlotState:
        """Where the child is in its life."""
        return SlotState(self._ints[0])

    @state.setter
    def state(self, state: SlotState) -> None:
        self._ints[0] = state

    @property
    def alive(self) -> bool:
        """Whether a process stands behind this slot (it may be about to be found dead)."""
        return self.state in _ALIVE

    @property
    def role(self) -> str:
        """What kind of child it is, as in its spec; at most 31 bytes."""
        return self._text(_ROLE_AT)

    @role.setter
    def role(self, role: str) -> None:
        self._set_text(_ROLE_AT, _ROLE_SIZE, "role", role)

    @property
    def worker_id(self) -> str:
        """The holder of this child's leases in Redis; empty until it has one. At most 119 bytes."""
        return self._text(_WORKER_ID_AT)

    @worker_id.setter
    def worker_id(self, worker_id: str) -> None:
        self._set_text(_WORKER_ID_AT, _WORKER_ID_SIZE, "worker id", worker_id)

    def running_ids(self) -> list[str]:
        """The ids of the jobs whose handler has started. Exact for a dead child, a glance for a living one."""
        lengths = self._lengths()
        starts = (row * ROW_SIZE + 1 for row, length in enumerate(lengths) if length)
        return [self._decode(self.rows[at : at + min(self.rows[at - 1], ROW_SIZE - 1)]) for at in starts]

    def clear_rows(self) -> None:
        """Forget the running jobs. Writes only to rows in use: an untouched page costs no memory."""
        for row, length in enumerate(self._lengths()):
            if length:
                self.rows[row * ROW_SIZE] = 0

    def _lengths(self) -> bytes:
        """The length bytes of the rows that this child can have used: reading the others would cost memory."""
        used = self.concurrency * ROW_SIZE or len(self.rows)
        return bytes(self.rows[:used:ROW_SIZE])

    def free(self) -> None:
        """Give the slot to the next child: whoever calls this has handed the dead child's jobs back."""
        self.clear_rows()
        self.worker_id = ""
        self.busy = 0
        self.state = SlotState.FREE  # last: from here on the supervisor may claim it

    def _claim(self, role: str) -> None:
        if self.started_at:  # used before; reading the rows of a fresh slot would only cost memory
            self.clear_rows()
        for at in range(1, _INTS):
            self._ints[at] = 0
        for at in range(_DOUBLES):
            self._doubles[at] = 0.0
        self.worker_id = ""
        self.role = role
        self.started_at = time.monotonic()
        self.state = SlotState.STARTING

    def _text(self, at: int) -> str:
        return self._decode(self._header[at + 1 : at + 1 + self._header[at]])

    def _set_text(self, at: int, size: int, what: str, text: str) -> None:
        data = text.encode()
        if len(data) >= size:
            raise ValueError(f"{what} {text!r} is {len(data)} bytes long; the board holds {size - 1}")
        self._header[at] = 0  # a reader between these lines sees no text, never a mixture of two
        self._header[at + 1 : at + 1 + len(data)] = data
        self._header[at] = len(data)

    @staticmethod
    def _decode(data: memoryview) -> str:
        return bytes(data).decode(errors="replace")


class Board:
    """The shared memory of one supervisor and its children: make it before the first fork.

    ``slots`` is the most children that can be on it at once, the dead ones whose jobs are not yet handed back
    included. Memory is used only where somebody writes: a worker with few tasks costs a handful of pages.
    """

    def __init__(self, slots: int, *, cells: int = CELLS, rows: int = ROWS) -> None:
        if slots < 1:
            raise ValueError(f"a board needs at least one slot, not {slots}")
        size = _HEADER + cells * 8 + NAMES_SIZE + rows * ROW_SIZE
        size += -size % _PAGE
        self._memory = memoryview(mmap.mmap(-1, _PAGE + slots * size))  # anonymous and shared: fork() inherits it
        self._ints = self._memory[:_PAGE].cast("q")
        starts = range(_PAGE, _PAGE + slots * size, size)
        self._slots = [Slot(i, self._memory[at : at + size], cells, rows) for i, at in enumerate(starts)]

    def __getitem__(self, index: int) -> Slot:
        return self._slots[index]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def stopping(self) -> bool:
        """Whether the supervisor as a whole is on its way out (written by the supervisor)."""
        return bool(self._ints[0])

    @stopping.setter
    def stopping(self, stopping: bool) -> None:
        self._ints[0] = stopping

    @property
    def quiet(self) -> bool:
        """Whether workers are to take nothing new (written by the supervisor).

        A worker looks here before its first reserve: the signal that says so may have come before its handler.
        """
        return bool(self._ints[1])

    @quiet.setter
    def quiet(self, quiet: bool) -> None:
        self._ints[1] = quiet

    def claim(self, role: str) -> Slot | None:
        """The first free slot, now STARTING with every field but its counters reset; ``None`` when all are taken.

        For the supervisor only: two processes that claim could get the same slot.
        """
        for slot in self._slots:
            if slot.state == SlotState.FREE:
                slot._claim(role)
                return slot
        return None

    def may_recycle(self, slot: Slot) -> bool:
        """Whether ``slot``'s child may go now to be replaced; if so, its ``recycling`` flag is set.

        One of a role at a time: no, unless all the others serve. One that has gone before is no hindrance as soon as its
        successor serves: its last jobs may take long. There is no lock: of two that ask in the same instant both may be
        refused, and ask again after their next job.
        """
        if slot.recycling:
            return True
        slot.recycling = True
        others = [other for other in self._slots if other is not slot and other.role == slot.role]
        coming = any(other.state in (SlotState.STARTING, SlotState.BOOTED) for other in others)
        serving = sum(other.state in SERVING and not other.recycling for other in others)
        if coming or serving < slot.peers - 1:
            slot.recycling = False
            return False
        return True


@dataclass(frozen=True, slots=True)
class ChildContext:
    """What the supervisor hands to a child's entry point, ``entry(context) -> exit code``, after the fork.

    Signals arrive at their default action, except INT, HUP, TSTP, TTIN, TTOU, USR1 and USR2, which are ignored until
    the child sets handlers of its own (INT stays ignored: Ctrl-C goes to the whole group, the supervisor decides).
    ``TERM`` = drain and return 0, ``QUIT`` = stop now and hand jobs back, ``TSTP``/``CONT`` = quiet/resume,
    ``USR2`` = dump.

    The child sets ``slot.state`` to BOOTED when the application is imported and to RUNNING when it serves; what ends
    before BOOTED counts as a broken start, so waiting for Redis comes after it. Exit codes: 0 = as intended, 2 = cannot
    work like this (configuration, import). After the entry point returned, :func:`run_exit_functions` and ``os._exit`` follow.
    """

    slot: Slot
    board: Board
    settings: Any
    supervisor_pid: int
    number: int = 1
    """Which of its role this child is, from 1; a replacement has the number of the one it replaces."""
    control_fd: int = -1
    """The monitor's only: a byte per dead worker, end of file when the supervisor is gone. Non-blocking."""

    def orphaned(self) -> bool:
        """Whether the supervisor is gone. Linux kills workers then; elsewhere they look here each second or so."""
        return os.getppid() != self.supervisor_pid


def exit_text(status: int) -> str:
    """A waitpid() status in words.

    >>> exit_text(0), exit_text(2 << 8), exit_text(9)
    ('exit 0', 'exit 2', 'signal SIGKILL')
    """
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"


def run_exit_functions(code: int, seconds: float = 5.0) -> None:
    """Call what the application has registered with :mod:`atexit`: this process ends with ``os._exit``, as a thread may never end.

    A tracing or error-reporting client sends its last words there. After so many seconds the process ends with ``code`` all the same.
    """
    limit = threading.Timer(seconds, os._exit, (code,))
    limit.daemon = True
    with contextlib.suppress(RuntimeError):  # no room for a thread: whoever waits for this process kills it
        limit.start()
    with contextlib.suppress(BaseException):  # also SystemExit: it is on its way
        atexit._run_exitfuncs()
    limit.cancel()
