"""Many jobs of one task from any iterable: in calls of bounded size, with progress, at once or spread over a window."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol, cast

from fastq.errors import InvalidOption
from fastq.handle import Bulk
from fastq.job import Seconds, seconds
from fastq.task import Call, JobOptions

__all__ = ["BatchResult", "Batching"]

Item = tuple[Any, ...] | Mapping[str, Any]
Progress = Callable[["BatchResult"], object]

MOST = 10_000
"""Jobs that are held in memory at a time."""


class BatchResult:
    """What ``enqueue_batch`` has done so far. ``total``: items taken; ``enqueued``: jobs created; ``ids``: theirs, in order."""

    __slots__ = ("enqueued", "ids", "total")

    def __init__(self) -> None:
        self.total = 0
        self.enqueued = 0
        self.ids: list[str] = []

    def __repr__(self) -> str:
        return f"<BatchResult total={self.total} enqueued={self.enqueued}>"

    def _add(self, bulk: Bulk) -> None:
        self.total += bulk.total
        self.enqueued += bulk.created
        self.ids += bulk.ids


class Home(Protocol):
    """Who sends the jobs: the application."""

    def _named(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: JobOptions) -> Call: ...

    def send_many(self, calls: Iterable[Call], *, ids: bool) -> Coroutine[Any, Any, Bulk]:
        """Enqueue prepared calls."""
        ...

    def send_many_sync(self, calls: Iterable[Call], *, ids: bool) -> Bulk:
        """The same from blocking code."""
        ...


class Batching:
    """The part of :class:`fastq.FastQ` that enqueues many jobs."""

    async def enqueue_batch(
        self,
        name: str,
        items: Iterable[Item],
        batch_size: int = 100,
        *,
        spread: Seconds | None = None,
        progress: Progress | None = None,
        ids: bool = True,
    ) -> BatchResult:
        """Enqueue one job per item of any iterable, ``batch_size`` (1 to 10,000) in a step; memory does not grow with it.

        Args:
            name: of the task.
            items: mappings of keyword arguments, or tuples of positional ones.
            spread: the jobs become due evenly over so many seconds from now; ``items`` then needs a length.
            progress: called after each step with the result so far.
            ids: False: do not collect the ids (for millions of jobs).

        Raises:
            InvalidOption: an option cannot be used. Else as :meth:`fastq.FastQ.enqueue`; the steps before are stored.

        Example::

            result = await app.enqueue_batch("send_newsletter", [{"user": user} for user in users], batch_size=500)
        """
        result = BatchResult()
        for calls in _steps(cast(Home, self), name, items, batch_size, spread):
            result._add(await cast(Home, self).send_many(calls, ids=ids))
            if progress is not None:
                progress(result)
        return result

    def enqueue_batch_sync(
        self,
        name: str,
        items: Iterable[Item],
        batch_size: int = 100,
        *,
        spread: Seconds | None = None,
        progress: Progress | None = None,
        ids: bool = True,
    ) -> BatchResult:
        """:meth:`enqueue_batch` from blocking code."""
        result = BatchResult()
        for calls in _steps(cast(Home, self), name, items, batch_size, spread):
            result._add(cast(Home, self).send_many_sync(calls, ids=ids))
            if progress is not None:
                progress(result)
        return result


def _steps(
    app: Home, name: str, items: Iterable[Item], batch_size: int, spread: Seconds | None
) -> Iterator[list[Call]]:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= MOST:
        raise InvalidOption(f"batch_size={batch_size!r:.100} is not 1 to {MOST:,}")
    window = None if spread is None else seconds("spread", spread)
    if window is not None and not hasattr(items, "__len__"):
        raise InvalidOption("spread needs to know how many items there are: give a list")
    total = len(cast("list[Item]", items)) if window is not None else 0
    numbered = enumerate(items)
    while step := list(islice(numbered, batch_size)):
        yield [_call(app, name, item, {"delay": window * i / total} if window else {}) for i, item in step]


def _call(app: Home, name: str, item: object, options: JobOptions) -> Call:
    if isinstance(item, Mapping):
        return app._named(name, (), item, options)
    if isinstance(item, tuple | list):
        return app._named(name, tuple(item), {}, options)
    raise InvalidOption(f"enqueue_batch of task {name!r} got {item!r:.100}: give mappings of keywords or tuples")
