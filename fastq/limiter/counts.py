"""What happens at a limiter, counted for whoever holds it and for the metrics of a worker."""

from __future__ import annotations

import msgspec

from fastq import metrics
from fastq.limits import UnitCount
from fastq.metrics import LimitCounter

__all__ = ["Counts"]


class Counts(msgspec.Struct):
    """What happened at a limiter in this process, all its partitions and event loops together.

    What :meth:`note` counts is counted in the metrics of a worker, too.
    """

    limiter: str = ""
    used: UnitCount = msgspec.field(default_factory=UnitCount)
    """Units used, as their tokens count them."""
    waits: int = 0
    """Acquires that could not be served at once."""
    wait_seconds: float = 0.0
    timeouts: int = 0
    requests: int = 0
    """Requests to the store."""
    granted: int = 0
    """Units that the store granted."""
    denied: int = 0
    """Requests that were granted nothing."""
    returned: int = 0
    """Units given back unused, as a waiter was cancelled or others were missing."""
    expired: int = 0
    """Units that nobody used in time, given back then."""
    late: int = 0
    """Replies that came later than their units may be used."""
    errors: int = 0
    """Requests that failed."""
    passed: int = 0
    """Acquires that passed unchecked because of ``on_error="open"``."""
    penalties: int = 0

    @property
    def units(self) -> int:
        """Units used."""
        return self.used.value

    def note(self, name: LimitCounter, n: int = 1) -> None:
        """Add ``n`` to one of these."""
        setattr(self, name, getattr(self, name) + n)
        if (worker := metrics.limits) is not None:
            worker.limit_count(self.limiter, name, n)

    def waited(self, job_type: str, seconds: float) -> None:
        """An acquire was served after a wait."""
        if (worker := metrics.limits) is not None:
            worker.limit_wait(self.limiter, job_type, seconds)

    def timed_out(self, job_type: str) -> None:
        """An acquire ended with LimitTimeout."""
        self.timeouts += 1
        if (worker := metrics.limits) is not None:
            worker.limit_timeout(self.limiter, job_type)
