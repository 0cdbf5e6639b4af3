"""Handlers that are plain functions: threads that take the next job by themselves, and a loop that hears of many ends at once.

An executor's future per job costs a pipe write, a Task and two turns of the GIL each. Here a thread that has ended a job takes the
next one without a word to the event loop, which is told once for all the jobs that have ended until it looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

from fastq.context import JobContext
from fastq.worker.ending import fields_of
from fastq.worker.soft import interruptible

__all__ = ["Threads", "thread_main"]

log = logging.getLogger("fastq.worker")

Landed: TypeAlias = Callable[[JobContext, Any, Any, BaseException | None], None]
"""Told in the event loop: the job, what came with it, what the handler returned, what it raised."""
_Work: TypeAlias = tuple[JobContext, Any, Context, Callable[..., Any], Any, Any, Landed]


class Threads:
    """The threads of one worker.

    Args:
        most: how many; they are started when there is work for them.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._threads = 0
        self._out = 0  # calls that have not landed
        self._todo: SimpleQueue[_Work | None] = SimpleQueue()
        self._done: deque[tuple[JobContext, Any, Landed, Any, BaseException | None]] = deque()
        self._told = False  # whether the loop will look
        self._held = False

    def put(
        self,
        job: JobContext,
        plan: Any,
        context: Context,
        fn: Callable[..., Any],
        args: Any,
        kwargs: Any,
        landed: Landed,
    ) -> None:
        """Call ``fn`` for a job in the next free thread; ``landed(job, plan, result, error)`` is called in the event loop then."""
        self._out += 1
        if self._threads < self._most and self._out > self._threads:
            try:
                self._add()
            except RuntimeError as error:  # the system has no room for one
                if not self._threads:
                    self._tell(job, plan, landed, error)
                    return
        elif self._held and self._out > self._threads:
            self._send_back(job, plan, landed)
            return
        self._todo.put((job, plan, context, fn, args, kwargs, landed))

    async def call(self, job: JobContext, fn: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The same, in the context of whoever waits for it."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self.put(job, future, copy_context(), fn, args, kwargs, _arrived)
        # Shielded: a cancelled waiter must not cancel a handler that has not started yet behind its back.
        return await asyncio.shield(future)

    def hold(self) -> None:
        """This worker stops: what waits for a thread goes back, also what comes from now on and finds none free.

        A thread may be taken for ever, and its worker waits for the jobs that it holds before it goes.
        """
        self._held = True
        with contextlib.suppress(Empty):
            while True:
                work = self._todo.get_nowait()
                if work is not None:
                    self._send_back(work[0], work[1], work[-1])

    def _add(self) -> None:
        """One more thread; a daemon: a handler that never ends does not hold the process up."""
        threading.Thread(target=self._work, name=f"fastq-handler_{self._threads + 1}", daemon=True).start()
        self._threads += 1

    def _send_back(self, job: JobContext, plan: Any, landed: Landed) -> None:
        job.stopping = job.stopping or "drain"
        self._tell(job, plan, landed, asyncio.CancelledError())

    def _tell(self, job: JobContext, plan: Any, landed: Landed, error: BaseException) -> None:
        """A job has ended without a thread."""
        self._done.append((job, plan, landed, None, error))
        if not self._told:
            self._told = True
            self._loop.call_soon(self._land)

    def _work(self) -> None:
        take, end, tell = self._todo.get, self._done.append, self._loop.call_soon_threadsafe
        while (work := take()) is not None:
            job, plan, context, fn, args, kwargs, landed = work
            result: Any = None
            error: BaseException | None = None
            try:
                result = context.run(thread_main, job, fn, args, kwargs)
            except BaseException as raised:  # noqa: BLE001 - also SystemExit: a handler does not end the thread
                error = raised
            end((job, plan, landed, result, error))
            if not self._told:
                self._told = True
                try:
                    tell(self._land)
                except RuntimeError:  # the loop was closed: nobody is interested any more
                    return
            # While it waits for the next one it keeps nothing of this one alive.
            del work, job, plan, context, fn, args, kwargs, landed, result, error

    def _land(self) -> None:
        self._told = False  # before looking: what ends from here on says so again
        done = self._done
        while done:
            job, plan, landed, result, error = done.popleft()
            self._out -= 1
            try:
                landed(job, plan, result, error)
            except Exception:  # a fault of ours must not hold up the others
                log.exception("job's end was not taken in", extra={"fields": fields_of(job)})

    def close(self) -> None:
        """Let the threads go; what has not begun never will."""
        while not self._todo.empty():
            self._todo.get_nowait()
        for _ in range(self._threads):
            self._todo.put(None)


def _arrived(_job: JobContext, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:  # no future takes a StopIteration
        future.set_exception(
            RuntimeError("the handler raised StopIteration") if isinstance(error, StopIteration) else error
        )
        future.exception()  # whoever waited may have gone: asyncio would complain that nobody has read it


def thread_main(job: JobContext, fn: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Call a handler in the thread that was found for it."""
    job.started = now = time.monotonic()  # it may have waited for a free thread
    job.deadline = now + (job.soft or job.timeout)
    if job.stopping:  # looked at last: whoever stops it says so first, and takes one without a deadline for not begun
        raise asyncio.CancelledError
    if job.soft:
        return interruptible(job, lambda: fn(*args, **kwargs))
    return fn(*args, **kwargs)
