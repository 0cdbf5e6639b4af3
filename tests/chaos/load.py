"""Producers that enqueue while something breaks."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import fastq
from tests.process.fleet import LEASE, PATIENCE

__all__ = ["OUTAGES", "Load"]

OUTAGES = ["killed", "stopped"] if "CHAOS_SCALE" in os.environ else ["killed"]
"""What happens to a master: the second kind, half a minute each, in `make chaos` only."""


class Load:
    """Producers that enqueue until they are told to stop: one blocking, one async with many calls at a time.

    ``confirmed`` are the keys whose enqueue returned, in that order, ``ids`` their jobs', ``refused`` the errors of the others. A key ends in its
    queue's name; the queues take turns. ``acks``: when each was confirmed. ``pace``: seconds between two calls of each of the eleven.
    """

    CONCURRENT = 10

    def __init__(self, url: str, queues: Sequence[str] = ("default",), *, pace: float = 0.01, **settings: Any) -> None:
        self.url = url
        self.queues = queues
        self.pace = pace
        self._settings = {"enqueue_timeout": LEASE, **settings}
        self.acks: list[tuple[float, str]] = []
        self.confirmed: list[str] = []
        self.ids: list[str] = []
        self.refused: list[fastq.FastQError] = []
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._blocking, daemon=True),
            threading.Thread(target=lambda: asyncio.run(self._async()), daemon=True),
        ]

    def _blocking(self) -> None:
        app, n = fastq.FastQ(self.url, **self._settings), 0
        while not self._over.is_set():
            n += 1
            queue = self.queues[n % len(self.queues)]
            try:
                job = app.options(queue=queue).enqueue_sync("once", f"b{n}.{queue}")
            except fastq.BrokerError as error:
                self.refused.append(error)
                self._over.wait(0.01)
            else:
                self._note(f"b{n}.{queue}", queue, job.id)
                self._over.wait(self.pace / 10)
        app.close()

    async def _async(self) -> None:
        app = fastq.FastQ(self.url, **self._settings)
        await asyncio.gather(*(self._one(app, n) for n in range(self.CONCURRENT)))
        await app.aclose()

    async def _one(self, app: fastq.FastQ, lane: int) -> None:
        n = 0
        while not self._over.is_set():
            n += 1
            queue = self.queues[(lane + n) % len(self.queues)]
            try:
                job = await app.options(queue=queue).enqueue("once", f"a{lane}.{n}.{queue}")
            except fastq.BrokerError as error:
                self.refused.append(error)
            else:
                self._note(f"a{lane}.{n}.{queue}", queue, job.id)
            await asyncio.sleep(self.pace)

    def _note(self, key: str, queue: str, job_id: str) -> None:
        self.acks.append((time.monotonic(), queue))
        self.ids.append(job_id)
        self.confirmed.append(key)

    def gap(self, queue: str) -> float:
        """The longest time in seconds without a confirmation for a queue."""
        times = [at for at, of in self.acks if of == queue]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def more(self, jobs: int) -> Callable[[], bool]:
        """A fact: so many more are confirmed than now."""
        wanted = len(self.confirmed) + jobs
        return lambda: len(self.confirmed) >= wanted
