"""Where the state of limiters lives (Redis, or this process's memory), and what this process holds in it."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import itertools
import logging
import math
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from fastq.broker.command import Command, raw
from fastq.broker.commands import give_back, hold, wait_for_slot
from fastq.broker.connection import AsyncConnection, SyncConnection
from fastq.broker.keys import GlobalKeys, LeaseKeys, LimitKeys
from fastq.broker.memory import MemoryEngine
from fastq.broker.url import Endpoint
from fastq.errors import BrokerError
from fastq.limits import Rule, Terms
from fastq.logs import fields

__all__ = ["MemoryStore", "RedisStore", "Store", "this_process"]

T = TypeVar("T")

log = logging.getLogger("fastq.limits")

_IDLE = 5.0
"""Seconds after which the thread that renews leases ends when there is none."""

_UNDER_WAY = 32
"""Requests of an event loop at a time. The units of a reply that waits behind a thousand others come too late to be used, are
asked for again, and so on; a script takes 50 µs, so these are answered in 2 ms, and more at a time are no faster."""

_ANNOUNCE = 6 * 3_600.0
"""Seconds after which a process lets operators know again of a limiter that it uses."""

_LONGEST_CALL = 2.0
"""Seconds that the thread which renews leases waits for one store: another store's slots must not be lost meanwhile, and a process
must not take long to end."""

_LONGEST_BLOCK = 4.0
"""Seconds of one blocking wait for a slot: below any response timeout that makes sense."""

MOST_BLOCKING = 64
"""Connections of an event loop that wait for slots, one per limiter or partition. Whoever finds none left waits as long as it would
have blocked, and asks then: a thousand customers at their limits must not take a thousand of the server's connections."""


NOTED_LIMITS = 10_000
"""Limiters that the registry keeps: the latest."""

NOTED_FOR = 30 * 86_400
"""Seconds after which the configured rule of a limiter that nobody uses is forgotten."""


def _announcement(keys: GlobalKeys, k: LimitKeys, rule: Rule, now_ms: int) -> list[Command[Any]]:
    """Let operators know that a limiter is used, and its configured rule."""
    return [
        raw("ZADD", keys.limits, now_ms, k.limiter),
        raw("ZREMRANGEBYRANK", keys.limits, 0, -NOTED_LIMITS - 1),
        raw("SET", k.known, rule.encode(), "EX", NOTED_FOR),
    ]


class Store(Protocol):
    """What a gate needs of the place where its limiter's state is."""

    prefix: str

    @property
    def shown(self) -> str:
        """What errors call it."""
        ...

    async def ask(self, command: Command[T]) -> tuple[float, T]:
        """Send a command; the monotonic time before it was sent, and its reply. Raises BrokerError."""
        ...

    async def wait_for_slot(self, keys: LimitKeys, timeout: float) -> bool:
        """Wait until a slot may be free; False after ``timeout`` seconds at most. Raises BrokerError."""
        ...

    async def pass_on(self, keys: LimitKeys) -> None:
        """Wake another one that waits for a slot. Raises BrokerError."""
        ...

    def call(self, command: Command[T]) -> T:
        """Send a command from blocking code."""
        ...

    def close(self) -> None:
        """Close the connection of blocking code."""
        ...

    def now_us(self) -> int:
        """The store's clock, as far as is known: µs since the epoch."""
        ...

    def announce(self, keys: LimitKeys, rule: Rule) -> None:
        """After a request: let operators know of the limiter, now and then. Waits for nothing."""
        ...


class _Links:
    """The connections of one event loop; closed at its end, as its asynchronous generators are.

    A task that waits for the end would do as well, but be reported (``Task was destroyed``) by a loop that is closed without one.
    """

    def __init__(self, make: Callable[[], AsyncConnection]) -> None:
        self.main = make()
        self._make = make
        self._idle: list[AsyncConnection] = []
        self._all = [self.main]
        self.turn = asyncio.Semaphore(_UNDER_WAY)
        self.blocking = asyncio.Semaphore(MOST_BLOCKING)
        self._guard = self._close_at_the_end()
        with contextlib.suppress(StopIteration):
            self._guard.__anext__().send(None)  # as far as its yield: from now on the loop knows of it

    async def _close_at_the_end(self) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            for link in self._all:
                link.drop("the event loop ends")

    @contextlib.asynccontextmanager
    async def spare(self) -> AsyncIterator[AsyncConnection]:
        """A connection that may block."""
        if self._idle:
            link = self._idle.pop()
        else:
            link = self._make()
            self._all.append(link)
        try:
            yield link
        except BaseException:
            link.drop("a blocking wait was given up")
            raise
        finally:
            self._idle.append(link)

    async def close(self) -> None:
        """Close them all."""
        await self._guard.aclose()
        for link in self._all:
            await link.close()


