"""How many jobs a worker finishes per second: what may be reserved beyond its free slots is a matter of this."""

from __future__ import annotations

__all__ = ["Rate"]

SMOOTH = 0.3
"""Seconds over which the measured rate is smoothed: one slow or one quick tick says little."""

RISE = 0.03
"""Seconds over which it is smoothed while it rises, all slots in use again and again: a worker into which a load breaks would
else reserve no more than its slots at a time for as long as :data:`SMOOTH`, and jobs wait that long."""

LEAST = 0.01
"""Seconds that a look between two ticks has to reach back over; what was finished in less is no rate."""


class Rate:
    """The rate of finished jobs.

    Args:
        now: monotonic time in seconds.
        slots: how many jobs run at a time. So many that end together say nothing of the rate of the next ones.
    """

    __slots__ = ("_at", "_count", "_slots", "_ticked", "value")

    def __init__(self, now: float, slots: int) -> None:
        self.value = 0.0
        """Jobs per second, smoothed."""
        self._slots = slots
        self._at = now
        self._count = 0  # at ``_at``
        self._ticked = 0  # at the last tick

    def measure(self, now: float, finished: int) -> int:
        """To be called at each tick, with the count of all jobs finished so far. How many were so since the last tick."""
        done, elapsed, new = finished - self._count, now - self._at, finished - self._ticked
        if elapsed > 0:
            self.value += (done / elapsed - self.value) * min(elapsed / SMOOTH, 1.0)
        self._at, self._count, self._ticked = now, finished, finished
        return new

    def notice(self, now: float, finished: int) -> None:
        """To be called where more jobs wait than there was room for: a rise shows here before the next tick.

        Of those that were finished so many as there are slots began before the time that is looked at, and are left out.
        """
        done, elapsed = finished - self._count - self._slots, now - self._at
        if elapsed < LEAST or done <= 0:
            return
        seen = done / elapsed
        if seen > self.value:
            self.value += (seen - self.value) * min(elapsed / RISE, 1.0)
            self._at, self._count = now, finished

    def forget(self) -> None:
        """What was reserved beyond the free slots did not start: begin anew."""
        self.value = 0.0
