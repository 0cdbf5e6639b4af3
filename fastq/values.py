"""One value of a setting, in the forms in which people write it: durations, sizes, queues. Pure."""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Mapping
from typing import Literal, get_args

import msgspec

from fastq.errors import ConfigError, InvalidOption, InvalidQueueName, safe_text

__all__ = [
    "DURATION_UNITS",
    "PARTITION_NAME",
    "Durability",
    "QueueOrder",
    "check_queue_name",
    "is_replicated",
    "parse_duration",
    "parse_queues",
    "parse_size",
    "quoted",
]

Durability = Literal["stored", "replicated"]
"""What has to be true before a producer is told that its job is stored."""

DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)\s?(ms|[smhd])\s?")
#: Redis's own units: ``1k`` is 1000 bytes, ``1kb`` is 1024.
_SIZE_UNITS: Mapping[str, int] = {
    "": 1,
    "b": 1,
    **{letter: 1_000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}{b}": 1_024**power for power, letter in enumerate("kmgt", 1) for b in ("b", "i", "ib")},
}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s?([A-Za-z]{0,3})")
_QUEUE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
PARTITION_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}(?::(?:0|[1-9][0-9]?))?")
"""A queue, ``mail``, or one partition of it, ``mail:3`` (fastq/partitions.py)."""
_WEIGHT = re.compile(r"[0-9]{1,4}")
_MAX_QUEUES = 100  # each reserve looks at every queue it serves
_MAX_WEIGHT = 1_000


class QueueOrder(msgspec.Struct, frozen=True):
    """The queues a worker serves: in strict order (``weights`` is None), or each in proportion to its weight."""

    names: tuple[str, ...]
    weights: tuple[int, ...] | None = None


def parse_duration(value: object) -> float:
    """Seconds from a number, a ``timedelta``, or text such as ``250ms``, ``20s``, ``5m``, ``1h30m``, ``7d``.

    >>> parse_duration("1h30m"), parse_duration("250ms"), parse_duration("20"), parse_duration(2)
    (5400.0, 0.25, 20.0, 2.0)

    Raises ConfigError for anything else, and for what is negative or not finite.
    """
    if isinstance(value, dt.timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        seconds = _duration_text(value.strip())
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"a duration is a number of seconds or text such as '20s', not {quoted(value)}")
    else:
        seconds = _finite(value)
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"a duration must be finite and not negative, not {quoted(value)}")
    return seconds


def _duration_text(text: str) -> float:
    plain = _SIZE.fullmatch(text)
    if plain and not plain[2]:
        return float(text)
    total, end = 0.0, 0
    for match in _DURATION.finditer(text):
        if match.start() != end:
            break
        total += float(match[1]) * DURATION_UNITS[match[2]]
        end = match.end()
    if not text or end != len(text):
        raise ConfigError(f"{quoted(text)} is no duration: write 250ms, 20s, 5m, 2h, 7d, 1h30m or a number of seconds")
    return total


def _finite(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def parse_size(value: object) -> int:
    """Bytes from an integer or text; units as in redis.conf: ``kb``, ``mb``, ``gb`` count by 1024, ``k``, ``m``, ``g`` by 1000.

    >>> parse_size("512MB"), parse_size("1.5k"), parse_size(7)
    (536870912, 1500, 7)

    Raises ConfigError for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    unit = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{quoted(value)} is no size: write 512MB, 1gb, 64k or a number of bytes")
    return round(float(match[1]) * unit)


def check_queue_name(name: object) -> str:
    """``name``, if it can name a queue: 1 to 64 of ``A-Z a-z 0-9 _ -``; else InvalidQueueName."""
    if isinstance(name, str) and _QUEUE_NAME.fullmatch(name):
        return name
    raise InvalidQueueName(f"queue name {quoted(name)} must be 1 to 64 characters of A-Z a-z 0-9 _ -")


def parse_queues(text: str) -> QueueOrder:
    """The order in which a worker serves its queues.

    >>> parse_queues("critical,default")
    QueueOrder(names=('critical', 'default'), weights=None)
    >>> parse_queues("critical=6, default=3").weights
    (6, 3)

    Raises ConfigError (a name that cannot be one: InvalidQueueName).
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > _MAX_QUEUES:
        raise ConfigError(f"queues={quoted(text)} names {len(parts)} queues; a worker serves {_MAX_QUEUES} at most")
    pairs = [part.partition("=") for part in parts]
    names = tuple(_served_name(name.strip()) for name, _, _ in pairs)
    if len(set(names)) != len(names):
        raise ConfigError(f"queues={quoted(text)} names a queue twice")
    if not any(equals for _, equals, _ in pairs):
        return QueueOrder(names)
    if not all(equals for _, equals, _ in pairs):
        raise ConfigError(f"queues={quoted(text)}: give every queue a weight, or none")
    return QueueOrder(names, tuple(_weight(weight.strip(), text) for _, _, weight in pairs))


def _served_name(name: str) -> str:
    return name if PARTITION_NAME.fullmatch(name) else check_queue_name(name)


def _weight(digits: str, text: str) -> int:
    if _WEIGHT.fullmatch(digits) and 1 <= int(digits) <= _MAX_WEIGHT:
        return int(digits)
    raise ConfigError(f"queues={quoted(text)}: weight {quoted(digits)} must be 1 to {_MAX_WEIGHT}")


def quoted(value: object) -> str:
    """For messages: short and on one line, whatever came in."""
    try:
        return safe_text(repr(value), 120)
    except ValueError:  # an integer of more digits than Python prints
        return "a huge number"


def is_replicated(durability: str) -> bool:
    """Whether replicas must have it. Raises InvalidOption when it is no :data:`Durability`."""
    if durability not in get_args(Durability):
        raise InvalidOption(f"durability={durability!r:.50} is neither 'stored' nor 'replicated'")
    return durability == "replicated"