class RedisStore:
    """Limiter state in Redis: shared by every process that uses the same server and prefix.

    Nothing is connected before the first use; each event loop has connections of its own.
    """

    def __init__(
        self,
        endpoint: Callable[[], Endpoint],
        prefix: str = "fastq",
        *,
        connect_timeout: float = 5.0,
        response_timeout: float = 10.0,
    ) -> None:
        self.prefix = prefix
        self._endpoint = endpoint
        self._timeouts = {"connect_timeout": connect_timeout, "response_timeout": response_timeout}
        self._links: dict[asyncio.AbstractEventLoop, _Links] = {}
        self._sync: SyncConnection | None = None
        self._announced: dict[str, float] = {}

    @property
    def shown(self) -> str:  # noqa: D102 - see Store
        return self._endpoint().shown

    def _of_loop(self) -> _Links:
        loop = asyncio.get_running_loop()
        links = self._links.get(loop)
        if links is None:
            for old in [old for old in self._links if old.is_closed()]:
                del self._links[old]
            links = self._links[loop] = _Links(self._connection)
        return links

    def _connection(self) -> AsyncConnection:
        return AsyncConnection.to(self._endpoint(), **self._timeouts)

    async def ask(self, command: Command[T]) -> tuple[float, T]:  # noqa: D102 - see Store
        links = self._of_loop()
        async with links.turn:
            if not links.main.connected:
                await links.main.connect()
            sent = time.monotonic()
            return sent, await links.main.call(command)

    async def wait_for_slot(self, keys: LimitKeys | LeaseKeys, timeout: float) -> bool:  # noqa: D102 - see Store
        links, timeout = self._of_loop(), min(timeout, _LONGEST_BLOCK)
        until = time.monotonic() + timeout
        try:
            async with asyncio.timeout(timeout):
                await links.blocking.acquire()
        except TimeoutError:
            return False
        try:
            async with links.spare() as link:
                return await link.call(wait_for_slot(keys, max(0.01, until - time.monotonic())))
        finally:
            links.blocking.release()

    async def pass_on(self, keys: LimitKeys) -> None:  # noqa: D102 - see Store
        wake: list[Command[Any]] = [raw("RPUSH", keys.wake, "1"), raw("PEXPIRE", keys.wake, 60_000)]
        await self._of_loop().main.call_many(wake)

    def call(self, command: Command[T]) -> T:  # noqa: D102 - see Store
        if self._sync is None:
            timeouts = {name: min(seconds, _LONGEST_CALL) for name, seconds in self._timeouts.items()}
            self._sync = SyncConnection.to(self._endpoint(), **timeouts)
        return self._sync.call(command)

    def now_us(self) -> int:  # noqa: D102 - see Store
        return self._of_loop().main.clock.now_us()

    def announce(self, keys: LimitKeys, rule: Rule) -> None:  # noqa: D102 - see Store
        now, link = time.monotonic(), self._of_loop().main
        if now < self._announced.get(keys.limiter, -math.inf) + _ANNOUNCE or not link.connected:
            return
        self._announced[keys.limiter] = now
        for command in _announcement(GlobalKeys(self.prefix), keys, rule, link.clock.now_ms()):
            link.send(command)

    def hang_up(self) -> None:
        """Drop this event loop's connection: the next command goes over a new one."""
        self._of_loop().main.drop("no answer in time")

    async def aclose(self) -> None:
        """Close this event loop's connections."""
        links = self._links.pop(asyncio.get_running_loop(), None)
        if links is not None:
            await links.close()
        if self._sync is not None and not this_process().holds_in(self):  # else it renews leases
            self._sync.close()

    def close(self) -> None:
        """Give back the slots that this process holds here, and close the connections of blocking code."""
        this_process().leave(self)
        if self._sync is not None:
            self._sync.close()
        loop = this_process().running_loop()
        links = self._links.pop(loop, None) if loop is not None else None
        if loop is not None and links is not None:
            asyncio.run_coroutine_threadsafe(links.close(), loop)


