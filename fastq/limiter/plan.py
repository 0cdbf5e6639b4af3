"""How a limiter is configured."""

from __future__ import annotations

import msgspec

from fastq.limits import Rule

__all__ = ["Plan"]


class Plan(msgspec.Struct):
    """How a limiter is configured.

    timeout: seconds that ``acquire`` waits unless the call says otherwise; None: as long as it takes.
    on_error: what happens while the store cannot be asked: "closed": nobody passes, "open": everybody does.
    lease: seconds after which the slot of a killed process is free.
    adaptive: after a penalty the rate is halved, and grows back, from nothing to all in so many seconds; 0: it does not.
    """

    id: str
    rule: Rule
    timeout: float | None = None
    on_error: str = "closed"
    lease: float = 15.0
    adaptive: float = 0.0
