"""When a limiter will have units, as far as its store has said."""

from __future__ import annotations

import math
from typing import Final

from fastq.limits import Terms

__all__ = ["UNKNOWN", "Forecast"]

UNKNOWN: Final = -math.inf
"""A time at which nobody knows of anything that stands in the way."""

_FRESH: Final = 0.1  # seconds for which "not yet" is believed without asking again


class Forecast:
    """What the store said last."""

    __slots__ = ("_told_at", "_units", "at")

    def __init__(self) -> None:
        self.at = UNKNOWN
        """The monotonic time at which units will be there."""
        self._units = 1.0  # that will be there then
        self._told_at = UNKNOWN

    def tell(self, now: float, wait_us: int, units: float) -> None:
        """That many units will be there in ``wait_us``."""
        self._told_at = now
        self.at = now + wait_us / 1e6 if wait_us > 0 else UNKNOWN
        self._units = units

    def forget(self) -> None:
        """Something has changed."""
        self.at = self._told_at = UNKNOWN

    def fresh(self, now: float) -> bool:
        """Whether it may be believed although nobody is about to ask."""
        return now - self._told_at <= _FRESH

    def forbids(self, cost: int, now: float) -> bool:
        """Whether so many units cannot be there yet: asking would be in vain."""
        return now < self.at and self.fresh(now) and cost >= self._units

    def earliest(self, units: float, held: int, now: float, terms: Terms) -> float:
        """When that many units can be there, ``held`` of them being here; UNKNOWN: perhaps now."""
        if self.at <= now or units < self._units:
            return UNKNOWN
        missing = max(0.0, units - self._units - held)
        return self.at + (missing / terms.rate if terms.kind == "bucket" else 0.0)
