"""One acquire that waits."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Final

__all__ = ["MISSED", "Waiter"]

MISSED: Final = 3
"""Times that a waiter runs too late for what it was granted, until it uses that all the same; and that it has an answer too late, if it
asked for one alone."""


class Waiter:
    """One acquire that waits: its result is whether a rule was checked, or an exception."""

    __slots__ = ("cost", "deadline", "future", "granted", "holder", "missed", "timeout", "timer", "until")

    def __init__(self, cost: int, deadline: float, timeout: float, future: asyncio.Future[bool]) -> None:
        self.cost = cost
        self.deadline = deadline
        self.timeout = timeout  # as the caller said it
        self.future = future
        self.holder = ""  # of its slot, once it has one
        self.until = math.inf  # monotonic time up to which what it was granted may be used
        self.missed = 0  # times that it, or its answer, was too late
        self.granted = 0  # the store's time at which it was served, µs
        self.timer: asyncio.TimerHandle | None = None

    def in_time(self) -> bool:
        """Whether what it was granted may still be used, now that it runs: the event loop may have been blocked since.

        In a loop that is always too busy for that, it passes late rather than never.
        """
        return time.monotonic() <= self.until or self.missed >= MISSED
