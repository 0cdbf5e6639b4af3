"""What runs beside the worker's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ["Beside"]


class Beside:
    """Tasks of the worker. One that fails ends the worker, which is seen and mended: the rest would wait for what does not come.

    Args:
        wake: called when one has failed; whoever wakes then calls :meth:`check`.
        parts: they run until :meth:`close`.
    """

    def __init__(self, wake: Callable[[], None], *parts: Coroutine[Any, Any, None]) -> None:
        self._wake = wake
        self._failure: BaseException | None = None
        self._tasks = [asyncio.create_task(part) for part in parts]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error
            self._wake()

    def check(self) -> None:
        """Raise what one of them has failed with."""
        if self._failure is not None:
            raise self._failure

    async def close(self) -> None:
        """Cancel them, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
