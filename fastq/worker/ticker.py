"""The pauses between two ticks of a worker's loop."""

from __future__ import annotations

import asyncio
import contextlib

__all__ = ["BEAT", "TICK", "Ticker", "beat", "until_beat"]

TICK = 0.1
"""Seconds between two looks at deadlines, and between two signs of life on the board."""

BEAT = 0.5
"""Seconds between two beats: the same of a worker that has nothing to look after, and whatever else looks now and then. Each
wake-up of a sleeping process costs it 100 to 250 µs, so all of these wake it together."""


def until_beat() -> float:
    """Seconds until the next multiple of :data:`BEAT` of the event loop's clock."""
    return BEAT - asyncio.get_running_loop().time() % BEAT


async def beat() -> None:
    """Until the next beat."""
    await asyncio.sleep(until_beat())


class Ticker:
    """Short pauses while there is something to look after, long ones otherwise, which :meth:`hurry` ends."""

    def __init__(self) -> None:
        self._busy = asyncio.Event()
        self.resting = False
        """Whether the pause under way is a long one."""

    def hurry(self) -> None:
        """There is something to look after from now on."""
        self._busy.set()

    async def rest(self, *, idle: bool) -> None:
        """Until the next tick."""
        if not idle:
            await asyncio.sleep(TICK)
            return
        self._busy.clear()
        self.resting = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(until_beat()):
                await self._busy.wait()
        self.resting = False
