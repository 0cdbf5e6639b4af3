"""Waiting for the end of jobs: told by a message, never by polling.

One :class:`Waiting` per event loop holds one subscription, whatever number of jobs is waited for. ``follow.lua`` answers how
a job has ended or, in the same step, writes this process's channel down; whatever ends the job publishes its id there. A
message says only "ask again": state is always read by the same script, so a message that is lost, late or doubled does no
harm. After a lost connection, and every :data:`RENEW` seconds, everything is asked again.

Blocking code waits on an event loop in a thread of its own, which all its threads share.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any, Protocol, TypeVar

from fastq.broker.command import Command
from fastq.broker.commands import follow
from fastq.broker.keys import QueueKeys
from fastq.broker.listener import Listener
from fastq.broker.url import Endpoint
from fastq.broker.views import ended_status
from fastq.config import Settings
from fastq.errors import BrokerError, BrokerReplyError, FastQError, InvalidOption, WaitTimeout
from fastq.job import JobStatus

__all__ = ["Waits"]

T = TypeVar("T")
log = logging.getLogger("fastq")

RENEW = 30.0
"""Seconds after which everything is asked again, so that registrations do not expire; and what a message costs at most
that a broken network has swallowed."""

REGISTERED_MS = 120_000
"""How long registrations outlive the last question of any process about their queue."""

ASK = 500
"""Most jobs asked about in one call."""

_Key = tuple[str, str]  # queue, job id


class Home(Protocol):
    """Whose jobs are waited for: the application."""

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


class Waits:
    """What an application waits with: a :class:`Waiting` per event loop, and one in a thread for blocking code.

    Args:
        home: the application.
        hang_up: closes the connection that the running event loop asks with.
    """

    def __init__(self, home: Home, hang_up: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._home = home
        self._hang_up = hang_up
        self._rooms: dict[asyncio.AbstractEventLoop, Waiting] = {}
        self._backstage: Backstage | None = None
        self._lock = threading.Lock()

    def _room(self) -> Waiting:
        loop = asyncio.get_running_loop()
        room = self._rooms.get(loop)
        if room is None or room.pid != os.getpid():
            for old in [old for old in self._rooms if old.is_closed()]:
                del self._rooms[old]
            room = self._rooms[loop] = Waiting(self._home)
        return room

    async def wait(self, queue: str, job_id: str, timeout: float | None) -> JobStatus | None:
        """See :meth:`Waiting.wait`. Raises InvalidOption, too: no number of seconds."""
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float)):
            raise InvalidOption(f"timeout={timeout!r:.100} must be a number of seconds, or None")
        return await self._room().wait(queue, job_id, timeout)

    def wait_sync(self, queue: str, job_id: str, timeout: float | None) -> JobStatus | None:
        """The same from blocking code."""
        return self.backstage().run(self.wait(queue, job_id, timeout))

    def backstage(self) -> Backstage:
        """Where blocking code waits."""
        with self._lock:
            if self._backstage is None or self._backstage.pid != os.getpid():  # forked: the thread stayed behind
                self._backstage = Backstage()
            return self._backstage

    async def aclose(self) -> None:
        """Stop waiting on this event loop."""
        room = self._rooms.pop(asyncio.get_running_loop(), None)
        if room is not None:
            await room.aclose()

    def close(self) -> None:
        """Stop waiting in the thread of blocking code."""
        with self._lock:
            backstage, self._backstage = self._backstage, None
        if backstage is not None and backstage.pid == os.getpid():
            backstage.run(self._leave())
            backstage.close()

    async def _leave(self) -> None:
        await self.aclose()
        await self._hang_up()


class Waiting:
    """The jobs that one event loop waits for."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self.pid = os.getpid()
        settings = home.settings
        self.channel = f"{settings.prefix}:told:{os.urandom(12).hex()}"
        self._listener = Listener(
            home.endpoint(),
            self.channel,
            self._on_message,
            self._wake,
            connect_timeout=settings.connect_timeout,
            response_timeout=settings.response_timeout,
        )
        self._loop = asyncio.get_running_loop()
        self._waiters: dict[_Key, list[asyncio.Future[JobStatus | None]]] = {}
        self._to_ask: set[_Key] = set()
        self._queues: dict[bytes, str] = {}  # name of an awaited key -> its queue
        self._event = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._connection = 0
        self._trouble: BrokerError | None = None

    async def wait(self, queue: str, job_id: str, timeout: float | None) -> JobStatus | None:
        """How a job has ended, as soon as it has; None when nothing is known of it.

        Raises:
            WaitTimeout: it had not within ``timeout`` seconds. BrokerReplyError: Redis refuses.
        """
        key = (queue, job_id)
        future: asyncio.Future[JobStatus | None] = self._loop.create_future()
        self._waiters.setdefault(key, []).append(future)
        self._to_ask.add(key)
        self._wake()
        if self._keeper is None or self._keeper.done():
            self._keeper = self._loop.create_task(self._keep())
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            because = f" ({self._trouble})" if self._trouble else ""
            raise WaitTimeout(f"job {job_id!r} of queue {queue!r} had not ended after {timeout} s{because}") from None
        finally:
            self._forget(key, future)

    def _forget(self, key: _Key, future: asyncio.Future[JobStatus | None]) -> None:
        """What was registered in Redis goes with the job; nobody is there to hear the message."""
        waiters = self._waiters.get(key, [])
        if future in waiters:
            waiters.remove(future)
        if not waiters:
            self._waiters.pop(key, None)
            self._to_ask.discard(key)

    def _wake(self) -> None:
        self._event.set()

    def _on_message(self, payload: bytes) -> None:
        awaited, *ids = payload.split(b" ")
        queue = self._queues.get(awaited, "")
        keys = ((queue, job_id.decode("utf-8", "replace")) for job_id in ids)
        self._to_ask.update(key for key in keys if key in self._waiters)
        self._wake()

    # -- the keeper: one task per event loop --------------------------------------------------------

    async def _keep(self) -> None:
        pause = 0.05
        while True:
            self._event.clear()
            try:
                await self._ask()
                self._trouble, pause = None, 0.05
                await self._rest()
            except BrokerReplyError as error:  # it will not get better by itself: no permission, wrong type
                self._give_up(error)
            except BrokerError as error:
                self._trouble = error
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)

    async def _rest(self) -> None:
        """Until there is something to ask, or everything is to be asked again."""
        try:
            async with asyncio.timeout(RENEW):
                await self._event.wait()
        except TimeoutError:
            if self._waiters:
                self._to_ask.update(self._waiters)
                await self._listener.ping()

    async def _ask(self) -> None:
        """Subscribe first: what is registered before that may be told to nobody."""
        if not self._waiters:
            return
        number = await self._listener.listen()
        if number != self._connection:
            self._connection = number
            self._to_ask.update(self._waiters)
        by_queue: dict[str, list[str]] = {}
        for queue, job_id in self._to_ask:
            by_queue.setdefault(queue, []).append(job_id)
        for queue, ids in by_queue.items():
            for start in range(0, len(ids), ASK):
                await self._ask_about(queue, ids[start : start + ASK])

    async def _ask_about(self, queue: str, ids: Sequence[str]) -> None:
        q = self._home.keys(queue)
        self._queues[q.awaited] = queue
        asked = {(queue, job_id) for job_id in ids}
        self._to_ask -= asked  # a message that comes while the question is under way puts its job back
        try:
            answers = await self._home.call(follow(q, self.channel, ids, REGISTERED_MS))
        except BrokerError:
            self._to_ask |= asked & self._waiters.keys()
            raise
        for job_id, answer in zip(ids, answers, strict=True):
            if answer[0] != b"open":
                self._tell(queue, job_id, answer)

    def _tell(self, queue: str, job_id: str, answer: list[bytes]) -> None:
        status: JobStatus | None = None
        failure: FastQError | None = None
        try:
            status = ended_status(queue, job_id, answer)
        except FastQError as error:
            failure = error
        for future in self._waiters.get((queue, job_id), ()):
            if future.done():
                continue
            if failure is None:
                future.set_result(status)
            else:
                future.set_exception(failure)

    def _give_up(self, error: BrokerReplyError) -> None:
        self._to_ask.clear()
        for futures in self._waiters.values():
            for future in futures:
                if not future.done():
                    future.set_exception(error)

    async def aclose(self) -> None:
        """Stop listening; whoever still waits is cancelled."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        for futures in self._waiters.values():
            for future in futures:
                future.cancel()
        await self._listener.close()


async def _next(values: AsyncIterator[T]) -> T:
    return await anext(values)


async def _end_the_others() -> None:
    """Let what was ended or cancelled say so to the threads that wait for it, and cancel the rest."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for cancel in (False, True):
        if others:
            for task in others if cancel else ():
                task.cancel()
            _, others = await asyncio.wait(others, timeout=0.5)
    await asyncio.get_running_loop().shutdown_asyncgens()  # of iterators that nobody waits for just now


class Backstage:
    """An event loop in a thread, where blocking code waits."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fastq-waiting", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it; interrupted, it is cancelled.

        Raises CancelledError: the application was closed.
        """
        with self._lock:
            if self._closed:  # on a loop that has stopped, or will at once, it would never end
                coroutine.close()
                raise CancelledError("the application was closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, values: AsyncIterator[T]) -> Iterator[T]:
        """What an iterator over there yields, here; it is closed when this one is, and ends when the application is closed."""
        try:
            while True:
                try:
                    yield self.run(_next(values))
                except (StopAsyncIteration, CancelledError):
                    return
        finally:
            if isinstance(values, AsyncGenerator):
                with contextlib.suppress(CancelledError):
                    self.run(values.aclose())

    def close(self) -> None:
        """End the thread; whoever waits here is told before."""
        with self._lock:
            self._closed = True
            ended = asyncio.run_coroutine_threadsafe(_end_the_others(), self._loop)  # after all that was begun
        ended.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