class MemoryStore:
    """Limiter state in this process alone, for tests and for limits that concern one process: the same algorithms."""

    prefix = shown = "memory"

    def __init__(self) -> None:
        offset = time.time() - time.monotonic()
        self._clock: Callable[[], int] = lambda: int((offset + time.monotonic()) * 1_000_000)
        self._engine = MemoryEngine(self._clock)
        self._lock = threading.Lock()
        self._blocked: dict[bytes, deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[bool]]]] = {}
        self._freed: set[bytes] = set()  # slots that became free while nobody was blocked

    async def ask(self, command: Command[T]) -> tuple[float, T]:  # noqa: D102 - see Store
        sent = time.monotonic()
        return sent, self.call(command)

    async def wait_for_slot(self, keys: LimitKeys, timeout: float) -> bool:  # noqa: D102 - see Store
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        entry = (loop, future)
        with self._lock:
            if keys.wake in self._freed:
                self._freed.discard(keys.wake)
                return True
            self._blocked.setdefault(keys.wake, deque()).append(entry)
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            return False
        finally:
            with self._lock, contextlib.suppress(ValueError, KeyError):
                self._blocked[keys.wake].remove(entry)
                if not self._blocked[keys.wake]:
                    del self._blocked[keys.wake]

    def announce(self, keys: LimitKeys, rule: Rule) -> None:
        """Nobody else can see it."""

    async def pass_on(self, keys: LimitKeys) -> None:  # noqa: D102 - see Store
        with self._lock:
            self._wake(keys.wake, 1)

    def call(self, command: Command[T]) -> T:  # noqa: D102 - see Store
        with self._lock:
            reply = self._engine.call(command)
            if command.script == "give_back":
                self._wake(command.keys[2], getattr(reply, "slots", 0))
        return reply

    def _wake(self, key: bytes, freed: int) -> None:
        blocked = self._blocked.get(key)
        while blocked and freed:
            loop, future = blocked.popleft()
            with contextlib.suppress(RuntimeError):  # that loop has ended
                loop.call_soon_threadsafe(self._resolve, key, future)
                freed -= 1
        if freed:
            self._freed.add(key)

    def _resolve(self, key: bytes, future: asyncio.Future[bool]) -> None:
        if not future.done():
            future.set_result(True)
        else:
            with self._lock:
                self._wake(key, 1)

    def now_us(self) -> int:  # noqa: D102 - see Store
        return self._clock()

    async def aclose(self) -> None:
        """Nothing to close."""

    def close(self) -> None:
        """Nothing to close."""


# -- this process ---------------------------------------------------------------------------------


class Slot:
    """A slot that this process holds; its lease is renewed until :meth:`Process.let_go`."""

    __slots__ = ("holder", "keys", "lease", "owner", "store", "terms")

    def __init__(self, store: Store, keys: LimitKeys, terms: Terms, holder: str, lease: float, owner: object) -> None:
        self.store = store
        self.keys = keys
        self.terms = terms
        self.holder = holder
        self.lease = lease
        self.owner = owner  # keeps a partition's limiter alive as long as it has holders


