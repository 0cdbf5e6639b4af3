"""Many jobs of one task from any iterable: in calls of bounded size, counted together, at once or spread over a window."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol, cast

from fastq.batch_handle import Batch, callback
from fastq.broker import batches
from fastq.broker.command import Operation
from fastq.broker.commands import NewJob
from fastq.broker.keys import GlobalKeys
from fastq.errors import InvalidOption, NotReplicated
from fastq.handle import Bulk
from fastq.job import Seconds, decode_envelope, new_id, seconds
from fastq.partitions import queue_of
from fastq.sender import Sender
from fastq.task import Call, JobOptions, Producer, Task
from fastq.workflow import Signature

__all__ = ["BatchResult", "Batching"]

Item = tuple[Any, ...] | Mapping[str, Any]
Progress = Callable[["BatchResult"], object]

MOST = 10_000
"""Jobs that are held in memory at a time."""

_NO_KEYWORDS: Mapping[str, Any] = {}

MOST_JOBS = 9_999_999
"""Jobs of one batch: seven digits in the ids, 2.5 MB of bits."""


class BatchResult(Batch):
    """What ``enqueue_batch`` has done so far; and the batch.

    ``total``: items taken; ``enqueued``: jobs created; ``ids``: theirs, in order.
    """

    __slots__ = ("enqueued", "ids", "total")

    def __init__(self, home: Producer, batch_id: str, queue: str) -> None:
        super().__init__(home, batch_id, queue)
        self.total = 0
        self.enqueued = 0
        self.ids: list[str] = []

    def __repr__(self) -> str:
        return f"<BatchResult {self.id} total={self.total} enqueued={self.enqueued}>"

    def _add(self, bulk: Bulk) -> None:
        self.total += bulk.total
        self.enqueued += bulk.created
        self.ids += bulk.ids


class Home(Producer, Protocol):
    """Who sends the jobs: the application."""

    tasks: dict[str, Task[..., Any]]
    _sender: Sender

    def _named(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: JobOptions) -> Call: ...

    def send_many(
        self, calls: Iterable[Call] | AsyncIterable[Call], *, ids: bool, batch: str = ""
    ) -> Coroutine[Any, Any, Bulk]:
        """Enqueue prepared calls."""
        ...

    def send_many_sync(self, calls: Iterable[Call], *, ids: bool, batch: str = "") -> Bulk:
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
        on_complete: Signature | None = None,
        on_success: Signature | None = None,
        on_failure: Signature | None = None,
        result_ttl: Seconds | None = None,
    ) -> BatchResult:
        """Enqueue one job per item of any iterable, ``batch_size`` (1 to 10,000) in a step; memory does not grow with it.

        The jobs are one batch: ``batch.status()`` counts them, ``batch.wait()`` waits for the last one; see docs/batches.md.

        Args:
            name: of the task.
            items: mappings of keyword arguments, or tuples of positional ones.
            spread: the jobs become due evenly over so many seconds from now; ``items`` then needs a length.
            progress: called after each step with the result so far.
            ids: False: do not collect the ids (for millions of jobs).
            on_complete, on_success, on_failure: calls that are enqueued once when all jobs have ended; see
                :meth:`fastq.Batch.on_complete`.
            result_ttl: seconds that the batch is kept once it has ended (default: the setting ``result_ttl``).

        Raises:
            InvalidOption: an option cannot be used. BatchClosed: somebody has closed or cancelled the batch meanwhile. Else as
                :meth:`fastq.FastQ.enqueue`. The steps before are stored; the batch is closed as incomplete.

        Example::

            batch = await app.enqueue_batch("send_newsletter", [{"user": user} for user in users], batch_size=500)
            print(await batch.status())
        """
        callbacks = {"complete": on_complete, "success": on_success, "failure": on_failure}
        filling = Filling(cast(Home, self), name, callbacks, result_ttl)
        result, home = filling.result, filling.home
        try:
            for calls in filling.steps(items, batch_size, spread):
                if not filling.opened:
                    await home.run(filling.open())
                result._add(await home.send_many(calls, ids=ids, batch=result.id))
                if progress is not None:
                    progress(result)
            if filling.eager:
                for call in filling.callbacks():
                    await home.send(call)
                return result
            if not filling.opened:
                await home.run(filling.open())
            await home.store(filling.whole, filling.queue, "the batch", result.id)
        except GeneratorExit:  # nothing can be awaited any more
            raise
        except BaseException as error:
            if filling.opened:
                await home.run(filling.give_up(error))
            raise
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
        on_complete: Signature | None = None,
        on_success: Signature | None = None,
        on_failure: Signature | None = None,
        result_ttl: Seconds | None = None,
    ) -> BatchResult:
        """:meth:`enqueue_batch` from blocking code."""
        callbacks = {"complete": on_complete, "success": on_success, "failure": on_failure}
        filling = Filling(cast(Home, self), name, callbacks, result_ttl)
        result, home = filling.result, filling.home
        try:
            for calls in filling.steps(items, batch_size, spread):
                if not filling.opened:
                    home.run_sync(filling.open())
                result._add(home.send_many_sync(calls, ids=ids, batch=result.id))
                if progress is not None:
                    progress(result)
            if filling.eager:
                for call in filling.callbacks():
                    home.send_sync(call)
                return result
            if not filling.opened:
                home.run_sync(filling.open())
            home.store_sync(filling.whole, filling.queue, "the batch", result.id)
        except BaseException as error:
            if filling.opened:
                home.run_sync(filling.give_up(error))
            raise
        return result

    def batch(self, batch_id: str, *, queue: str | None = None) -> Batch:
        """A batch by its id. ``queue`` saves asking all queues.

        Example::

            status = await app.batch(batch_id).status()
        """
        home = cast(Home, self)
        return Batch(home, batch_id, None if queue in home.partitions else queue)


class Filling:
    """One batch on its way in: what both ways of enqueueing share."""

    def __init__(
        self, home: Home, name: str, callbacks: Mapping[str, Signature | None], result_ttl: Seconds | None
    ) -> None:
        task = home.tasks.get(name) if isinstance(name, str) else None
        whole = home.queue_of(str(name), task.defaults.queue if task else None)
        ttl = home.result_ttl() if result_ttl is None else seconds("result_ttl", result_ttl)
        self.home = home
        batch_id = new_id()
        queue = home.partition(whole, batch_id)  # all of it in one, where its counts are
        self.result = BatchResult(home, batch_id, queue)
        self.eager = home._sender.eager
        self.filled = False
        self.opened = self.eager  # jobs that run where they are enqueued leave nothing in Redis
        self._name = name
        self._task = task
        self.queue = queue
        self._fields: dict[str, Any] = {"task": name, "ttl": max(1_000, round(ttl * 1_000))}
        for which, call in callbacks.items():
            if call is not None:
                self._fields[f"on:{which}"] = callback(self.result.id, which, queue, call)

    def steps(self, items: Iterable[Item], batch_size: int, spread: Seconds | None) -> Iterator[list[Call]]:
        """The jobs, so many at a time."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= MOST:
            raise InvalidOption(f"batch_size={batch_size!r:.100} is not 1 to {MOST:,}")
        window = None if spread is None else seconds("spread", spread)
        if window is not None and not hasattr(items, "__len__"):
            raise InvalidOption("spread needs to know how many items there are: give a list")
        total = len(cast("list[Item]", items)) if window is not None else 0
        numbered = enumerate(items)
        while step := list(islice(numbered, batch_size)):
            if step[-1][0] > MOST_JOBS:
                raise InvalidOption(f"a batch has at most {MOST_JOBS + 1:,} jobs: begin another one")
            yield [self._call(i, item, {"delay": window * i / total} if window else {}) for i, item in step]

    def _call(self, number: int, item: object, options: JobOptions) -> Call:
        if isinstance(item, Mapping):
            args: tuple[Any, ...] = ()
            kwargs: Mapping[str, Any] = item
        elif isinstance(item, tuple | list):
            args, kwargs = tuple(item), _NO_KEYWORDS
        else:
            raise InvalidOption(
                f"enqueue_batch of task {self._name!r} got {item!r:.100}: give mappings of keywords or tuples"
            )
        if self._task is None or options:
            call = self.home._named(self._name, args, kwargs, options)
        else:
            call = self._task._call(args, kwargs, self.home)
        # A NamedTuple's own __new__ takes twice as long, and this is done once per job.
        job = tuple.__new__(NewJob, (f"{self.result.id}-{number}", *call.job[1:]))
        queue = call.queue
        if self.home.partitions and queue_of(queue) == queue_of(self.queue):
            if job.unique:
                raise InvalidOption(
                    f"task {self._name!r} is unique, and queue {queue_of(queue)!r} is split: a batch lies in one partition, "
                    "and unique jobs lie where their keys lead: use enqueue_many, or a queue of its own"
                )
            queue = self.queue
        return tuple.__new__(Call, (queue, call.priority, job, *call[3:]))

    def open(self) -> Operation[None]:
        """What begins it."""
        self.opened = True
        keys, queues = self.home.keys(self.queue), GlobalKeys(self.home.prefix()).queues
        return batches.open_(keys, self.result.id, self._fields, queues, self.home.now_ms())

    def whole(self) -> Operation[str | None]:
        """What ends the filling well; may be repeated."""
        self.filled = True
        return self.close("whole")

    def close(self, how: str) -> Operation[str | None]:
        """What ends the filling."""
        return batches.close(self.home.keys(self.queue), self.result.id, how)

    def give_up(self, error: BaseException) -> Operation[None]:
        """After an error: the batch takes no more, and ends as failed. Redis may be away: then it stays filling."""
        if self.filled and isinstance(error, NotReplicated):
            return
        error.add_note(f"batch {self.result.id} of queue {self.queue!r} is incomplete: {self.result.enqueued:,} jobs")
        if self.eager:
            return
        try:
            yield from self.close("torn")
        except Exception as another:  # noqa: BLE001 - the first error is the one to be told
            error.add_note(f"and it could not be closed: {another}; app.batch({self.result.id!r}).close() does")

    def callbacks(self) -> Iterator[Call]:
        """Of a batch whose jobs have all succeeded where they were enqueued: what is called then."""
        for which in ("complete", "success"):
            data = self._fields.get(f"on:{which}")
            if data is not None:
                yield Call(self.queue, decode_envelope(data).priority, NewJob(f"{self.result.id}-{which}", data))
