"""Events: what happens to jobs, as it happens, for those who watch.

While somebody watches, scripts add a line per event to the stream of the queue, 10,000 of them at most; while nobody does, they
learn that from the answer they ask for anyway (``{q}:awaited``). One connection per watched queue and event loop reads,
whatever number of iterators there is; after a lost connection it goes on where it was.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol, TypeVar

import msgspec

from fastq.broker.command import Command, raw
from fastq.broker.commands import watch
from fastq.broker.connection import AsyncConnection
from fastq.broker.keys import QueueKeys
from fastq.broker.url import Endpoint
from fastq.config import Settings
from fastq.errors import BrokerError, BrokerReplyError
from fastq.job import Event, JobState, JobStatus, Progress, decode_progress

__all__ = ["Watches"]

T = TypeVar("T")

RENEW = 30.0
"""Seconds between two assurances that somebody still watches."""

WATCHED_MS = 120_000
"""How long a queue goes on writing events down after the last assurance; that of follow.lua, whose hash it is."""

BLOCK = 5.0
"""Longest blocking read, in seconds."""

BUFFER = 10_000
"""Events that wait for a slow reader; the oldest are dropped."""

ALL = "*"
_LAST = {"success": "succeeded", "failed": "failed", "cancelled": "cancelled"}


class Home(Protocol):
    """Whose jobs are watched: the application."""

    @property
    def settings(self) -> Settings:
        """As they are now."""
        ...

    def endpoint(self) -> Endpoint:
        """Where Redis is."""
        ...

    def keys(self, queue: str) -> QueueKeys:
        """The key names of a queue."""
        ...

    def call(self, command: Command[T]) -> Coroutine[Any, Any, T]:
        """Send one command on this event loop's connection."""
        ...

    def get_status(self, job_id: str, *, queue: str | None = None) -> Coroutine[Any, Any, JobStatus | None]:
        """Where a job is."""
        ...


class Feed:
    """The events of one iterator: of one job, or of a queue (``ALL``)."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._events: deque[Event] = deque(maxlen=BUFFER)
        self._came = asyncio.Event()
        self._over = False
        self._failure: BrokerReplyError | None = None

    def put(self, event: Event) -> None:
        """Take an event that is for this one; a job's last one ends it."""
        if self._over or self.target not in (ALL, event.job_id):
            return
        self._events.append(event)
        self._over = self.target != ALL and event.final
        self._came.set()

    def end(self, failure: BrokerReplyError | None = None) -> None:
        """Nothing more will come."""
        self._over, self._failure = True, failure
        self._came.set()

    async def events(self) -> AsyncIterator[Event]:
        """What came, and what comes."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self._failure is not None:
                raise self._failure
            if self._over:
                return
            self._came.clear()
            await self._came.wait()


class Watches:
    """What an application watches: a :class:`Stream` per event loop and queue."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._streams: dict[tuple[asyncio.AbstractEventLoop, str], Stream] = {}

    async def events(self, queues: Sequence[str], target: str) -> AsyncIterator[Event]:
        """The events of a job, up to its last one, or of a queue (``ALL``), which may have several partitions."""
        async with AsyncExitStack() as stack:
            feed = Feed(target)
            for queue in queues:
                await stack.enter_async_context(self._fed(feed, queue))
            async for event in feed.events():
                yield event

    @asynccontextmanager
    async def _fed(self, feed: Feed, queue: str) -> AsyncIterator[None]:
        key = (asyncio.get_running_loop(), queue)
        stream = self._streams.get(key)
        if stream is None or stream.pid != os.getpid():
            stream = self._streams[key] = Stream(self._home, queue)
        stream.feeds.append(feed)
        try:
            await stream.begin(feed.target)
            yield
        finally:
            stream.feeds.remove(feed)
            if not stream.feeds and self._streams.get(key) is stream:
                del self._streams[key]
                await stream.close()

    async def aclose(self) -> None:
        """End every iterator of this event loop."""
        loop = asyncio.get_running_loop()
        for key in [key for key in self._streams if key[0] is loop]:
            stream = self._streams.pop(key)
            for feed in stream.feeds:
                feed.end()
            await stream.close()


