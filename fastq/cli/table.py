"""Answers for people: aligned columns, durations, moments. What a job brings along is escaped here (A-16)."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fastq.errors import safe_text

__all__ = ["Cell", "counted", "duration", "moment", "pairs", "rows"]

Cell = str | int | None

SCALES = (("d", 86_400, "h", 3_600), ("h", 3_600, "m", 60), ("m", 60, "s", 1))
"""A unit, its seconds, and what its rest is counted in."""

WIDTH = 60
"""Characters of one cell; longer text is cut."""


def rows(head: Sequence[str], body: Iterable[Sequence[Cell]]) -> Iterator[str]:
    """The lines of a table: numbers to the right, text to the left, nothing after the last column."""
    cells = [list(head), *([_cell(value) for value in row] for row in body)]
    raw = list(body) if isinstance(body, Sequence) else []
    right = [any(isinstance(row[i], int) for row in raw) for i in range(len(head))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        yield "  ".join(padded).rstrip()


def pairs(values: Mapping[str, Cell]) -> Iterator[str]:
    """One line per name that has a value."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        if value not in (None, ""):
            yield f"{name.ljust(width)}  {safe_text(str(value))}"


def _cell(value: Cell) -> str:
    return "-" if value is None or value == "" else safe_text(str(value), WIDTH)


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "job"), counted(1_200, "dead letter")
    ('1 job', '1,200 dead letters')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float | None) -> str:
    """A duration in at most two units.

    >>> duration(0.25), duration(7.34), duration(75), duration(3_700), duration(90_000), duration(-5)
    ('250ms', '7.3s', '1m15s', '1h01m', '1d01h', '-5.0s')
    """
    if seconds is None:
        return ""
    if not math.isfinite(seconds):  # a foreign writer's number
        return "?"
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 1:
        return f"{seconds * 1_000:.0f}ms"
    if seconds < 60:
        return f"{seconds:.1f}s"
    unit, size, lower, part = next(scale for scale in SCALES if seconds >= scale[1])
    whole, rest = divmod(int(seconds), size)
    return f"{whole}{unit}{rest // part:02d}{lower}"


def moment(epoch: float | None) -> str:
    """A point in time in this machine's zone.

    >>> len(moment(1_800_000_000.5))
    19
    """
    if epoch is None:
        return ""
    try:
        return dt.datetime.fromtimestamp(epoch).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):  # a foreign writer's number
        return "?"
