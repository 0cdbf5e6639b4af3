"""Queues that are split into partitions, so that one hot queue spreads over the masters of a cluster. Pure.

The jobs of queue ``mail`` with 4 partitions lie under ``{mail:0}`` to ``{mail:3}``. ``mail`` itself, its home, goes on being
served: its schedules are there, and what was enqueued before it was split (docs/adr/0016-partitions.md).

A job's partition is a hash of its id, so that whoever has the id finds the job; a unique key picks the partition where
there is one, and the id is made to lead there, too.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastq.errors import ConfigError
from fastq.values import PARTITION_NAME, check_queue_name, quoted

__all__ = [
    "MOST_PARTITIONS",
    "check_count",
    "check_partition",
    "id_for",
    "is_partition",
    "parse_partitions",
    "partition_for",
    "partitions_text",
    "queue_of",
    "served",
    "spread",
]

MOST_PARTITIONS = 64
"""A worker asks each of them for jobs, and listens to each."""

_PART = re.compile(r"([0-9a-f]{24})[-.]")
"""The jobs of a batch (``<batch>-<n>``) and of a workflow (``<workflow>.<n>``) are where it is."""


def is_partition(name: str) -> bool:
    """Whether this names a queue, ``mail``, or a partition of one, ``mail:3``."""
    return PARTITION_NAME.fullmatch(name) is not None


def check_partition(name: object) -> str:
    """``name``, if it can name a queue or a partition of one; else InvalidQueueName."""
    if isinstance(name, str) and is_partition(name):
        return name
    return check_queue_name(name)  # which says what a name is


def queue_of(name: str) -> str:
    """The queue of a partition, or the queue itself.

    >>> queue_of("mail:3"), queue_of("mail")
    ('mail', 'mail')
    """
    return name.partition(":")[0]


def spread(queue: str, count: int) -> tuple[str, ...]:
    """The partitions that the jobs of a queue are spread over; of one with ``count`` 1, the queue itself.

    >>> spread("mail", 2), spread("mail", 1)
    (('mail:0', 'mail:1'), ('mail',))
    """
    return tuple(f"{queue}:{number}" for number in range(count)) if count > 1 else (queue,)


def served(queue: str, count: int, listed: Iterable[str] = ()) -> list[str]:
    """What somebody serves who serves ``queue``: its home, its partitions, and those that others have announced.

    >>> served("mail", 2, ["mail:5", "other", "mail:1"])
    ['mail', 'mail:0', 'mail:1', 'mail:5']
    """
    others = sorted(name for name in listed if name.startswith(f"{queue}:") and is_partition(name))
    return list(dict.fromkeys((queue, *spread(queue, count), *others)))


def partition_for(queue: str, count: int, key: str) -> str:
    """The partition of a job with this id, or this unique key: the same in every process and release."""
    if count < 2:
        return queue
    part = _PART.match(key)
    return f"{queue}:{zlib.crc32((part[1] if part else key).encode()) % count}"


def id_for(queue: str, count: int, wanted: str, new_id: Callable[[], str]) -> str:
    """A new id that leads to the partition ``wanted``; takes ``count`` tries on average, 0.6 µs each."""
    while True:
        job_id = new_id()
        if partition_for(queue, count, job_id) == wanted:
            return job_id


def check_count(queue: str, count: object) -> int:
    """``count``, if a queue can have so many partitions; else ConfigError."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_PARTITIONS:
        raise ConfigError(
            f"queue {queue!r}: partitions={quoted(count)} must be a whole number from 1 to {MOST_PARTITIONS}"
        )
    return count


def parse_partitions(text: str) -> dict[str, int]:
    """Queues and into how many partitions they are split.

    >>> parse_partitions("mail=4, reports=2")
    {'mail': 4, 'reports': 2}

    Raises ConfigError (a name that cannot be one: InvalidQueueName).
    """
    counts: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        queue, _, digits = (word.strip() for word in part.partition("="))
        if not re.fullmatch("[0-9]{1,4}", digits):
            raise ConfigError(f"partitions={quoted(text)}: write 'mail=4,reports=2'")
        counts[check_queue_name(queue)] = check_count(queue, int(digits))
    return counts


def partitions_text(raw: Any) -> str:
    """A file or an argument may also hold a table: ``{"mail": 4}``."""
    if isinstance(raw, Mapping):
        raw = ",".join(f"{queue}={count}" for queue, count in raw.items())
    if not isinstance(raw, str):
        raise ConfigError(f"{quoted(raw)} is no table of partitions: write 'mail=4,reports=2'")
    return raw
