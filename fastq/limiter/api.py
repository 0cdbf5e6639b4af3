"""Limiters as users see them: the asyncio one, its blocking twin, several at once, and around a function."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, Final, ParamSpec, TypeVar, cast
from weakref import WeakValueDictionary

import msgspec

from fastq.broker.commands import override_rule, penalize
from fastq.errors import ConfigError, LimitTimeout
from fastq.limiter.counts import Counts
from fastq.limiter.gate import Gate
from fastq.limiter.options import key_of_call
from fastq.limiter.outage import SILENT
from fastq.limiter.plan import Plan
from fastq.limiter.stores import Store, this_process
from fastq.limiter.waiter import Waiter
from fastq.limits import CostTooHigh, check_wait, partition_name, read_rule, size_of
from fastq.logs import fields, log_context

__all__ = ["Limiter", "LimiterState", "SyncLimiter", "acquire_all", "acquire_all_sync", "limited"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

log = logging.getLogger("fastq.limits")

_KEPT: Final = 10_000
"""Partitions of a limiter that stay in memory although nobody uses them at the moment."""

_LATE: Final = 3
"""Times that several limiters are asked again when the units of the first are too old once all have answered."""


class LimiterState(msgspec.Struct, frozen=True):
    """A limiter, or one of its partitions, at an instant."""

    limit: float | None
    """Units: the burst of a token bucket, the limit of a window; None without a rate."""
    remaining: int | None
    """Units to be had now; None without a rate."""
    reset_at: float
    """When all units are back if nobody takes any, in seconds since the epoch."""
    penalized_until: float | None
    """Until when nobody is granted anything, if so."""
    pace: float
    """Below 1 while an ``adaptive`` limiter recovers from a penalty: that part of its rate is in force."""
    max_concurrent: int | None
    holders: int
    """Slots that are taken, in all processes."""
    waiting: int
    """Acquires that wait in this event loop."""


class Limiter:
    """One limit, shared by every process that uses its id on the same Redis. Made by ``app.limiter`` and
    :func:`fastq.get_or_clone_limiter`; see docs/limits.md.

    A unit that was acquired is meant to be used at once. Waiters of one event loop are served first in, first out.
    ``limiter.sync`` is the same for blocking code.
    """

    def __init__(
        self, plan: Plan, store: Store, key: str = "", *, parent: Limiter | None = None, scope: str = ""
    ) -> None:
        self.id = plan.id
        self.key = key
        self.scope = scope
        self.plan = plan
        self.counts: Counts = parent.counts if parent else Counts(plan.id)
        self._store = store
        self._gates: dict[asyncio.AbstractEventLoop, Gate] = {}
        self._parts: WeakValueDictionary[str, Limiter] = WeakValueDictionary()
        self._recent: OrderedDict[str, Limiter] = OrderedDict()

    @functools.cached_property
    def sync(self) -> SyncLimiter:
        """The same limiter for blocking code."""
        return SyncLimiter(self)

    def for_key(self, key: str) -> Limiter:
        """The limiter of one partition, with a quota of its own: ``limiter.for_key("tenant-42")``.

        The empty key is the limiter as a whole.

        Raises ConfigError: no string, or of more than 200 characters.
        """
        if not isinstance(key, str):
            raise ConfigError(f"limiter {self.id!r}: the key {key!r:.100} must be a string")
        part = self._parts.get(key) if key else self
        if part is None:
            partition_name(key)
            part = self._parts[key] = Limiter(self.plan, self._store, key, parent=self, scope=self.scope)
        self._recent[key] = part
        self._recent.move_to_end(key)
        if len(self._recent) > _KEPT:
            self._recent.popitem(last=False)
        return part

    def named(self, scope: str) -> Limiter:
        """The same limiter, with the same quota, for a caller that the logs and metrics name ``scope``.

        The metrics name a running job by its task; ``scope`` counts outside of jobs, and everywhere if it is ``job:<type>``.
        """
        if not scope:
            return self
        view = Limiter(self.plan, self._store, self.key, parent=self, scope=scope)
        view._gates, view._parts, view._recent = self._gates, self._parts, self._recent
        return view

    async def acquire(self, timeout: float | None = None, cost: int = 1) -> None:
        """Wait for ``cost`` units, and for a slot if the limiter has ``max_concurrent`` (then :meth:`release` it).

        Args:
            timeout: seconds; None: the limiter's own, without one as long as it takes.
            cost: 0 or more; 0 waits for nothing but the end of a penalty.

        Raises:
            LimitTimeout: (a builtin TimeoutError) not within ``timeout``; at once when the wait is known to be longer.
            CostTooHigh: more than the limiter can ever grant at once.
            ConfigError: no such ``timeout`` or ``cost``.
            BrokerError: Redis cannot be asked, and the limiter is not ``on_error="open"``.
        """
        if not self.take_at_hand(cost):
            gate, waiter = await self._wait(self.plan.timeout if timeout is None else timeout, cost)
            _note_unchecked(gate, waiter)

    def take_at_hand(self, cost: int) -> bool:
        """Whether ``cost`` units, more than 0, were here already and nobody waits; they are taken."""
        gate = self._gates.get(asyncio.get_running_loop())
        try:
            if gate is None or cost < 1 or gate.waiters or not gate.tokens.take(cost, time.monotonic()):
                return False
        except (TypeError, OverflowError):  # no number, or too much: a wait is refused, and says why
            return False
        if gate.tokens.low:
            gate.top_up()
        return True

    def short(self) -> bool:
        """Whether those who wait in this event loop wait for units or a slot, and not just for an answer of the store."""
        gate = self._gates.get(asyncio.get_running_loop())
        return gate is not None and gate.short

    async def try_acquire(self, timeout: float = 0, cost: int = 1) -> bool:
        """As :meth:`acquire`, with False instead of LimitTimeout. By default it does not wait."""
        if self.take_at_hand(cost):
            return True
        try:
            gate, waiter = await self._join_and_wait(timeout, cost)
        except LimitTimeout:
            return False
        _note_unchecked(gate, waiter)
        return True

    @asynccontextmanager
    async def acquire_context(self, timeout: float | None = None, cost: int = 1) -> AsyncIterator[Limiter]:
        """:meth:`acquire`, and the slot is given back at the end of the block. Units of a rate stay used."""
        gate, waiter = await self._wait(self.plan.timeout if timeout is None else timeout, cost)
        try:
            yield self
        finally:
            if waiter.holder in gate.held:
                await gate.release(waiter.holder)

    async def release(self) -> None:
        """Give back one slot that this event loop has acquired, the latest first; nothing to do for a mere rate."""
        gate = self._gates.get(asyncio.get_running_loop())
        if gate is not None and gate.slots.unchecked:
            gate.slots.unchecked -= 1
        elif gate is not None and gate.held:
            await gate.release(gate.held[-1])

    async def penalize(self, retry_after: float) -> None:
        """Stop everybody for so many seconds, as an API's 429 asks for; 0 ends it.

        One of a limiter holds for its partitions (:meth:`for_key`), too; one of a partition for that alone.
        Units that other processes hold already are used up, for 100 ms at most. A longer penalty is never shortened. With
        ``adaptive`` the rate is halved for everybody, and grows back after it.

        Raises ConfigError: no number of seconds from 0 to 366 days.
        """
        gate = self._gate()
        stop = penalize(gate.keys, gate.terms(), retry_after, self.plan.adaptive)
        gate.forget_tokens()
        self.counts.note("penalties")
        await self._store.ask(stop)
        gate.look()

    async def state(self) -> LimiterState:
        """What is left, as Redis sees it."""
        gate = self._gate()
        state = await gate.learn()
        rule, now = gate.rule, state.now_us / 1e6
        return LimiterState(
            limit=size_of(rule),
            remaining=None if state.left < 0 else state.left,
            reset_at=now + state.reset_us / 1e6,
            pace=state.pace / 1e6,
            penalized_until=now + state.penalty_us / 1e6 if state.penalty_us else None,
            max_concurrent=rule.max_concurrent,
            holders=state.holders,
            waiting=sum(not waiter.future.done() for waiter in gate.waiters),
        )

    async def update(self, **options: Any) -> None:
        """Change the rule for everybody, in force within a second: ``update(rate="50/s")``, ``update(max_concurrent=3)``.

        What is not mentioned stays. Without options the configured rule is back. All partitions change.

        Raises ConfigError.
        """
        gate = self._gate()
        rule = None
        if options:
            await gate.learn()
            rule = gate.rule.changed(read_rule(options))
        await self._store.ask(override_rule(gate.keys, rule))
        await gate.learn()
        gate.look()

    async def aclose(self) -> None:
        """Close this event loop's connections to the limiter's store; other limiters of the store connect anew."""
        close: Any = getattr(self._store, "aclose", None)
        await close()

    # -- inside ---------------------------------------------------------------------------------------

    @property
    def here(self) -> Gate:
        """Who waits, and what is at hand, in the running event loop."""
        return self._gate()

    def _gate(self) -> Gate:
        loop = asyncio.get_running_loop()
        gate = self._gates.get(loop)
        if gate is None:
            for old in [old for old in self._gates if old.is_closed()]:
                del self._gates[old]
            gate = self._gates[loop] = Gate(self.plan, self._store, self.key, self.counts, self)
        return gate

    async def _wait(self, timeout: float | None, cost: int, told: float | None = None) -> tuple[Gate, Waiter]:
        return await self._telling(self._join_and_wait(math.inf if timeout is None else timeout, cost, told))

    async def _telling(self, waiting: Awaitable[T]) -> T:
        try:
            return await waiting
        except LimitTimeout as error:
            self.counts.timed_out(self._job_type())
            job = log_context.get()
            log.warning(
                "Rate limit timeout",
                extra=fields(
                    limiter_id=self.id,
                    key=self.key or None,
                    scope=self.scope or None,
                    timeout=error.timeout,
                    job_id=job.id if job else None,
                ),
            )
            raise

    async def _join_and_wait(self, timeout: float, cost: int, told: float | None = None) -> tuple[Gate, Waiter]:
        gate, start, told = self._gate(), time.monotonic(), timeout if told is None else told
        timeout = check_wait(timeout)
        try:
            waiter = gate.join(cost, start + timeout, told)
        except CostTooHigh:
            await gate.learn()  # a rule that was changed meanwhile may allow it
            waiter = gate.join(cost, start + timeout, told)
        if waiter.future.done():
            waiter.future.result()
        else:
            await self._served(gate, waiter)
        return gate, waiter

    async def _wait_again(self, gate: Gate, waiter: Waiter) -> None:
        """For a thread that was told too late."""
        if not gate.runs(waiter):
            await self._served(gate, waiter)

    async def _served(self, gate: Gate, waiter: Waiter) -> None:
        start = time.monotonic()
        self.counts.waits += 1
        try:
            await waiter.future
            while not gate.runs(waiter):
                await waiter.future
        except asyncio.CancelledError:
            gate.leave(waiter)
            raise
        finally:
            waited = time.monotonic() - start
            self.counts.wait_seconds += waited
        self.counts.waited(self._job_type(), waited)

    def _job_type(self) -> str:
        """Who waits, as the metrics say it: see :meth:`named`."""
        if self.scope.startswith("job:"):
            return self.scope[4:]
        job = log_context.get()
        return job.task if job else self.scope

    def __repr__(self) -> str:
        return f"<Limiter {self.id}{'/' + self.key if self.key else ''} {self.plan.rule}>"


class SyncLimiter:
    """A limiter for blocking code: the methods of :class:`Limiter`, without ``await``.

    Its waiters stand in one line with those of all threads of the process. Not for use inside a running event loop.
    """

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self.id = limiter.id
        self.key = limiter.key

    def for_key(self, key: str) -> SyncLimiter:
        """As :meth:`Limiter.for_key`."""
        return self._limiter.for_key(key).sync

    def acquire(self, timeout: float | None = None, cost: int = 1) -> None:
        """As :meth:`Limiter.acquire`."""
        if not self._at_hand(cost):
            gate, waiter = self._wait(timeout, cost)
            _note_unchecked(gate, waiter)

    def try_acquire(self, timeout: float = 0, cost: int = 1) -> bool:
        """As :meth:`Limiter.try_acquire`."""
        if self._at_hand(cost):
            return True
        limiter, process = self._limiter, this_process()
        try:
            gate, waiter = process.run(limiter._join_and_wait(timeout, cost), _undo_one)
            while not waiter.in_time():
                process.run(limiter._wait_again(gate, waiter), lambda _: gate.undo(waiter))
            _note_unchecked(gate, waiter)
        except LimitTimeout:
            return False
        return True

    def _wait(self, timeout: float | None, cost: int) -> tuple[Gate, Waiter]:
        limiter, process = self._limiter, this_process()
        gate, waiter = process.run(limiter._wait(limiter.plan.timeout if timeout is None else timeout, cost), _undo_one)
        while not waiter.in_time():  # this thread got its turn too late
            process.run(limiter._telling(limiter._wait_again(gate, waiter)), lambda _: gate.undo(waiter))
        return gate, waiter

    def _at_hand(self, cost: int) -> bool:
        gate = self._limiter._gates.get(this_process().loop())
        try:
            return not (gate is None or cost < 1 or gate.waiters) and gate.tokens.take(cost, time.monotonic())
        except (TypeError, OverflowError):  # no number, or too much: a wait is refused, and says why
            return False

    @contextmanager
    def acquire_context(self, timeout: float | None = None, cost: int = 1) -> Iterator[SyncLimiter]:
        """As :meth:`Limiter.acquire_context`."""
        gate, waiter = self._wait(timeout, cost)
        try:
            yield self
        finally:
            if waiter.holder in gate.held:
                this_process().run(gate.release(waiter.holder))

    def release(self) -> None:
        """As :meth:`Limiter.release`, for slots that blocking code has acquired."""
        this_process().run(self._limiter.release())

    def penalize(self, retry_after: float) -> None:
        """As :meth:`Limiter.penalize`."""
        this_process().run(self._limiter.penalize(retry_after))

    def state(self) -> LimiterState:
        """As :meth:`Limiter.state`."""
        return this_process().run(self._limiter.state())

    def update(self, **options: Any) -> None:
        """As :meth:`Limiter.update`."""
        this_process().run(self._limiter.update(**options))

    def __repr__(self) -> str:
        return f"<Sync{repr(self._limiter)[1:]}"


# -- several at once ------------------------------------------------------------------------------------


class _Together:
    """What :func:`acquire_all` returns: to be awaited, or entered."""

    def __init__(self, limiters: Sequence[Limiter], timeout: float | None, cost: int) -> None:
        self._limiters = limiters
        self._timeout = timeout
        self._cost = cost
        self._got: list[list[tuple[Gate, Waiter]]] = []  # of each one that is inside

    def __await__(self) -> Any:
        return self._wait().__await__()

    async def __aenter__(self) -> None:
        self._got.append(await self._acquire())

    async def __aexit__(self, *_: object) -> None:
        await _release(self._got.pop())

    async def _wait(self) -> None:
        await self._acquire()

    async def _acquire(self) -> list[tuple[Gate, Waiter]]:
        return await take_all([(limiter, self._cost) for limiter in self._limiters], self._timeout)


async def take_all(
    wanted: Sequence[tuple[Limiter, int]], timeout: float | None, *, quiet: bool = False
) -> list[tuple[Gate, Waiter]]:
    """What each limiter gave for its cost; all or none. ``quiet``: a timeout is part of the plan, not an event.

    Raises as :meth:`Limiter.acquire`.
    """
    deadline = time.monotonic() + (math.inf if timeout is None else check_wait(timeout))
    scarce, pause, late = 0, 0.0, 0
    while wanted:
        got = await _try_all(wanted, scarce, deadline, timeout, quiet)
        if not isinstance(got, int):
            if late == _LATE or all(waiter.in_time() for _, waiter in got) or time.monotonic() >= deadline:
                return got
            late += 1  # the last ones took so long to answer that the first ones' units are too old
            await _undo(got)
            continue
        scarce = got
        if pause:  # two that take the same ones in turn would do so for ever
            await asyncio.sleep(min(random.uniform(0, pause), max(0.0, deadline - time.monotonic())))
        pause = min(max(0.002, 2 * pause), 0.1)
    return []


async def _try_all(
    wanted: Sequence[tuple[Limiter, int]], scarce: int, deadline: float, timeout: float | None, quiet: bool
) -> list[tuple[Gate, Waiter]] | int:
    """Wait for one, then take the others if they are there at once; else which one was not."""
    limiter, cost = wanted[scarce]
    wait = limiter._join_and_wait if quiet else limiter._wait
    got = [await wait(max(0.0, deadline - time.monotonic()), cost, timeout)]
    index = scarce
    try:
        for index, (limiter, cost) in enumerate(wanted):
            if index != scarce:
                got.append(await limiter._join_and_wait(0, cost))
    except BaseException as error:
        await _undo(got)
        if isinstance(error, LimitTimeout):
            return index
        raise
    return got


async def _undo(got: Sequence[tuple[Gate, Waiter]]) -> None:
    if got:
        await asyncio.wait([gate.undo(waiter) for gate, waiter in got], timeout=SILENT)


async def _release(got: Sequence[tuple[Gate, Waiter]]) -> None:
    """Give slots back; all of them, whatever becomes of who waits for that."""
    giving = [gate.give(waiter.holder) for gate, waiter in got if waiter.holder in gate.held]
    if giving:
        await asyncio.wait(giving, timeout=SILENT)


def _note_unchecked(gate: Gate, waiter: Waiter) -> None:
    if gate.rule.max_concurrent is not None and not waiter.future.result():
        gate.slots.unchecked += 1


def _undo_one(got: tuple[Gate, Waiter]) -> None:
    gate, waiter = got
    gate.undo(waiter)


def _undo_all(got: Sequence[tuple[Gate, Waiter]]) -> None:
    for gate, waiter in got:
        gate.undo(waiter)


def acquire_all(limiters: Sequence[Limiter], timeout: float | None = None, cost: int = 1) -> _Together:
    """Acquire several limiters, all or none; nothing is kept of one while another is waited for.

    Await it, or enter it to have slots given back at the end of the block::

        async with fastq.acquire_all([stripe, tenants.for_key("42")], timeout=5):
            ...

    Raises:
        LimitTimeout: (a builtin TimeoutError) not all within ``timeout`` (None: as long as it takes).
    """
    return _Together(list(dict.fromkeys(limiters)), timeout, cost)


@contextmanager
def _give_slots_back(got: Sequence[tuple[Gate, Waiter]]) -> Iterator[None]:
    try:
        yield
    finally:
        if any(waiter.holder for _, waiter in got):
            this_process().run(_release(got))


def acquire_all_sync(
    limiters: Sequence[Limiter | SyncLimiter], timeout: float | None = None, cost: int = 1
) -> AbstractContextManager[None]:
    """:func:`acquire_all` for blocking code: when it returns, all have been acquired; entering it is for slots alone::

        with fastq.acquire_all_sync([stripe, pool], timeout=5):
            ...

    Raises as :func:`acquire_all`.
    """
    asked = dict.fromkeys(one._limiter if isinstance(one, SyncLimiter) else one for one in limiters)
    return _give_slots_back(this_process().run(take_all([(limiter, cost) for limiter in asked], timeout), _undo_all))


# -- around a function ------------------------------------------------------------------------------------


def limited(
    find: Callable[[], Limiter], template: str, timeout: float | None, cost: int
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that runs a function, async or not, inside ``acquire_context`` of a limiter.

    ``template`` is the partition's key, with the function's parameters in braces; "" is the limiter as a whole.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        key = key_of_call(template, inspect.signature(function), f"{function.__qualname__}()")

        def limiter(args: Any, kwargs: Any) -> Limiter:
            return find().for_key(key(args, kwargs))

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def call_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                async with limiter(args, kwargs).acquire_context(timeout, cost):
                    return await cast(Any, function)(*args, **kwargs)

            return cast(Callable[P, R], call_async)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with limiter(args, kwargs).sync.acquire_context(timeout, cost):
                return function(*args, **kwargs)

        return call

    return decorate
