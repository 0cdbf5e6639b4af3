"""What one holder at a time has, in the whole fleet: a name under a lease in Redis. Leaders are made of it.

A holding is a :class:`Term`. Its lease is renewed every third of the ttl by a thread of the process, so a blocked event loop
does not lose it. The holder trusts it for less than the ttl, counted on its own clock from the *sending* of the last renewal
that was confirmed: Redis counts from the arrival, so the holder stops believing before anybody else can have it. What no
clock can prevent - the process is stopped between looking and acting - the ``token`` does: it grows with each holding, so
whoever is written to can refuse a smaller one than it has seen.

Everything here runs in one event loop in a thread of its own (``this_process().loop()``); the asyncio and the blocking
methods are two ways to wait for it.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import functools
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from fastq.broker.keys import LeaseKeys
from fastq.broker.leases import Leased, release_lease, renew_lease, take_lease
from fastq.errors import BrokerError, BrokerUnavailable, ConfigError, LeaseLost, LeaseTimeout
from fastq.limiter.stores import RedisStore, this_process
from fastq.logs import fields

__all__ = ["Lease", "SyncLease", "SyncTerm", "Term"]

T = TypeVar("T")

log = logging.getLogger("fastq.lease")

SHORTEST: Final = 0.5
"""Seconds: a ttl below this would be lost to a busy machine."""

LOOK: Final = 1.0
"""Seconds after which one that waits asks again, should nobody have woken it."""

_LEAVE: Final = 1.0  # seconds for telling Redis that a holding is given up; without that it runs out

_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)


def clock() -> float:
    """Seconds of a clock that never goes back and, where the system has one (Linux), goes on while the machine sleeps."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