class Stream:
    """One queue's events, read once and handed to every feed."""

    def __init__(self, home: Home, queue: str) -> None:
        self.pid = os.getpid()
        self.feeds: list[Feed] = []
        self._home = home
        self._queue = queue
        self._q = home.keys(queue)
        settings = home.settings
        self._block = min(BLOCK, settings.response_timeout / 2)
        self._connection = AsyncConnection.to(
            home.endpoint(), connect_timeout=settings.connect_timeout, response_timeout=settings.response_timeout
        )
        self._position = b""  # the last event that was seen; empty: nothing is read yet
        self._renewed = 0.0
        self._task: asyncio.Task[None] | None = None

    async def begin(self, target: str) -> None:
        """Watch this one, too; when this returns, what happens is in the stream and will be read."""
        await self._watch([target])
        if self._task is None:
            self._task = asyncio.create_task(self._read())

    async def _watch(self, targets: list[str]) -> None:
        """What has ended before it was watched is told from its status."""
        last, flags = await self._home.call(watch(self._q, WATCHED_MS, targets))
        self._position = self._position or last
        for target, watched in zip(targets, flags, strict=True):
            if not watched:
                await self._tell_the_end(target)

    async def _tell_the_end(self, job_id: str) -> None:
        status = await self._home.get_status(job_id, queue=self._queue)
        if status is not None and not status.state.final:
            return  # replayed just now
        for feed in self.feeds:
            if feed.target == job_id:
                if status is not None:
                    feed.put(_last_event(status))
                feed.end()

    async def _read(self) -> None:
        pause, connects = 0.05, 0
        while True:
            try:
                await self._connection.connect()
                if self._connection.connects != connects or time.monotonic() - self._renewed > RENEW:
                    await self._renew(first=not connects)
                    connects = self._connection.connects
                await self._take(await self._connection.call(self._next()))
                pause = 0.05
            except BrokerReplyError as error:  # it will not get better by itself
                for feed in self.feeds:
                    feed.end(error)
                return
            except BrokerError:
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)

    async def _renew(self, *, first: bool) -> None:
        if not first:  # `begin` has just done it
            await self._watch(sorted({feed.target for feed in self.feeds}))
        self._renewed = time.monotonic()

    def _next(self) -> Command[list[tuple[bytes, list[bytes]]]]:
        words = ("COUNT", 500, "BLOCK", round(self._block * 1_000), "STREAMS", self._q.events, self._position)
        return raw("XREAD", *words, decode=lambda reply: reply[0][1] if reply else [])

    async def _take(self, entries: list[tuple[bytes, list[bytes]]]) -> None:
        told: dict[str, Progress] = await self._progress(entries)
        for entry, (kind, job_id) in entries:
            self._position = entry
            name, at = job_id.decode("utf-8", "replace"), int(entry.split(b"-")[0]) / 1_000
            said = told.get(name) if kind == b"progress" else None
            event = Event(kind.decode("utf-8", "replace"), name, self._queue, at, said)
            for feed in self.feeds:
                feed.put(event)

    async def _progress(self, entries: list[tuple[bytes, list[bytes]]]) -> dict[str, Progress]:
        """What the jobs that told something say now: the events themselves carry no data."""
        ids = {job_id.decode("utf-8", "replace") for _, (kind, job_id) in entries if kind == b"progress"}
        told: dict[str, Progress] = {}
        for job_id in ids:
            data: bytes | None = await self._connection.call(raw("GET", self._q.progress(job_id)))
            try:
                told[job_id] = decode_progress(data or b"")
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
        return told

    async def close(self) -> None:
        """Stop reading."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._connection.close()


def _last_event(status: JobStatus) -> Event:
    return Event(_LAST[JobState(status.state).value], status.id, status.queue, status.finished_at or 0.0)
