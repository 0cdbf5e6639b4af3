"""Work on queues that lie on several nodes of a cluster: a node that is away or silent holds up no queue of another one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from fastq.errors import BrokerUnavailable
from fastq.scheduler.link import Link

__all__ = ["PATIENCE", "Shards"]

T = TypeVar("T")
log = logging.getLogger("fastq.scheduler")

PATIENCE = 0.25
"""Seconds for which the others' next step waits for a slow node; what was begun there goes on without being waited for."""

ASIDE = 1.0
"""Seconds for which a node's queues are left alone after an error that is no outage."""


class Shards:
    """One loop's work, node by node and side by side. With one server there is one piece, and its errors are the caller's.

    Args:
        link: whose connection knows where a queue lies.
        late: called when work ends that its step has not waited for.
        place: what tells pieces of work apart, of a key; default: its node.
        patience: seconds to wait for a slow piece.
    """

    def __init__(
        self,
        link: Link,
        late: Callable[[], None] = lambda: None,
        *,
        place: Callable[[bytes], Any] | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self._link = link
        self._late = late
        self._place = place or link.connection.place
        self._patience = patience
        self._under_way: dict[Any, asyncio.Task[None]] = {}
        self._not_before: dict[Any, float] = {}

    async def each(
        self, items: Iterable[T], key: Callable[[T], bytes], act: Callable[[list[T]], Awaitable[None]]
    ) -> list[T]:
        """Call ``act`` with the items of each node; ``key``: one that an item has in Redis.

        Returns:
            the items that have to wait: something is under way on their node, or it was away a moment ago.

        Raises:
            BrokerUnavailable: there is one server, and it is away.
        """
        groups: dict[Any, list[T]] = {}
        for item in items:
            groups.setdefault(self._place(key(item)), []).append(item)
        if groups.keys() <= {None}:
            await act(groups.get(None, []))
            return []
        now, waiting, begun = time.monotonic(), list[T](), set[asyncio.Task[None]]()
        for place, group in groups.items():
            if place in self._under_way or self._not_before.get(place, now) > now:
                waiting += group
                continue
            task = self._under_way[place] = asyncio.create_task(self._work(place, group, act))
            begun.add(task)
        await self._wait(begun)
        return waiting

    async def _wait(self, begun: set[asyncio.Task[None]]) -> None:
        if not begun:
            return
        try:
            _, late = await asyncio.wait(begun, timeout=self._patience)
        except asyncio.CancelledError:
            for task in begun:
                task.cancel()
            raise
        for task in late:
            task.add_done_callback(lambda _: self._late())

    async def _work(self, place: Any, group: list[T], act: Callable[[list[T]], Awaitable[None]]) -> None:
        try:
            await act(group)
        except BrokerUnavailable as error:
            self._not_before[place] = time.monotonic() + self._link.outage(error)
        except Exception:  # the other nodes' queues go on
            self._not_before[place] = time.monotonic() + ASIDE
            log.exception("the queues of a node are left alone")
        else:
            self._not_before.pop(place, None)
        finally:
            del self._under_way[place]