class _Holding:
    """One holding, as all threads see it; renewed in the event loop of :func:`this_process`."""

    def __init__(self, lease: Lease, owner: str, token: int, trusted_until: float) -> None:
        self.lease = lease
        self.owner = owner
        self.token = token
        self.process = this_process()
        self.trusted_until = trusted_until
        self.why = "its time is up"
        self._over = False
        self._lock = threading.Lock()
        self._watchers: list[Callable[[], None]] = []
        self._keeper = asyncio.get_running_loop().create_task(self._keep(), name=f"fastq lease {lease.name}")
        _held.add(self)

    def over(self) -> bool:
        """Whether it has ended, by the clock if need be; then for good."""
        if not self._over and (clock() >= self.trusted_until or self.process is not this_process()):
            self._over = True
        return self._over

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call this once when it ends, in another thread; at once if it has."""
        with self._lock:
            if not self._over:
                self._watchers.append(watcher)
                return
        watcher()

    def unwatch(self, watcher: Callable[[], None]) -> None:
        """Do not call it."""
        with self._lock, contextlib.suppress(ValueError):
            self._watchers.remove(watcher)

    def end(self) -> None:
        """It is over: tell those who watch."""
        with self._lock:
            self._over = True
            watchers, self._watchers = self._watchers, []
        _held.discard(self)
        for watcher in watchers:
            watcher()

    async def _keep(self) -> None:
        """Renew it until it is lost."""
        ttl, failed = self.lease.ttl, 0
        while True:
            pause = min(ttl / 3, 0.05 * 2**failed) if failed else ttl / 3
            await asyncio.sleep(max(0.0, min(pause, self.trusted_until - clock())))
            sent = clock()
            if self.over():
                break
            try:
                async with asyncio.timeout(min(ttl / 3, self.trusted_until - sent)):
                    reply = await self.lease.ask_to_renew(self.owner)
            except (TimeoutError, BrokerError) as error:
                failed += 1
                self.why = (
                    f"it could not be renewed: {'no answer in time' if isinstance(error, TimeoutError) else error}"
                )
                if isinstance(error, TimeoutError):
                    self.lease.hang_up()
                continue
            if reply.token != self.token:
                self.why = "somebody else has it" if reply.left_ms else "its time was up before it was renewed"
                break
            if self.over():  # confirmed, but too late to be believed
                break
            self.trusted_until, failed = sent + self.lease.trust, 0
            self.why = "its time is up"
        self.end()
        log.warning("lease lost", extra=fields(lease=self.lease.label, token=self.token, why=self.why))

    async def release(self) -> None:
        """Give it up: somebody else may have it at once."""
        self._keeper.cancel()
        self.end()
        try:
            async with asyncio.timeout(_LEAVE):
                await self.lease.ask_to_release(self.owner)
        except (TimeoutError, BrokerError) as error:
            log.debug("the lease will run out", extra=fields(lease=self.lease.label, error=str(error)))


_held: set[_Holding] = set()


@atexit.register
def _at_exit() -> None:
    process = this_process()
    mine = [holding for holding in _held if holding.process is process]
    if mine:
        with contextlib.suppress(Exception):
            process.run(_release_all(mine))


async def _release_all(holdings: list[_Holding]) -> None:
    await asyncio.gather(*(holding.release() for holding in holdings))


class _Try:
    """One attempt to have it, up to a deadline that may be moved to the past."""

    def __init__(self, lease: Lease, timeout: float) -> None:
        self.lease = lease
        self.deadline = clock() + timeout
        self.owner = this_process().ticket()

    async def run(self) -> _Holding | None:
        """None: somebody else has it. Raises BrokerError."""
        failed = 0
        while True:
            sent = clock()
            try:
                reply = await self.lease.ask_to_take(self.owner)  # the same owner: a repetition is harmless
            except BrokerUnavailable:
                pause = min(0.5, 0.02 * 2**failed)
                failed += 1
                if clock() + pause > self.deadline:
                    raise
                await asyncio.sleep(pause)
                continue
            if reply.token and clock() < sent + self.lease.trust:
                return _Holding(self.lease, self.owner, reply.token, sent + self.lease.trust)
            left = self.deadline - clock()
            if left <= 0:
                if reply.token:  # the reply came too late to be believed
                    await self.lease.ask_to_release(self.owner)
                return None
            if not reply.token:
                await self._wait(min(left, LOOK, max(0.001, reply.left_ms / 1_000)))

    async def _wait(self, seconds: float) -> None:
        try:
            await self.lease.wait_for_end(seconds)
        except BrokerUnavailable:
            await asyncio.sleep(min(seconds, 0.05))

    def give_up(self, future: concurrent.futures.Future[_Holding | None]) -> None:
        """Nobody waits for it any more: what comes of it goes back."""
        self.deadline = -math.inf
        future.add_done_callback(_throw_away)


def _throw_away(future: concurrent.futures.Future[_Holding | None]) -> None:
    if not future.cancelled() and future.exception() is None and (holding := future.result()) is not None:
        loop = this_process().loop()
        loop.call_soon_threadsafe(lambda: asyncio.ensure_future(holding.release(), loop=loop))


class Lease:
    """A name that one holder at a time has; see :meth:`fastq.FastQ.leader`. Use one object as often as you like.

    ``async with lease as term:`` waits until this process has it and gives it up at the end of the block. Should it be lost
    inside, the block is cancelled and LeaseLost raised from it. ``lease.sync`` is the same for blocking code.

    Args:
        store: where it is kept.
        kind: a short word, part of the key: ``"leader"``. Another kind has names of its own.
        name: up to 200 characters.
        ttl: seconds after which somebody else can have it when its holder is killed; 0.5 s to a day.
    """

    def __init__(self, store: RedisStore, kind: str, name: str, ttl: float) -> None:
        if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not SHORTEST <= ttl <= 86_400:
            raise ConfigError(f"ttl={ttl!r} of {kind} {name!r} must be a number of seconds from {SHORTEST} to 86400")
        self.name = name
        self.kind = kind
        self.ttl = float(ttl)
        self.trust = ttl - min(1.0, ttl / 10)
        """Seconds from the sending of a renewal in which its holder believes that it has it."""
        self._store = store
        self._keys = LeaseKeys(store.prefix, kind, name)
        self._entered: dict[asyncio.Task[Any] | None, list[Term]] = {}

    @property
    def label(self) -> str:
        """For logs and errors."""
        return f"{self.kind} {self.name!r}"

    @functools.cached_property
    def sync(self) -> SyncLease:
        """The same for blocking code."""
        return SyncLease(self)

    async def try_acquire(self) -> Term | None:
        """A term, if nobody else has one. Raises BrokerError: Redis cannot be asked."""
        holding = await self._acquire(0)
        return Term(holding) if holding is not None else None

    async def acquire(self, timeout: float | None = None) -> Term:
        """Wait for a term; ``timeout`` in seconds, None: as long as it takes.

        Raises:
            LeaseTimeout: (a builtin TimeoutError) somebody else had it all the time.
            BrokerError: Redis could not be asked until then.
        """
        holding = await self._acquire(math.inf if timeout is None else timeout)
        if holding is None:
            raise LeaseTimeout(self.label, timeout or 0.0)
        return Term(holding)

    async def run(self, work: Callable[[Term], Awaitable[T]]) -> T:
        """Call ``work(term)`` whenever this process has it; anew after a loss, until one call returns or raises.

        Example::

            await app.leader("importer", ttl=15).run(import_forever)
        """
        while True:
            term = await self.acquire()
            try:
                async with term:
                    return await work(term)
            except LeaseLost:
                if not term.lost:
                    raise

    async def __aenter__(self) -> Term:
        term = await self.acquire()
        await term.__aenter__()
        self._entered.setdefault(asyncio.current_task(), []).append(term)
        return term

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task = asyncio.current_task()
        terms = self._entered[task]
        term = terms.pop()
        if not terms:
            del self._entered[task]
        await term.__aexit__(kind, error, trace)

    async def _acquire(self, timeout: float) -> _Holding | None:
        attempt = _Try(self, timeout)
        future = asyncio.run_coroutine_threadsafe(attempt.run(), this_process().loop())
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            attempt.give_up(future)
            raise

    # -- for holdings, in the loop of this_process() --

    async def ask_to_take(self, owner: str) -> Leased:
        """Raises BrokerError."""
        return (await self._store.ask(take_lease(self._keys, owner, round(self.ttl * 1_000))))[1]

    async def ask_to_renew(self, owner: str) -> Leased:
        """Raises BrokerError."""
        return (await self._store.ask(renew_lease(self._keys, owner, round(self.ttl * 1_000))))[1]

    async def ask_to_release(self, owner: str) -> Leased:
        """Raises BrokerError."""
        return (await self._store.ask(release_lease(self._keys, owner)))[1]

    async def wait_for_end(self, seconds: float) -> None:
        """Until it is given up, or so long. Raises BrokerError."""
        await self._store.wait_for_slot(self._keys, seconds)

    def hang_up(self) -> None:
        """Redis does not answer: the next question goes over a new connection."""
        self._store.hang_up()

    def __repr__(self) -> str:
        return f"<Lease {self.label} ttl={self.ttl:g}>"


class _Term:
    """What both kinds of term have."""

    def __init__(self, holding: _Holding) -> None:
        self._holding = holding

    @property
    def token(self) -> int:
        """Grows with each holding: whoever is written to refuses a smaller one than it has seen. Not consecutive."""
        return self._holding.token

    @property
    def lost(self) -> bool:
        """Whether it is over; once it is, for good. Costs no round trip."""
        return self._holding.over()

    @property
    def left(self) -> float:
        """Seconds for which it can be believed without a further renewal."""
        return 0.0 if self.lost else max(0.0, self._holding.trusted_until - clock())

    def check(self) -> None:
        """Raise LeaseLost if it is over: call it before each step that only the holder may do."""
        if self.lost:
            raise self._error()

    def _error(self) -> LeaseLost:
        return LeaseLost(f"{self._holding.lease.label} was lost: {self._holding.why}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._holding.lease.label} token={self.token}{' lost' if self.lost else ''}>"


class Term(_Term):
    """One holding of a :class:`Lease`, from ``acquire`` to :meth:`release`; ``async with term:`` releases it at the end."""

    def __init__(self, holding: _Holding) -> None:
        super().__init__(holding)
        self._task: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._cancelling = 0
        self._interrupted = False

    async def release(self) -> None:
        """Give it up. Never raises for Redis's sake: without an answer it runs out."""
        if self._holding.process is this_process():
            future = asyncio.run_coroutine_threadsafe(self._holding.release(), this_process().loop())
            await asyncio.shield(asyncio.wrap_future(future))

    async def wait_lost(self) -> None:
        """Return when it is over."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(over.set)

        self._holding.watch(tell)
        try:
            await over.wait()
        finally:
            self._holding.unwatch(tell)

    async def __aenter__(self) -> Self:
        self.check()
        self._task, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        self._cancelling = self._task.cancelling() if self._task else 0
        self._holding.watch(self._tell)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        lost = self.lost
        self._holding.unwatch(self._tell)
        ours = self._interrupted and task is not None and task.uncancel() <= self._cancelling
        await self.release()
        if (kind is None and lost) or (ours and kind is not None and issubclass(kind, asyncio.CancelledError)):
            raise self._error() from error

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._interrupt)

    def _interrupt(self) -> None:
        if self._task is not None:
            self._interrupted = True
            self._task.cancel()


class SyncLease:
    """A :class:`Lease` for blocking code: the same methods, without ``await``. Not for use inside a running event loop.

    Nothing can cancel blocking code: inside ``with lease.sync as term:`` call ``term.check()`` before each step.
    """

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self.name = lease.name
        self._entered = threading.local()

    def try_acquire(self) -> SyncTerm | None:
        """As :meth:`Lease.try_acquire`."""
        holding = self._acquire(0)
        return SyncTerm(holding) if holding is not None else None

    def acquire(self, timeout: float | None = None) -> SyncTerm:
        """As :meth:`Lease.acquire`."""
        holding = self._acquire(math.inf if timeout is None else timeout)
        if holding is None:
            raise LeaseTimeout(self._lease.label, timeout or 0.0)
        return SyncTerm(holding)

    def run(self, work: Callable[[SyncTerm], T]) -> T:
        """As :meth:`Lease.run`; ``work`` calls ``term.check()``, which ends it after a loss."""
        while True:
            term = self.acquire()
            try:
                with term:
                    return work(term)
            except LeaseLost:
                if not term.lost:
                    raise

    def __enter__(self) -> SyncTerm:
        term = self.acquire()
        self._entered.terms = [*getattr(self._entered, "terms", ()), term.__enter__()]
        return term

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.terms.pop().__exit__(kind, error, trace)

    def _acquire(self, timeout: float) -> _Holding | None:
        attempt = _Try(self._lease, timeout)
        future = asyncio.run_coroutine_threadsafe(attempt.run(), this_process().loop())
        try:
            return future.result()
        except BaseException:
            attempt.give_up(future)
            raise

    def __repr__(self) -> str:
        return f"<Sync{repr(self._lease)[1:]}"


class SyncTerm(_Term):
    """One holding of a :class:`SyncLease`; ``with term:`` releases it at the end, and raises LeaseLost if it was lost."""

    def release(self) -> None:
        """As :meth:`Term.release`."""
        if self._holding.process is this_process():
            this_process().run(self._holding.release())

    def wait_lost(self, timeout: float | None = None) -> bool:
        """Wait until it is over; False after ``timeout`` seconds."""
        over = threading.Event()
        self._holding.watch(over.set)
        try:
            return over.wait(timeout)
        finally:
            self._holding.unwatch(over.set)

    def __enter__(self) -> Self:
        self.check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = self.lost
        self.release()
        if kind is None and lost:
            raise self._error() from error
