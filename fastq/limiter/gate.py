"""Who waits for a limiter in one event loop, and the requests to its store that serve them.

First in, first out. At most one request is under way per gate; it asks for what all waiters need. The store says how long
the next unit takes, so a gate sleeps until then. It looks at least every :data:`LOOK` seconds all the same: a rule may have
been changed, a penalty lifted, units given back.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any, Final

from fastq.broker.commands import acquire, limit_state
from fastq.broker.keys import LimitKeys
from fastq.errors import BrokerError, BrokerUnavailable, LimitTimeout
from fastq.limiter.counts import Counts
from fastq.limiter.current import CurrentRule
from fastq.limiter.forecast import UNKNOWN, Forecast
from fastq.limiter.outage import SILENT, Outage
from fastq.limiter.plan import Plan
from fastq.limiter.slots import Slots
from fastq.limiter.stores import Store
from fastq.limiter.waiter import MISSED, Waiter
from fastq.limits import Acquired, CostTooHigh, LimitState, Rule, Terms, Tokens, block, check_cost
from fastq.logs import fields

__all__ = ["Gate"]

log = logging.getLogger("fastq.limits")

LOOK: Final = 1.0
"""Seconds after which a sleeping gate asks again."""

_TOGETHER: Final = 0.002  # seconds: several waiters of a fast limit are served at once rather than each by a request
_MOST_SLOTS: Final = 100  # per request
_TOLD_TOGETHER: Final = 100  # waiters: with more of them units would be too old before the last one runs
_SCAN: Final = 1_000  # waiters of whom each is told at once that its wait is too long
_LATE: Final = 5  # times in a row that units were too old to be used, until that is logged
_DENIED: Final = frozenset([b"short", b"full", b"penalized"])


class Gate:
    """The waiters and tokens of one limiter (or partition) in one event loop; used in that loop alone.

    The exceptions: a thread may read ``waiters`` and take from ``tokens``.
    """

    def __init__(self, plan: Plan, store: Store, key: str, counts: Counts, owner: object) -> None:
        self.plan = plan
        self.store = store
        self.counts = counts
        self.tokens = Tokens(counts.used)
        self.waiters: deque[Waiter] = deque()
        self._key = key
        self._open = plan.on_error == "open"
        self._keys = LimitKeys(store.prefix, plan.id, key)
        self._loop = asyncio.get_running_loop()
        self.slots = Slots(plan, store, self._keys, owner)
        self._current = CurrentRule(plan, store)
        self._queued = 0  # cost of all waiters
        self._asking = False
        self._timer: asyncio.TimerHandle | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._blocked: asyncio.Task[None] | None = None
        self._forecast = Forecast()
        self._marked, self._marked_at, self._recent = 0, time.monotonic(), 0
        self._late = 0  # times in a row
        self._outage = Outage(plan, store, self._relieve)
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- for the limiter ------------------------------------------------------------------------

    @property
    def rule(self) -> Rule:
        """The rule in force, as far as is known here."""
        return self._current.rule

    @property
    def short(self) -> bool:
        """Whether those who wait do so for units or a slot, and not just for an answer of the store."""
        return self._timer is not None or self._blocked is not None

    def terms(self) -> Terms:
        """The same in numbers, for the present."""
        self._current.renew()
        return self._current.terms

    @property
    def held(self) -> list[str]:
        """Holders whose slots nobody has given back."""
        return self.slots.held

    @property
    def keys(self) -> LimitKeys:
        """The names of the limiter's keys."""
        return self._keys

    def join(self, cost: int, deadline: float, timeout: float | None = None) -> Waiter:
        """Wait for ``cost`` units (and a slot) until ``deadline``, a monotonic time; in the past: for one answer only.

        ``timeout`` is how the caller said it, for the error's text. Raises LimitTimeout if that is known to be too short,
        CostTooHigh, ConfigError.
        """
        check_cost(self._current.terms, cost)
        now = time.monotonic()
        told = max(0.0, deadline - now) if timeout is None else timeout
        waiter = Waiter(cost, deadline, told, self._loop.create_future())
        if self._outage.known(now):
            if self._open:
                self._pass(waiter)
                return waiter
            if self._outage.silent and deadline <= now:
                raise BrokerUnavailable(str(self._outage.failure))
        if cost and not self.waiters and self.rule.max_concurrent is None and self.tokens.take(cost, now):
            self._queued += cost
            waiter.until = self.tokens.until
            self._grant(waiter, int(self.tokens.granted))
            return waiter
        if self._too_late(cost, deadline, now):
            raise self._no_room(waiter, now)
        self.waiters.append(waiter)
        self._stand(waiter, now)
        self._kick()
        return waiter

    def _stand(self, waiter: Waiter, now: float) -> None:
        if now < waiter.deadline != math.inf:
            waiter.timer = self._loop.call_later(waiter.deadline - now, self._expire, waiter)
        self._queued += waiter.cost

    def runs(self, waiter: Waiter) -> bool:
        """Whether a waiter uses what it was granted, now that it runs. If that is too old it goes back, and the waiter waits
        again, ahead of the others: for one more answer at least, as it was not the limit that made it wait.
        """
        now = time.monotonic()
        if now <= waiter.until:
            self._late = 0
            return True
        self._note_late(now - waiter.until + self._current.terms.use_within)
        if waiter.in_time():
            return True
        waiter.missed += 1
        if waiter.holder:
            self.undo(waiter)
        else:  # with what else came too late, before the next request
            self.tokens.put(waiter.cost, waiter.until, float(waiter.granted))
            self.tokens.count(-waiter.cost)
        waiter.future, waiter.holder, waiter.until = self._loop.create_future(), "", math.inf
        ahead = itertools.takewhile(lambda other: other.missed, self.waiters)  # in their order
        self.waiters.insert(sum(1 for _ in ahead), waiter)
        self._stand(waiter, now)
        self.look()
        return False

    def leave(self, waiter: Waiter) -> None:
        """A waiter was cancelled: what it was granted goes back."""
        future = waiter.future
        if not future.done() or future.cancelled():
            future.cancel()
            self._forget(waiter)
        elif future.exception() is None and future.result():
            self.undo(waiter)

    def undo(self, waiter: Waiter) -> asyncio.Task[None]:
        """Give back what a waiter was granted and has not used."""
        if not waiter.granted:  # it passed while the store could not be asked
            return self._spawn(self._return(0, 0, ()))
        self.tokens.count(-waiter.cost)
        if waiter.cost and not waiter.holder and time.monotonic() < waiter.until and not self.waiters:
            self.tokens.put(waiter.cost, waiter.until, float(waiter.granted))
            self._sweep_later(self._current.terms)
            return self._spawn(self._return(0, 0, ()))
        return self._spawn(self._return(waiter.cost, waiter.granted, self.slots.drop(waiter.holder)))

    async def release(self, holder: str) -> None:
        """Give a slot back. A store that is silent is told by and by: nobody waits for that."""
        await asyncio.wait([self.give(holder)], timeout=SILENT)

    def give(self, holder: str) -> asyncio.Task[None]:
        """Begin to give a slot back."""
        return self._spawn(self._return(0, 0, self.slots.drop(holder)))

    def free(self, holders: Sequence[str]) -> None:
        """Give slots back, without waiting for it."""
        dropped = [holder for name in holders for holder in self.slots.drop(name)]
        self._spawn(self._return(0, 0, dropped))

    async def learn(self) -> LimitState:
        """What the store knows; a rule that overrides the one known here is taken on."""
        self.counts.note("requests")
        _, state = await self.store.ask(limit_state(self._keys, self.terms()))
        if state.rule == self._current.override:
            return state
        self._take_on(state.rule, state.now_us)
        return await self.learn()

    def _take_on(self, override: bytes, now_us: int) -> None:
        self._current.take_on(override, now_us)
        self.forget_tokens()  # nor are they given back: the new rule has not counted them
        for waiter in self.waiters:
            if not waiter.future.done() and waiter.cost > self._current.terms.capacity:
                self._refuse(waiter, CostTooHigh(waiter.cost, self._current.terms.capacity))

    def forget_tokens(self) -> None:
        """After a penalty nothing that was granted before it is used."""
        self.counts.note("expired", self.tokens.drain())
        self._forecast.forget()

    def look(self) -> None:
        """Ask now: something has changed."""
        self._forecast.forget()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._kick()

    # -- waiters ----------------------------------------------------------------------------------

    def _too_late(self, cost: int, deadline: float, now: float) -> bool:
        if self._blocked is not None and deadline <= now and self._head() is not None:
            return True  # others wait for a slot
        return self._earliest(self._queued + cost, now) > max(deadline, now)

    def _earliest(self, units: float, now: float) -> float:
        """When that many units can be there at the earliest, as far as is known."""
        if self._timer is None and not self._forecast.fresh(now):
            return UNKNOWN
        return self._forecast.earliest(units, self.tokens.left(now), now, self._current.terms)

    def _head(self) -> Waiter | None:
        while self.waiters:
            if not self.waiters[0].future.done():
                return self.waiters[0]
            self.waiters.popleft()
        return None

    def _forget(self, waiter: Waiter) -> None:
        self._queued -= waiter.cost
        if waiter.timer is not None:
            waiter.timer.cancel()

    def _grant(self, waiter: Waiter, granted: int) -> None:
        self._forget(waiter)
        waiter.granted = granted
        waiter.future.set_result(True)

    def _pass(self, waiter: Waiter) -> None:
        self.counts.note("passed")
        waiter.future.set_result(False)

    def _refuse(self, waiter: Waiter, error: Exception) -> None:
        self._forget(waiter)
        waiter.future.set_exception(error)

    def _expire(self, waiter: Waiter) -> None:
        if not waiter.future.done():
            self._give_up(waiter, time.monotonic())

    def _give_up(self, waiter: Waiter, now: float) -> None:
        """Its time is up, for want of room or of an answer."""
        failure = self._outage.failure
        if failure is None:
            self._refuse(waiter, self._no_room(waiter, now))
        elif self._open:
            self._forget(waiter)
            self._pass(waiter)
        else:
            self._refuse(waiter, BrokerUnavailable(str(failure)))

    def _no_room(self, waiter: Waiter, now: float) -> LimitTimeout:
        later = self._earliest(waiter.cost, now) - now
        known = later if math.isfinite(later) else None
        plan, key = self.plan, self._key
        return LimitTimeout(plan.id, waiter.timeout, key=key, cost=waiter.cost, retry_after=known)

    def _refuse_hopeless(self, now: float) -> None:
        """Tell those who would wait in vain, those who asked for one answer among them."""
        many, ahead = len(self.waiters) > _SCAN, 0.0
        for waiter in [waiter for waiter in self.waiters if not many or waiter.deadline <= now]:
            if waiter.future.done():
                continue
            if self._earliest(ahead + waiter.cost, now) > waiter.deadline or waiter.deadline <= now:
                self._refuse(waiter, self._no_room(waiter, now))
            else:
                ahead += waiter.cost

    # -- asking -------------------------------------------------------------------------------------

    def _kick(self) -> None:
        if self._asking or self._timer is not None or self._blocked is not None:
            return
        now, head = time.monotonic(), self._head()
        if head is not None and self._forecast.forbids(head.cost, now):
            self._sleep(self._forecast.at - now)
        else:
            self._asking = True
            self._spawn(self._guarded(self._ask_on()))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _sleep(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(min(seconds, LOOK), self._wake)

    def _wake(self) -> None:
        self._timer = None
        if self._head() is not None:
            self._kick()

    async def _ask_on(self) -> None:
        """Ask until nobody waits, or it is known when to ask again."""
        while (head := self._head()) is not None and await self._ask(head):
            pass

    async def _guarded(self, asking: Coroutine[Any, Any, None]) -> None:
        """Nobody waits for ever, whatever comes of it."""
        try:
            await asking
        except BrokerError as error:
            self._failed(error)
        except Exception as error:
            log.exception("limiter failed", extra=fields(limiter_id=self.plan.id))
            self._refuse_all(error)
        finally:
            self._asking = False
        if self._head() is not None:
            self._kick()

    async def _ask(self, head: Waiter) -> bool:
        """One request. True: ask again at once."""
        if not self.tokens.left(time.monotonic()) and self.tokens.expired:  # left() finds these
            with self._outage.watch(self._current.terms.use_within):
                await self._give_back_expired()
        now, terms = time.monotonic(), self.terms()
        if self.rule.max_concurrent is not None:
            return await self._ask_for_slots(terms)
        need = max(0, head.cost - (held := self.tokens.left(now)))
        want = block(terms, max(need, self._queued - held), self._lately(now, terms))
        command = acquire(self._keys, terms, need=need, want=want, override=self._current.override)
        sent, reply = await self._request(command)
        if reply.status != b"granted":
            return await self._not_granted(reply, terms, need)
        now = self._put(sent, reply, terms)
        while self._serve(now) == _TOLD_TOGETHER:
            await asyncio.sleep(0)  # they run, before the next ones' units are taken
            now = time.monotonic()
        self._sweep_later(terms)
        return self._head() is not None and self._rest(now, terms)

    def _serve(self, now: float) -> int:
        """Tell the next waiters that there is enough for; how many were told."""
        granted, told = int(self.tokens.granted), 0
        while told < _TOLD_TOGETHER and (head := self._head()) is not None and self.tokens.take(head.cost, now):
            self.waiters.popleft()
            head.until = self.tokens.until if head.cost else math.inf
            self._grant(head, granted)
            told += 1
        return told

    def _rest(self, now: float, terms: Terms) -> bool:
        """Sleep until the next unit is there; True when that is not known."""
        if self._forecast.at <= now:
            return True
        self._refuse_hopeless(now)
        together = _TOGETHER if len(self.waiters) > 1 and terms.rate * _TOGETHER > 1 else 0.0
        self._sleep(max(self._forecast.at - now, together))
        return False

    def top_up(self) -> None:
        """Ask for more before the last unit is used or too old, so that nobody has to wait for the answer."""
        self.tokens.mark, self.tokens.renew = 0, math.inf
        if not self._asking and self._timer is None and self._blocked is None:
            self._asking = True
            self._spawn(self._guarded(self._renew()))

    async def _renew(self) -> None:
        now, terms = time.monotonic(), self.terms()
        held = self.tokens.left(now) if terms.kind == "bucket" else 0
        want = block(terms, 0, self._lately(now, terms)) - held
        if want < 1:  # demand has fallen: what is here will do
            self._set_marks(held, terms, now, terms.use_within)
            return
        sent, reply = await self._request(acquire(self._keys, terms, want=want, override=self._current.override))
        if reply.status == b"granted":
            self._put(sent, reply, terms)
        else:
            await self._not_granted(reply, terms, 0)

    def _put(self, sent: float, reply: Acquired, terms: Terms) -> float:
        """Keep what was granted; the present time."""
        now, until = time.monotonic(), sent + terms.usable(reply.now_us)
        late = reply.units > 0 and until < now
        if late:
            self._answered_late(now - sent, now)
        self.tokens.put(reply.units, until, float(reply.now_us))
        held = self.tokens.left(now) if terms.kind == "bucket" else reply.units
        self._set_marks(held, terms, sent, until - sent)
        self._forecast.tell(now, 0 if late else reply.wait_us, 1)  # what came late goes back, and is there at once
        return now

    def _set_marks(self, held: int, terms: Terms, since: float, usable: float) -> None:
        """More is asked for when half of what is held is used; of a bucket also when it has lost half of its time, as it ends all at once.

        A slow limit, which yields one unit at a time, is not asked ahead. What a window has granted and nobody has used is given
        back when all of it has expired: renewed before that, it would never be, and count as used.
        """
        self.tokens.mark = held // 2
        self.tokens.renew = since + usable / 2 if held > 1 and terms.kind == "bucket" else math.inf

    async def _request(self, command: Any) -> tuple[float, Acquired]:
        self.counts.note("requests")
        with self._outage.watch(self._current.terms.use_within):
            sent, reply = await self.store.ask(command)
        self._outage.over()
        self.store.announce(self._keys, self.plan.rule)
        if reply.units:
            self.counts.note("granted", reply.units)
        elif reply.status in _DENIED:
            self.counts.note("denied")
        return sent, reply

    async def _not_granted(self, reply: Acquired, terms: Terms, need: float) -> bool:
        now = time.monotonic()
        match reply.status:
            case b"rule":
                self._take_on(reply.rule, reply.now_us)
                return True
            case b"window":
                self._current.set_clock(reply.now_us)
                return True
            case b"full":
                self._refuse_hopeless(now)
                if self._head() is not None:
                    self._blocked = self._spawn(self._block(reply.wait_us / 1e6))
                return False
            case b"penalized":
                self.counts.note("expired", self.tokens.drain())
                self._forecast.tell(now, reply.wait_us, 0)
            case _:
                self._forecast.tell(now, reply.wait_us, need + self.tokens.left(now))
                if self.tokens.left(now) and self._forecast.at - now > terms.use_within / 2:
                    with self._outage.watch(self._current.terms.use_within):  # they would go to waste
                        await self._return(self.tokens.drain(), self.tokens.granted, ())
                    return True
        head = self._head()
        self._refuse_hopeless(now)
        if self._head() is not head:
            return self._head() is not None
        self._sleep(self._forecast.at - now)
        return False

    def _lately(self, now: float, terms: Terms) -> int:
        """Units used in the last ``use_within`` seconds, roughly."""
        used, passed = self.tokens.used - self._marked, now - self._marked_at
        if passed >= terms.use_within:
            self._recent = math.floor(used * terms.use_within / passed)
            self._marked, self._marked_at = self.tokens.used, now
        return max(0, self._recent, used if passed < terms.use_within else 0)

    def _answered_late(self, age: float, now: float) -> None:
        """What was granted cannot be used any more. Who asked for one answer has another one, a few times."""
        self._note_late(age)
        for waiter in self.waiters:
            if waiter.deadline <= now and not waiter.future.done():
                waiter.missed += 1
                if waiter.missed > MISSED:
                    self._refuse(waiter, self._no_room(waiter, now))

    def _note_late(self, age: float) -> None:
        self._late += 1
        self.counts.note("late")
        if self._late == _LATE:
            told = fields(limiter_id=self.plan.id, use_within=self._current.terms.use_within, round_trip=round(age, 4))
            log.warning("limiter's store answers too late: raise use_within", extra=told)

    # -- slots ----------------------------------------------------------------------------------------

    async def _ask_for_slots(self, terms: Terms) -> bool:
        asked = [waiter for waiter in self.waiters if not waiter.future.done()][:_MOST_SLOTS]
        total = 0
        for n, waiter in enumerate(asked):
            waiter.holder = waiter.holder or self.slots.ticket()
            total += waiter.cost
            if total > terms.capacity:
                asked = asked[:n]
                break
        holders = [(waiter.holder, waiter.cost) for waiter in asked]
        most, lease_ms = self.rule.max_concurrent or 0, round(self.plan.lease * 1_000)
        override = self._current.override
        command = acquire(self._keys, terms, override=override, most=most, lease_ms=lease_ms, holders=holders)
        sent, reply = await self._request(command)
        if reply.status != b"granted":
            return await self._not_granted(reply, terms, asked[0].cost)
        now, served = time.monotonic(), asked[: reply.slots]
        late = terms.kind != "none" and reply.units > 0 and sent + terms.usable(reply.now_us) < now
        if late:
            self._answered_late(now - sent, now)
        unwanted = [waiter for waiter in served if late or waiter.future.done()]
        for waiter in served:
            if not late and not waiter.future.done():
                self.slots.hold(waiter.holder, terms)
                if terms.kind != "none" and waiter.cost:
                    waiter.until = sent + terms.usable(reply.now_us)
                self.tokens.count(waiter.cost)
                self._grant(waiter, reply.now_us)
        if unwanted:
            units = sum(waiter.cost for waiter in unwanted)
            with self._outage.watch(self._current.terms.use_within):
                await self._return(units, reply.now_us, [waiter.holder for waiter in unwanted])
        head = self._head()
        self._forecast.tell(now, 0 if late else reply.wait_us, head.cost if head is not None else 1)
        return head is not None and self._rest(now, terms)

    async def _block(self, lease_left: float) -> None:
        """Wait for a slot that is given back, or for the first lease to end."""
        longest = min(max(0.01, lease_left), LOOK)
        try:
            with self._outage.watch(self._current.terms.use_within, longest):
                woken = await self.store.wait_for_slot(self._keys, longest)
        except BrokerUnavailable:  # of this connection: the next request, over the other one, tells what is so
            self._blocked = None
            if self._head() is not None:
                self._sleep(longest)
            return
        except BrokerError as error:
            self._blocked = None
            self._failed(error)
            return
        finally:
            self._blocked = None
        if self._head() is not None:
            self._kick()
        elif woken:  # nobody here needs it any more
            await self.slots.pass_on()

    # -- giving back ----------------------------------------------------------------------------------

    def _sweep_later(self, terms: Terms) -> None:
        if self._sweeper is None and (self.tokens.left(time.monotonic()) or self.tokens.expired):  # left() finds these
            self._sweeper = self._loop.call_later(terms.use_within + 0.001, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        if self.tokens.left(time.monotonic()):
            self._sweep_later(self._current.terms)
        elif self.tokens.expired:
            self._spawn(self._give_back_expired())

    async def _give_back_expired(self) -> None:
        """Only when all have expired: what can still be used stays."""
        if self.tokens.left(time.monotonic()):
            return
        granted, units, terms = self.tokens.granted, self.tokens.drain(), self._current.terms
        self.counts.note("expired", units)
        if terms.kind != "bucket" or units * terms.a > terms.use_within * 1e6:
            # else as many have flowed in since: the bucket is where it would be
            await self.slots.give_back(terms, units, granted, ())

    async def _return(self, units: int, granted: float, holders: Sequence[str]) -> None:
        units = units if self._current.has_counted(granted) else 0
        if units:
            self.counts.note("returned", units)
        await self.slots.give_back(self._current.terms, units, granted, holders)

    # -- the store does not answer -----------------------------------------------------------------

    def _failed(self, error: BrokerError) -> None:
        """Open: everybody passes. Closed: those who wait do so until their time is up, and the store is asked again."""
        self.counts.note("errors")
        self._outage.failed(error)
        self._forecast.forget()
        if not self._open and not isinstance(error, BrokerUnavailable):
            self._refuse_all(error)
            return
        self._relieve()
        if self._head() is not None:
            self._sleep(self._outage.pause)

    def _relieve(self) -> None:
        """Let nobody wait for the store, but who has the time for it at a limiter that is closed."""
        now = time.monotonic()
        for waiter in self.waiters:
            if not waiter.future.done() and (self._open or waiter.deadline <= now):
                self._give_up(waiter, now)

    def _refuse_all(self, error: Exception) -> None:
        while (head := self._head()) is not None:
            self.waiters.popleft()
            self._refuse(head, error)
