"""Places to be filled and the processes that fill them: what the supervisor knows of each, and when to try again."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections import deque
from dataclasses import dataclass

from fastq.board import Slot, SlotState
from fastq.supervisor.child import ChildSpec

__all__ = ["BOOT_CRASHES", "QUICK_DEATH", "Child", "Losses", "Post", "restart_delay"]

BOOT_CRASHES = (
    5  # deaths in a row, before it has booted, after which the supervisor ends, unless another one of the role serves
)
QUICK_DEATH = 5.0  # seconds: a child that lived shorter than this is replaced with back-off
LONGEST_DELAY = 30.0  # seconds: where the back-off ends; with it a broken child costs two forks a minute
RECYCLE_EVERY = 1.0  # seconds: a child that recycles itself is forked no more often than this
BEARABLE, SPELL = 10, 10.0  # so many deaths of serving children within so many seconds are made good at once


def restart_delay(quick_deaths: int, base: float = 1.0) -> float:
    """Seconds to wait before the next start after so many quick deaths in a row: 0, then 1, 2, 4 … 30.

    >>> [restart_delay(n) for n in range(8)]
    [0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    """
    return 0.0 if quick_deaths < 2 else min(base * 2.0 ** min(quick_deaths - 2, 30), LONGEST_DELAY)


class Losses:
    """The recent deaths of children that had served: a burst of kills is made good at once, a crash loop is not.

    What has served once is no broken start: while its place is empty, its jobs wait. Only when such deaths do not end (a job
    that kills every worker that takes it) do the forks have to be spread.
    """

    def __init__(self) -> None:
        self._at: deque[float] = deque(maxlen=BEARABLE + 1)

    def bear(self, now: float) -> bool:
        """Count one more; whether there were at most ``BEARABLE`` within the last ``SPELL`` seconds, this one included."""
        self._at.append(now)
        return len(self._at) <= BEARABLE or now - self._at[0] > SPELL


@dataclass(slots=True, eq=False)
class Child:
    """A process that was forked and not yet reaped. Until then its pid is ours and can be signalled safely."""

    pid: int
    slot: Slot
    spec: ChildSpec
    post: Post | None  # None once it is replaced or removed: nobody has to follow it
    generation: int
    started_at: float
    seen: SlotState = SlotState.STARTING  # the last state that was acted on
    kill_at: float = math.inf
    served: bool = False  # it came as far as RUNNING
    killed: bool = False

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def dismiss(self, patience: float) -> None:
        """Tell it to go, and when it will be killed; a second word does not give it more time."""
        if not self.slot.stopping:
            self.slot.stopping = True
            self.kill_at = time.monotonic() + patience
            self.send(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, once."""
        self.killed = True
        self.kill_at = math.inf
        self.send(signal.SIGKILL)


@dataclass(slots=True, eq=False)
class Post:
    """A place that is to be filled: worker 1, worker 2, the scheduler and so on."""

    role: str
    number: int
    child: Child | None = None
    replacement: Child | None = None  # of a rolling restart: started, not serving yet
    not_before: float = 0.0
    quick_deaths: int = 0  # in a row
    boot_crashes: int = 0  # in a row

    @property
    def vacant(self) -> bool:
        """Whether nobody is there and nobody is coming."""
        return self.child is None and self.replacement is None

    def penalise(self, base: float) -> None:
        """A start came to nothing, or to little: wait longer before the next."""
        self.quick_deaths += 1
        self.not_before = time.monotonic() + restart_delay(self.quick_deaths, base)

    def let_go(self, child: Child) -> None:
        """``child`` recycles itself: its last jobs may take long, and its successor starts meanwhile."""
        child.post = None
        if self.child is child:
            self.child = None
            self.not_before = child.started_at + RECYCLE_EVERY
        else:
            self.replacement = None

    def follow(self, child: Child, losses: Losses, *, booted: bool, recycled: bool, base: float) -> None:
        """Decide when the successor of ``child``, dead without having been told to go, may start."""
        now = time.monotonic()
        if recycled:
            self.not_before = child.started_at + RECYCLE_EVERY
        elif (child.served and losses.bear(now)) or (booted and now - child.started_at >= QUICK_DEATH):
            self.quick_deaths = 0
        else:
            self.penalise(base)
