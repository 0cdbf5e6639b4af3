"""Dead letters by what they died of: groups of the same error, and which ones a filter means."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import msgspec

from fastq.broker.command import Operation
from fastq.broker.inspector import PAGE, Inspector
from fastq.job import DeadLetter

__all__ = ["DeadGroup", "Filter", "chosen", "fingerprint", "groups"]

MOST = 100_000
"""Dead letters that are looked through; the latest ones. A queue keeps ``dead_max`` of them (10,000)."""

_VARIABLE = re.compile(r"""'[^']*'|"[^"]*"|0x[0-9a-fA-F]+|\b[0-9a-fA-F]{8,}(?:-[0-9a-fA-F]+)*\b|\d+(?:[.:,]\d+)*""")


class DeadGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Dead letters of one error of one task. Times are seconds since the epoch; ``message`` and ``id`` are of the latest."""

    fingerprint: str
    count: int
    task: str | None
    reason: str
    error_type: str
    message: str
    first: float
    last: float
    id: str


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead letters are meant; what is None does not matter."""

    task: str | None = None
    error: str | None = None  # type of the error, as shown
    group: str | None = None  # fingerprint

    def __bool__(self) -> bool:
        return self != Filter()

    def matches(self, letter: DeadLetter) -> bool:
        """Whether it is one of them."""
        return (
            (self.task is None or letter.task == self.task)
            and (self.error is None or letter.error_type == self.error)
            and (self.group is None or fingerprint(letter) == self.group)
        )


def fingerprint(letter: DeadLetter) -> str:
    """8 hexadecimal characters for the task, the kind of error and its message without what varies from job to job: numbers,
    hexadecimal ids and what stands in quotes.
    """
    message = _VARIABLE.sub("?", letter.error_message[:500])
    data = "\0".join((letter.task or "", letter.reason, letter.error_type, message))
    return hashlib.blake2b(data.encode("utf-8", "replace"), digest_size=4).hexdigest()


def groups(inspector: Inspector, queue: str) -> Operation[list[DeadGroup]]:
    """The dead letters of a queue by what they died of, the largest group first."""
    found: dict[str, DeadGroup] = {}
    for letter in (yield from _letters(inspector, queue)):
        key = fingerprint(letter)
        known = found.get(key)
        if known is None:
            found[key] = DeadGroup(
                fingerprint=key,
                count=1,
                task=letter.task,
                reason=letter.reason,
                error_type=letter.error_type,
                message=letter.error_message,
                first=letter.failed_at,
                last=letter.failed_at,
                id=letter.id,
            )
        else:
            found[key] = msgspec.structs.replace(known, count=known.count + 1, first=letter.failed_at)
    return sorted(found.values(), key=lambda group: (-group.count, -group.last))


def chosen(inspector: Inspector, queue: str, which: Filter, limit: int | None = None) -> Operation[list[str]]:
    """The ids that a filter means, the oldest death first, at most ``limit``."""
    letters = yield from _letters(inspector, queue)
    ids = [letter.id for letter in reversed(letters) if which.matches(letter)]
    return ids if limit is None else ids[:limit]


def _letters(inspector: Inspector, queue: str) -> Operation[list[DeadLetter]]:
    """Without their bodies, the latest death first. Deaths meanwhile move the pages: nothing is listed twice."""
    found: dict[str, DeadLetter] = {}
    for offset in range(0, MOST, PAGE):
        page = yield from inspector.dead(queue, offset, PAGE)
        for letter in page:
            found.setdefault(letter.id, msgspec.structs.replace(letter, body=b"", traceback=""))
        if len(page) < PAGE:
            break
    return list(found.values())


def paced(ids: list[str], rate: float | None) -> Iterator[tuple[list[str], float]]:
    """The pieces in which ids are sent back at so many a second, each with the seconds to wait after it; the last: 0."""
    size = len(ids) if rate is None else max(1, round(rate / 10))
    for start in range(0, len(ids), size or 1):
        piece = ids[start : start + size]
        last = start + size >= len(ids)
        yield piece, 0.0 if last or rate is None else len(piece) / rate
