"""The pauses between two ticks of a worker's loop."""

from __future__ import annotations

import asyncio
import contextlib

__all__ = ["IDLE_TICK", "TICK", "Ticker"]

TICK = 0.1
"""Seconds between two looks at deadlines, and between two signs of life on the board."""

IDLE_TICK = 0.5
"""The same of a worker that has nothing to look after: each wake-up of a sleeping process costs it 100 µs."""


class Ticker:
    """Short pauses while there is something to look after, long ones otherwise, which :meth:`hurry` ends."""

    def __init__(self) -> None:
        self._busy = asyncio.Event()

    def hurry(self) -> None:
        """There is something to look after from now on."""
        self._busy.set()

    async def rest(self, *, idle: bool) -> None:
        """Until the next tick."""
        if not idle:
            await asyncio.sleep(TICK)
            return
        self._busy.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_TICK):
                await self._busy.wait()
