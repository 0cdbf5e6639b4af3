"""A Redis that is away, or that refuses: what a worker says of it, and how long it waits before the next try."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

from fastq.errors import BrokerError, BrokerReplyError

__all__ = ["Trouble", "hopeless", "refused"]

log = logging.getLogger("fastq.worker")

TELL_AGAIN = 10.0
"""Seconds between two lines about the same trouble."""
FIRST, LONGEST = 0.05, 1.0
"""Seconds: the first pause, and the longest."""


def refused(queue: str, error: BrokerReplyError) -> BrokerReplyError:
    """The same, with the queue that it is about, and what to do about a key that somebody else has written."""
    hint = f": 'fastq check {queue}' names the key" if error.code == "WRONGTYPE" else ""
    return BrokerReplyError(f"{error} - in queue {queue}{hint}")


def hopeless(error: BrokerError) -> bool:
    """Whether it is about who asks, and asking again does not help."""
    return isinstance(error, BrokerReplyError) and error.code in ("NOAUTH", "WRONGPASS", "NOPERM")


class Trouble:
    """Begins with an error and ends with a turn: what Redis says to a connection alone is no proof that it serves."""

    def __init__(self) -> None:
        self._pause = 0.0
        self._told_at = 0.0
        self._told_refusal = False

    def goes_on(self, error: BrokerError) -> float:
        """Say it, now and then; the seconds until the next try, twice as many each time."""
        first, self._pause = self._pause == 0.0, min(max(self._pause * 2, FIRST), LONGEST)
        now, refused = time.monotonic(), isinstance(error, BrokerReplyError)
        if first or now - self._told_at > TELL_AGAIN or refused is not self._told_refusal:
            self._told_at, self._told_refusal = now, refused
            level = logging.ERROR if refused else logging.WARNING
            what = "redis refuses, retrying" if refused else "redis unavailable, retrying"
            log.log(level, what, extra={"fields": {"error": str(error), "in": self._pause}})
        return self._pause * random.uniform(0.5, 1.0)

    def ends(self, held: Callable[[], int]) -> None:
        """A turn went well, or there was none to do. Nothing is said if there was no trouble; else how many jobs are held."""
        if self._pause:
            self._pause = 0.0
            log.info("redis is back", extra={"fields": {"held": held()}})