class _Errand(Generic[T]):
    """A coroutine that a thread has an event loop run, and what becomes of it when the thread does not wait to the end."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], undo: Callable[[T], object] | None
    ) -> None:
        self.answer: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._loop = loop
        self._work = work
        self._undo = undo
        self._task: asyncio.Task[T] | None = None
        self._over = False  # nobody waits any more

    def begin(self) -> None:
        """From the thread."""
        self._loop.call_soon_threadsafe(self._start)

    def give_up(self) -> None:
        """From the thread: nobody will read the answer."""
        self._loop.call_soon_threadsafe(self._end)

    def _start(self) -> None:
        if self._task is None and not self._over:
            self._task = self._loop.create_task(self._work)
            self._task.add_done_callback(self._tell)

    def _tell(self, task: asyncio.Task[T]) -> None:
        if self._over:
            self._take_back(task)
        elif task.cancelled():
            self.answer.cancel()
        elif (error := task.exception()) is not None:
            self.answer.set_exception(error)
        else:
            self.answer.set_result(task.result())

    def _end(self) -> None:
        if self._over:
            return
        self._over = True
        if self._task is None:
            self._work.close()
        elif self._task.done():
            self._take_back(self._task)
        else:
            self._task.cancel()  # its end is told, whatever it is

    def _take_back(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled() and task.exception() is None and self._undo is not None:
            self._undo(task.result())


class Process:
    """What belongs to this process: its name among holders, its slots, the thread that renews them, and the event loop
    that blocking code uses.
    """

    def __init__(self) -> None:
        host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:40]
        self.name = f"{host}.{os.getpid()}.{os.urandom(4).hex()}"
        self._numbers = itertools.count(1)
        self._slots: dict[str, Slot] = {}
        self._changed = threading.Condition()
        self._keeper: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    def ticket(self) -> str:
        """A name that nobody else uses: of a holder, or of one giving back."""
        return f"{self.name}:{next(self._numbers)}"

    # -- slots --

    def keep(self, slot: Slot) -> None:
        """Renew this slot's lease from now on, every third of it."""
        with self._changed:
            self._slots[slot.holder] = slot
            if self._keeper is None:
                self._keeper = threading.Thread(target=self._renew_all, name="fastq-leases", daemon=True)
                self._keeper.start()
            self._changed.notify()

    def let_go(self, holder: str) -> None:
        """Renew it no more."""
        with self._changed:
            self._slots.pop(holder, None)

    def _renew_all(self) -> None:
        due = time.monotonic()
        while True:
            with self._changed:
                if not self._slots:
                    if not self._changed.wait(_IDLE) and not self._slots:
                        self._keeper = None
                        return
                    due = time.monotonic()  # leases that have just begun
                third = min((slot.lease for slot in self._slots.values()), default=3.0) / 3
                if time.monotonic() < due + third:
                    self._changed.wait(due + third - time.monotonic())
                    continue
                held = list(self._slots.values())
            due = time.monotonic()
            self._renew(held)

    def _renew(self, held: list[Slot]) -> None:
        by_limiter: dict[tuple[int, bytes], list[Slot]] = {}
        for slot in held:
            by_limiter.setdefault((id(slot.store), slot.keys.slots), []).append(slot)
        away: set[int] = set()
        for asked in by_limiter.values():
            group = [slot for slot in asked if slot.holder in self._slots]  # not those given back meanwhile
            if not group or id(group[0].store) in away:
                continue  # waited for just now: the slots in other stores cannot wait for each of its limiters
            first = group[0]
            try:
                alive = first.store.call(hold(first.keys, round(first.lease * 1_000), [slot.holder for slot in group]))
            except BrokerError:
                away.add(id(first.store))  # at the next turn; the waiters log what is wrong with Redis
                continue
            for slot, ok in zip(group, alive, strict=True):
                if not ok and self._slots.pop(slot.holder, None) is not None:
                    log.warning("slot lost", extra=fields(limiter_id=slot.keys.limiter, holder=slot.holder))

    # -- blocking code --

    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop, in a thread of its own, of everything that blocking code waits for."""
        with self._changed:
            if self._loop is None:
                ready = threading.Event()
                self._thread = threading.Thread(target=self._run_loop, args=(ready,), name="fastq-limits", daemon=True)
                self._thread.start()
                ready.wait()
        assert self._loop is not None
        return self._loop

    def running_loop(self) -> asyncio.AbstractEventLoop | None:
        """The same, if anybody has used it."""
        return self._loop

    def _run_loop(self, ready: threading.Event) -> None:
        async def main() -> None:
            self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
            ready.set()
            await self._ending.wait()

        asyncio.run(main())

    def run(self, work: Coroutine[Any, Any, T], undo: Callable[[T], object] | None = None) -> T:
        """Run a coroutine there and wait for it; an interrupted caller cancels it.

        ``undo`` is given, in that loop, what came of it when the caller does not learn of that: an interruption (a soft time limit,
        Ctrl-C) may come in the very moment of the answer.
        """
        errand = _Errand(self.loop(), work, undo)
        try:
            errand.begin()
            return errand.answer.result()
        except BaseException:
            errand.give_up()
            raise

    def holds_in(self, store: Store) -> bool:
        """Whether slots in this store are held."""
        with self._changed:
            return any(slot.store is store for slot in self._slots.values())

    def leave(self, store: Store) -> None:
        """Give back the slots in one store: nobody would ever do it, and the keeper would renew them for ever."""
        with self._changed:
            held = [slot for slot in self._slots.values() if slot.store is store]
            for slot in held:
                del self._slots[slot.holder]
        self._give_back(held)

    def _give_back(self, held: list[Slot]) -> None:
        away: set[int] = set()
        for slot in held:
            if id(slot.store) not in away:
                try:
                    slot.store.call(give_back(slot.keys, slot.terms, self.ticket(), holders=[slot.holder]))
                except BrokerError:
                    away.add(id(slot.store))  # nor would it take the others; their leases end

    def end(self) -> None:
        """Give all slots back: the process ends."""
        with self._changed:
            held, self._slots = list(self._slots.values()), {}
        self._give_back(held)
        for store in {id(slot.store): slot.store for slot in held}.values():
            store.close()
        if self._loop is not None and self._ending is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._ending.set)
            self._thread.join(1.0)


_process = Process()


def this_process() -> Process:
    """This process's own; a forked child has another."""
    return _process


def _forked() -> None:
    global _process  # noqa: PLW0603 - threads, locks and names of the parent are of no use to a child
    _process = Process()


os.register_at_fork(after_in_child=_forked)


@atexit.register
def _at_exit() -> None:
    _process.end()
