"""Jobs for which no worker is here: of a task that this release does not know, or of an envelope that only a newer one reads.

While releases change, another worker may know them: they go back, again and again, for ``unknown_task_ttl`` seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import msgspec

from fastq.errors import did_you_mean
from fastq.job import Envelope, Extra, encode

__all__ = ["given_back", "hint", "stray_delay"]


def stray_delay(strays: int) -> float:
    """Seconds until an unknown task is offered again: 1, 2, 4 … 30."""
    return float(min(2**strays, 30)) if strays < 6 else 30.0


@functools.lru_cache(maxsize=256)
def _hint(task: str, known: tuple[str, ...]) -> str:
    return did_you_mean(task, known).removeprefix(" - ") or "is it imported by the application?"


def hint(task: str, known: Iterable[str]) -> str:
    """What may be wrong with the name of a task that none of those is."""
    return _hint(task, tuple(known))


def given_back(envelope: Envelope, ttl: float) -> tuple[int, bytes] | str:
    """In how many ms, and with which envelope, a job of an unknown task is due again; or for how long it has waited."""
    extra = envelope.extra or Extra()
    strays = max(extra.strays, 0)  # whoever writes to Redis may write any number
    waited = 2.0**strays - 1 if strays <= 5 else 31.0 + 30.0 * (strays - 5)
    if waited >= ttl:
        return f"no worker knew the task {envelope.task!r} for {waited:g} s"
    delay = stray_delay(strays)
    later = msgspec.structs.replace(extra, strays=strays + 1)
    return round(delay * 1_000), encode(msgspec.structs.replace(envelope, extra=later))
