"""Functions at intervals within one process: no Redis, no jobs. For a fleet there are schedules (docs/schedules.md)."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from typing import Any

from fastq.errors import InvalidOption
from fastq.job import Seconds, seconds

__all__ = ["InMemoryScheduler"]

log = logging.getLogger("fastq.scheduler")


class InMemoryScheduler:
    """Calls functions every so many seconds, each on its own: a slow one delays no other, and is never run beside itself.

    Args:
        tick_interval: seconds between two looks for tasks that were added or removed meanwhile, at the most; what is due is
            called when it is due.

    Example::

        scheduler = fastq.InMemoryScheduler()
        scheduler.add_task("cleanup", 300, cleanup_sessions)
        await scheduler.run()
    """

    def __init__(self, tick_interval: Seconds = 60.0) -> None:
        self._tick = seconds("tick_interval", tick_interval, least=0.001)
        self._tasks: dict[str, tuple[float, Callable[[], Any]]] = {}
        self._changed = asyncio.Event()
        self._ended = False

    def add_task(self, name: str, interval_seconds: Seconds, func: Callable[[], Any]) -> None:
        """Call ``func``, a coroutine function or a plain one (in a thread), every ``interval_seconds`` from now on.

        Raises:
            InvalidOption: there is one of this name, the interval is below a millisecond, or it cannot be called.
        """
        if name in self._tasks:
            raise InvalidOption(f"a task {name!r} was added before: remove_task it, or take another name")
        if not callable(func):
            raise InvalidOption(f"task {name!r}: {func!r:.100} cannot be called")
        self._tasks[name] = (seconds("interval_seconds", interval_seconds, least=0.001), func)
        self._changed.set()

    def remove_task(self, name: str) -> bool:
        """Call it no more; a call that is under way is left alone. False: there is none of this name."""
        found = self._tasks.pop(name, None) is not None
        self._changed.set()
        return found

    def stop(self) -> None:
        """Let :meth:`run` return; calls that are under way are cancelled."""
        self._ended = True
        self._changed.set()

    async def run(self) -> None:
        """Until :meth:`stop`, or cancelled."""
        self._ended = False
        running: dict[str, tuple[object, asyncio.Task[None]]] = {}
        retired: list[asyncio.Task[None]] = []
        try:
            while not self._ended:
                self._changed.clear()
                others = [name for name, (entry, _) in running.items() if self._tasks.get(name) is not entry]
                retired += [running.pop(name)[1] for name in others]  # they see by themselves that they are not wanted
                retired = [task for task in retired if not task.done()]
                for name, entry in self._tasks.items():
                    if name not in running:
                        running[name] = entry, asyncio.create_task(self._repeat(name, entry), name=name)
                try:
                    async with asyncio.timeout(self._tick):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            tasks = [*retired, *(task for _, task in running.values())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _repeat(self, name: str, entry: tuple[float, Callable[[], Any]]) -> None:
        """At multiples of the interval from its beginning; those that a slow call has missed are left out."""
        interval, func = entry
        clock = asyncio.get_running_loop().time
        began, count = clock(), 1
        while True:
            await asyncio.sleep(began + count * interval - clock())
            if self._tasks.get(name) is not entry:
                return
            try:
                await _call(func)
            except Exception:
                log.exception("task failed", extra={"fields": {"task": name}})
            missed = int((clock() - began) / interval) - count
            if missed > 0:
                log.warning("task was too slow", extra={"fields": {"task": name, "missed": missed}})
            count += 1 + max(missed, 0)


async def _call(func: Callable[[], Any]) -> None:
    if inspect.iscoroutinefunction(func):
        await func()
        return
    result = await asyncio.to_thread(func)
    if inspect.isawaitable(result):
        await result
