"""Whether a limiter's store can be asked: it refuses, or it says nothing for too long."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Final

from fastq.errors import BrokerError, BrokerUnavailable
from fastq.limiter.plan import Plan
from fastq.limiter.stores import Store
from fastq.logs import fields

__all__ = ["SILENT", "Outage"]

log = logging.getLogger("fastq.limits")

SILENT: Final = 1.0
"""Seconds without an answer after which a store counts as one that cannot be asked; of a limiter whose units may be used for longer
than that, as long as these. The request goes on: its answer ends the outage."""

_STEPS: Final = 4  # in which silence is measured: between two of them a loop that was blocked reads what came in
_KNOWN: Final = 0.1  # seconds without an answer that are enough while the outage lasts
_LEAST_PAUSE, _MOST_PAUSE = 0.02, 0.5  # seconds between two attempts


class Outage:
    """What one gate knows of its store.

    Args:
        tell: called when the store has been silent for too long.
    """

    def __init__(self, plan: Plan, store: Store, tell: Callable[[], None]) -> None:
        self.failure: BrokerError | None = None
        """Why the store could not be asked; None: the last answer was one."""
        self.silent = False
        """Whether a request is under way that has not been answered for too long."""
        self.pause = 0.0
        """Seconds until the store is asked again."""
        self._plan = plan
        self._store = store
        self._tell = tell
        self._until = 0.0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def known(self, now: float) -> bool:
        """Whether asking now would be in vain."""
        return self.failure is not None and (self.silent or now < self._until)

    @contextlib.contextmanager
    def watch(self, use_within: float, wait: float = 0.0) -> Iterator[None]:
        """Around what the store has to answer, once it has waited itself for ``wait`` seconds at most."""
        steps, step = (1, _KNOWN) if self.failure is not None else (_STEPS, max(SILENT, use_within) / _STEPS)
        self._timer = self._loop.call_later(wait + step, self._step, steps - 1, step)
        try:
            yield
        finally:
            self.silent = False
            self._timer.cancel()

    def _step(self, left: int, step: float) -> None:
        if left:
            self._timer = self._loop.call_later(step, self._step, left - 1, step)
            return
        self.silent = True
        self._note(BrokerUnavailable(f"{self._store.shown} does not answer: is it stopped, or overloaded?"))
        self._tell()

    def failed(self, error: BrokerError) -> None:
        """The store refused, or cannot be reached. It is asked again after a pause."""
        self._note(error)
        self.pause = min(max(_LEAST_PAUSE, self.pause * 2), _MOST_PAUSE)
        self._until = time.monotonic() + self.pause

    def _note(self, error: BrokerError) -> None:
        if self.failure is None:
            told = fields(limiter_id=self._plan.id, on_error=self._plan.on_error, error=str(error))
            log.warning("limiter cannot ask its store", extra=told)
        self.failure = error

    def over(self) -> None:
        """The store has answered."""
        if self.failure is not None:
            log.info("limiter asks again", extra=fields(limiter_id=self._plan.id))
            self.failure, self.pause = None, 0.0
