"""Service: a named loop that starts, stops and survives its errors; every loop of fastq is one.

A service calls its *step* again and again; the step returns in how many seconds it wants to run next::

    async def promote() -> float:
        moved, next_due = await broker.call(...)
        return next_due

    async with Service("promote", promote) as service:
        service.wake()  # something happened: run now

What holds, whatever is called in whatever order, at the same time or cancelled half-way:

- one step runs at a time, and no step runs after ``stop`` has returned (until the next ``start``);
- of ``start`` and ``stop`` the last call wins; each may be repeated;
- a ``wake`` is never lost: if it comes while a step runs, the step runs once more;
- an error of the step is logged and delays the next run; nothing but ``stop`` ends the loop.

A service belongs to the event loop that it was started in.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Protocol, Self

from fastq.errors import FastQError
from fastq.logs import fields
from fastq.retry import Exponential, RetryPolicy

__all__ = ["BACKOFF", "Clock", "LoopClock", "Service", "Step", "Timer"]

log = logging.getLogger("fastq.service")

Step = Callable[[], Awaitable[float]]
"""One turn of a loop; returns the seconds until the next. 0 = at once, ``math.inf`` = when woken."""

BACKOFF = Exponential(base=0.25, factor=2, max_delay=15, jitter="equal")
"""The pause after the n-th failure in a row: soon enough after a failover, rare enough in a long outage."""

GRACE = 5.0
"""Seconds that ``stop`` leaves a running step before it is cancelled: a few Redis round trips."""


class Timer(Protocol):
    """What ``call_later`` returns."""

    def cancel(self) -> None:
        """The callback is not called any more."""


class Clock(Protocol):
    """The time of a service; a test passes one that it moves itself."""

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Timer:
        """Call ``callback()`` in the event loop, in ``delay`` seconds (always finite)."""
        ...


class LoopClock:
    """The time of the running event loop."""

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Timer:
        """As the loop's own ``call_later``."""
        return asyncio.get_running_loop().call_later(delay, callback)


class Service:
    """A loop around ``step``.

    Args:
        name: of the service in log lines, and of its asyncio task (``fastq:name``).
        step: one turn; returns the seconds until the next.
        jitter: 0 to 1: a pause is shortened by up to this part of it, so that many processes do not act in unison;
            it is never lengthened, so deadlines hold.
        clock: what measures pauses; default: the event loop.
        backoff: the pause after errors.
        rng: what draws jitter; default: the process's.
    """

    def __init__(
        self,
        name: str,
        step: Step,
        *,
        jitter: float = 0.0,
        clock: Clock | None = None,
        backoff: RetryPolicy = BACKOFF,
        rng: random.Random | None = None,
    ) -> None:
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter={jitter!r} must be between 0 and 1")
        self.name = name
        self.runs = 0  # steps that ended well, since the service was made
        self.failures = 0  # steps that failed since the last one that ended well
        self._step = step
        self._jitter = jitter
        self._clock: Clock = clock or LoopClock()
        self._backoff = backoff
        self._draw = random.random if rng is None else rng.random
        self._wanted = False  # what the last call of start or stop asked for
        # Of the present run, made anew by each start:
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._woken = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()

    def __repr__(self) -> str:
        state = "stopped" if not self.running else "stopping" if self._stopping else "running"
        return f"<Service {self.name}: {state}, runs={self.runs}, failures={self.failures}>"

    @property
    def running(self) -> bool:
        """Whether the loop exists: from ``start`` until it has really ended."""
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        """Begin to run steps, the first one at once; if the service is still stopping, after it has."""
        self._wanted = True
        # Not `_stopping = False`: whoever called stop waits for the end of that run.
        while self._wanted and self._stopping and self._task is not None and not self._task.done():
            if self._task is asyncio.current_task():
                raise RuntimeError(f"the step of service {self.name} cannot start it again")
            await asyncio.wait([self._task])
        if self._wanted and not self.running:
            self._begin()

    async def stop(self, grace: float = GRACE) -> None:
        """End the loop; a step that runs gets ``grace`` seconds, then it is cancelled. Returns when it has ended.

        If this call is cancelled itself, the loop still ends, after its step. Called by the step, it returns at once
        and the loop ends after the step.
        """
        self._wanted = False
        task = self._task
        if task is None or task.done():
            return
        self._stopping = True
        self._wake()
        if task is asyncio.current_task():
            return
        timer = self._clock.call_later(grace, task.cancel) if grace < math.inf else None
        try:
            await asyncio.wait([task])
        finally:
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        """Run the step now, or once more if it is running. Without effect on a service that does not run."""
        if self.running:
            self._wake()

    async def settled(self) -> None:
        """Wait until the service has nothing to do: it pauses, or has ended. For tests."""
        await self._settled.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    # The loop.

    def _begin(self) -> None:
        self._stopping = False
        self._woken, self._settled = asyncio.Event(), asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"fastq:{self.name}")
        # Not in a `finally` of the loop: a task that is cancelled before its first turn never gets there.
        settled = self._settled
        self._task.add_done_callback(lambda _: settled.set())

    def _wake(self) -> None:
        self._woken.set()
        self._settled.clear()

    async def _run(self) -> None:
        while not self._stopping:
            self._woken.clear()  # before the step: a wake that comes during it counts
            delay = await self._turn()
            await self._pause(delay)

    async def _turn(self) -> float:
        """One step; seconds until the next."""
        try:
            delay = _checked(await self._step())
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return self._failed(error)  # something that the step waited for was cancelled, not this loop
        except Exception as error:  # noqa: BLE001  # nothing that a step does may end its loop
            return self._failed(error)
        if self.failures:
            log.info("service is back", extra=fields(service=self.name, failures=self.failures))
        self.runs += 1
        self.failures = 0
        return delay if delay == math.inf else delay * (1 - self._jitter * self._draw())

    def _failed(self, error: BaseException) -> float:
        """Say so, with a traceback for the first of several unexpected errors; seconds until the next run."""
        self.failures += 1
        delay = self._backoff.delay(self.failures)
        said = fields(service=self.name, error=f"{type(error).__name__}: {error}", failures=self.failures, delay=delay)
        if isinstance(error, FastQError):
            log.warning("service step failed", extra=said)
        else:
            log.error("service step failed", extra=said, exc_info=error if self.failures == 1 else None)
        return delay

    async def _pause(self, delay: float) -> None:
        if self._woken.is_set():
            await asyncio.sleep(0)  # a step that wakes its own service must not hold up the event loop
            return
        timer = self._clock.call_later(delay, self._wake) if delay < math.inf else None
        self._settled.set()
        try:
            await self._woken.wait()
        finally:
            if timer is not None:
                timer.cancel()


def _checked(delay: object) -> float:
    if isinstance(delay, bool) or not isinstance(delay, (int, float)) or math.isnan(delay):
        raise TypeError(f"a step returns the seconds until the next one, not {delay!r}")
    return max(0.0, float(delay))
