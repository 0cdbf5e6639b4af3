"""Limits on jobs: who may start now, who waits here without a slot, who is parked in Redis, and when they are fetched back.

A job that its limits let run at once costs a look into the local tokens. One that they do not waits as a small task of its
own, first in, first out, for :data:`PATIENCE` at most; one that would wait longer, or finds the waiting room full, is parked
under its limit (``park.lua``). A worker that has parked jobs of a limit looks after it: it fetches the next ones
(``unpark.lua``) as the limit lets jobs pass, when the limit said that it would, and when a slot of it is given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

from fastq.app import FastQ
from fastq.arguments import untyped, with_first
from fastq.broker.commands import Batch, Parked
from fastq.broker.keys import LimitKeys
from fastq.broker.pauses import Pause
from fastq.context import JobContext, current
from fastq.errors import BrokerError, ConfigError, Fail, LimitTimeout
from fastq.limiter.api import Limiter, take_all
from fastq.limiter.gate import Gate
from fastq.limiter.jobs import JobLimiter
from fastq.limits import CostTooHigh
from fastq.worker.plan import Plan
from fastq.worker.ticker import beat

__all__ = ["Door", "Turnstile"]

log = logging.getLogger("fastq.worker")

PATIENCE: Final = 0.5
"""Seconds that a job waits in the worker; what takes longer waits in Redis."""

ROOM: Final = 0.25
"""A waiting room has place for what its limit lets pass in so many seconds."""

MOST_ROOM: Final = 1_000
LOOKED_AFTER: Final = 2_000
"""Milliseconds for which nobody else looks after a limit whose jobs a worker fetches."""

LONGEST_LOOK: Final = 30.0
"""Seconds after which jobs of a limit are fetched again, whatever it said."""

FAR: Final = 1.5
"""Seconds: of limits whose jobs are fetched later than this, :data:`FETCHES` are asked once a second whether they allow more by now."""

FETCHES: Final = 20
"""Limits whose jobs are fetched in one turn."""

DOORS: Final = 10_000
"""Limits, or partitions, that are remembered although no job waits."""

ASK_AGAIN: Final = 2.0
"""Seconds after which a worker that uses a limit asks whether jobs are parked that nobody else looks after."""


class Door:
    """One limit, or one partition of it, that jobs of one queue have to pass in this worker."""

    __slots__ = (
        "asked_at",
        "freed",
        "gate",
        "least",
        "limiter",
        "name",
        "parked",
        "pause",
        "penalty",
        "queue",
        "room",
        "timer",
        "waiting",
    )

    def __init__(self, queue: str, name: str, limiter: Limiter) -> None:
        self.queue = queue
        self.name = name  # LimitKeys.name
        self.limiter = limiter
        self.gate = limiter.here
        rate = limiter.plan.rule.terms(0).rate
        self.least = self.room = min(max(1, int(min(rate, 1e6) * ROOM)), MOST_ROOM)
        self.waiting = 0
        self.parked = False  # as far as this worker knows, jobs are parked, and it looks after them
        self.asked_at = -ASK_AGAIN
        self.pause = 0.0  # seconds until the next look when nobody knows how long the limit takes
        self.timer: asyncio.TimerHandle | None = None
        self.freed: list[str] = []
        self.penalty = 0  # the end of the one that was seen last, the store's clock in µs

    async def allows_more(self) -> bool:
        """Whether an operator has changed the rule, ended a penalty or reset the limit since it was asked last. Raises BrokerError."""
        gate, rule = self.gate, self.gate.rule
        state = await gate.learn()
        end = state.now_us + state.penalty_us if state.penalty_us else 0
        lifted, self.penalty = self.penalty - max(end, state.now_us) > 50_000, end
        full = not end and gate.rule.max_concurrent is None and state.left >= gate.terms().capacity
        return lifted or full or gate.rule is not rule

    @property
    def idle(self) -> bool:
        """Whether it may be forgotten."""
        return not self.waiting and not self.parked and not self.freed


class Waiting:
    """A job that waits here."""

    __slots__ = ("doors", "job", "since", "task")

    def __init__(self, job: JobContext, doors: list[Door]) -> None:
        self.job = job
        self.doors = doors
        self.since = time.monotonic()
        self.task: asyncio.Task[None] | None = None


class Turnstile:
    """The limits of one worker's jobs.

    Args:
        app: tasks and limiters.
        batches: per queue, where parked jobs are put.
        plans: the executor's; one of a task with one limit for all its jobs is told its door, for the compiled runner.
        admit: called with a job that may start now; False: there is no slot for it after all.
        wake: called when a turn has something to do.
    """

    def __init__(
        self,
        app: FastQ,
        batches: dict[str, Batch],
        plans: Mapping[str, Plan],
        admit: Callable[[JobContext], bool],
        wake: Callable[[], None],
    ) -> None:
        self._app = app
        self._batches = batches
        self._admit = admit
        self._wake = wake
        self._doors: OrderedDict[tuple[str, str], Door] = OrderedDict()
        self._wanted: dict[Door, None] = {}  # the next turn fetches jobs of theirs
        self._busy: dict[Door, None] = {}  # those at which jobs wait
        self._far: OrderedDict[Door, None] = OrderedDict()  # those whose jobs are not fetched for a while
        self._some_far = asyncio.Event()
        self._fixed: dict[tuple[str, str], Door] = {}  # (task, queue) -> the one door of tasks that have just one
        self._waiting: dict[JobContext, Waiting] = {}
        self._loop = asyncio.get_running_loop()
        self.limited: dict[str, dict[str, list[JobLimiter]]] = {}
        """Task -> queue -> its limiters; tasks without any are not in here, unless they are paused."""
        self._plans = plans
        self._paused: dict[str, dict[str, list[Pause]]] = {}
        for task in app.tasks:
            by_queue = {queue: found for queue in batches if (found := app.limits_of(task, queue))}
            if by_queue:
                self.limited[task] = by_queue

    # -- may it start? ------------------------------------------------------------------------

    def passes(self, job: JobContext, free: int) -> bool | None:
        """Whether a job may start now. False: it has been taken care of, it waits here, or is parked. None: it is too early
        to tell, as many as there are ``free`` slots wait for an answer.
        """
        if self._paused and self._is_paused(job):
            return False
        limiters = self.limited[job.task].get(job.queue)
        if not limiters:
            return True
        door = self._fixed.get((job.task, job.queue))
        if door is None and len(limiters) == 1 and limiters[0].plain:
            door = self._fixed[job.task, job.queue] = self._door(job.queue, limiters[0].limiter)
        if door is not None and not self._paused and limiters[0].cost:
            self._plans[job.task].doors[job.queue] = (door, cast(int, limiters[0].cost))
        if door is not None and not door.waiting and (not door.parked or job.unparked):
            cost: Any = limiters[0].cost
            if cost and door.limiter.take_at_hand(cost):
                job.permits = ()
                return True
        try:
            wanted = self._takes(job, limiters)
        except (CostTooHigh, ConfigError) as error:
            job.arguments = Fail(str(error))  # the run raises it; another one would be no better
            job.permits = ()
            return True
        except Exception as error:  # noqa: BLE001 - the user's own functions, and what they make of the arguments
            job.arguments = error  # classified like any other error of the job
            job.permits = ()
            return True
        doors = [door] if door is not None else [self._door(job.queue, limiter) for limiter, _ in wanted]
        return self._wait(job, wanted, doors, free)

    def _takes(self, job: JobContext, limiters: list[JobLimiter]) -> list[tuple[Limiter, int]]:
        if all(limiter.plain for limiter in limiters):
            return [limiter.of((), {}) for limiter in limiters]
        if job.extra.takes is not None and job.extra.takes >= 0:  # its first argument is not known yet
            return [limiter.of(*untyped(with_first(job.task, job.envelope.body, None))) for limiter in limiters]
        if job.arguments is None:
            job.arguments = self._app.tasks[job.task].arguments.decode(job.envelope.body)
        args, kwargs = job.arguments
        return [limiter.of(args, kwargs) for limiter in limiters]

    def _door(self, queue: str, limiter: Limiter) -> Door:
        name = LimitKeys("", limiter.id, limiter.key).name
        door = self._doors.get((queue, name))
        if door is None:
            self._forget_idle()
            door = self._doors[queue, name] = Door(queue, name, limiter)
        else:
            self._doors.move_to_end((queue, name))
        return door

    def _forget_idle(self) -> None:
        while len(self._doors) >= DOORS:
            key, door = self._doors.popitem(last=False)
            if not door.idle:
                self._doors[key] = door  # the oldest is in use: there are many limits at work, let it grow
                return

    # -- paused tasks ---------------------------------------------------------------------------

    def pause(self, queue: str, pauses: list[Pause]) -> None:
        """Let no job of these tasks start, or none of these calls, and those of all others."""
        by_task: dict[str, list[Pause]] = {}
        for pause in pauses:
            by_task.setdefault(pause.task, []).append(pause)
        if by_task == self._paused.get(queue, {}):
            return
        for plan in self._plans.values():
            plan.doors.clear()  # until no task is paused, each job is asked about here
        self._paused[queue] = by_task
        if not by_task:
            del self._paused[queue]
        paused = {task for tasks in self._paused.values() for task in tasks}
        for task in [task for task, limiters in self.limited.items() if not limiters and task not in paused]:
            del self.limited[task]
        for task in paused:
            self.limited.setdefault(task, {})

    def _is_paused(self, job: JobContext) -> bool:
        """Whether a job is paused; then it was put aside."""
        for pause in self._paused.get(job.queue, {}).get(job.task, ()):
            if not pause.where or self._means(pause, job):
                self._batches[job.queue].parked.append(Parked(job.id, pause.name, _score(job), LOOKED_AFTER))
                self._wake()
                return True
        return False

    def _means(self, pause: Pause, job: JobContext) -> bool:
        task = self._app.tasks.get(job.task)
        if task is None:
            return False  # nobody here knows what its arguments are called
        try:
            if job.arguments is None:
                job.arguments = task.arguments.decode(job.envelope.body)
            args, kwargs = job.arguments
            return pause.holds(task.arguments.named(args, kwargs))
        except Exception:  # noqa: BLE001 - arguments that cannot be read are told by the run
            job.arguments = None
            return False

    # -- waiting here -------------------------------------------------------------------------

    def _wait(self, job: JobContext, wanted: list[tuple[Limiter, int]], doors: list[Door], free: int) -> bool | None:
        for door in doors:
            if (door.parked and not job.unparked) or door.waiting >= door.room:
                self._park_behind(job, door)
                return False
        if self.unanswered >= free:
            return None
        waiting = self._waiting[job] = Waiting(job, doors)
        for door in doors:
            door.waiting += 1
            self._busy[door] = None
            if waiting.since - door.asked_at > ASK_AGAIN:
                self._want(door)
        waiting.task = self._loop.create_task(self._pass(waiting, wanted))
        return False

    async def _pass(self, waiting: Waiting, wanted: list[tuple[Limiter, int]]) -> None:
        job = waiting.job
        current.set(job)  # whose wait it is, for the metrics
        got = None
        try:
            got = await take_all(wanted, PATIENCE, quiet=True)
        except asyncio.CancelledError:
            return  # whoever cancelled it has taken care of the job
        except LimitTimeout as error:
            self._leave(waiting)
            short = next(d for d in waiting.doors if (d.limiter.id, d.limiter.key) == (error.limiter_id, error.key))
            self._park(job, short, error.retry_after)
            return
        except BrokerError:
            self._leave(waiting)
            self._park(job, waiting.doors[0], 1.0)
            return
        except (CostTooHigh, ConfigError) as error:
            job.arguments = Fail(str(error))
        except Exception as error:  # a fault of ours must not lose the job
            log.exception("limit failed", extra={"fields": {"job": job.id, "task": job.task}})
            job.arguments = error
        self._leave(waiting)
        job.permits = [(gate, waiter.holder) for gate, waiter in got or () if waiter.holder]
        if (not self._paused or not self._is_paused(job)) and self._admit(job):  # paused while it waited
            for door in waiting.doors:
                door.room = min(door.room + 1, MOST_ROOM)
        else:
            for gate, waiter in got or ():
                gate.undo(waiter)
            job.permits = None
        for door in waiting.doors:
            self._want_more(door)

    def _leave(self, waiting: Waiting) -> None:
        self._waiting.pop(waiting.job, None)
        for door in waiting.doors:
            door.waiting -= 1
            if not door.waiting:
                self._busy.pop(door, None)

    # -- parked -------------------------------------------------------------------------------

    def _park_behind(self, job: JobContext, door: Door) -> None:
        """Aside, as others are before it; whoever of them leaves makes room."""
        if not door.parked:
            door.parked, door.pause = True, 0.0
        if not door.waiting and door.timer is None:
            self._wanted[door] = None
        self._aside(job, door)

    def _park(self, job: JobContext, door: Door, retry_after: float | None) -> None:
        """Aside, until the limit lets it pass; ``retry_after``: seconds until that can be, if it is known."""
        if not door.parked:
            door.parked, door.pause = True, 0.0
        door.room = max(door.least, door.room // 2)
        self._look_later(door, retry_after)
        self._aside(job, door)

    def _aside(self, job: JobContext, door: Door) -> None:
        look_ms = LOOKED_AFTER
        if door.timer is not None:
            look_ms += round(max(door.timer.when() - self._loop.time(), 0.0) * 1_000)
        self._batches[job.queue].parked.append(Parked(job.id, door.name, _score(job), look_ms))
        self._wake()

    def _look_later(self, door: Door, retry_after: float | None) -> None:
        """Fetch parked jobs when the limit says that it has room, or after a while that doubles."""
        if door.timer is not None and retry_after is None:
            return
        if retry_after is None:
            if door.waiting:
                return  # those who wait here make room, and fetch the next ones
            door.pause = retry_after = min(max(0.05, door.pause * 2), 4.0)
        self._wanted.pop(door, None)
        if door.timer is not None:
            door.timer.cancel()
        door.timer = self._loop.call_later(min(max(retry_after, 0.001), LONGEST_LOOK), self._want, door)
        if retry_after > FAR:
            self._far[door] = None
            self._some_far.set()

    async def watch(self) -> None:
        """Until cancelled: fetch the jobs of limits that allow more than they did, as an operator wanted it."""
        while True:
            if not self._far:  # a worker without such jobs is not woken
                self._some_far.clear()
            await self._some_far.wait()
            for _ in range(2):  # once a second
                await beat()
            for door in list(itertools.islice(self._far, FETCHES)):
                self._far.move_to_end(door)
                with contextlib.suppress(BrokerError):  # those who fetch tell of it
                    if await door.allows_more():
                        for other in [other for other in self._far if other.limiter.id == door.limiter.id]:
                            self._want(other)
                        break

    def _want(self, door: Door) -> None:
        self._far.pop(door, None)
        if door.timer is not None:
            door.timer.cancel()
            door.timer = None
        self._wanted[door] = None
        self._wake()

    def _want_more(self, door: Door) -> None:
        if door.parked and door not in self._wanted and door.waiting <= door.room // 2:
            self._want(door)

    def fetches(self, queue: str, free: int) -> list[tuple[Door, int]]:
        """Which limits' jobs to fetch now, and how many of each, for ``free`` slots."""
        found: list[tuple[Door, int]] = []
        if free < 1:
            return found
        for door in [door for door in self._wanted if door.queue == queue][:FETCHES]:
            del self._wanted[door]
            want = min(door.room, free) - door.waiting
            if want > 0:  # else those who wait here fetch the next ones when they leave
                door.asked_at = time.monotonic()
                found.append((door, want))
        return found

    @property
    def unanswered(self) -> int:
        """Jobs that are about to start, as far as is known: their limits have not said no."""
        busy = itertools.islice(self._busy, FETCHES)
        return sum(door.waiting for door in busy if not door.limiter.short()) if self._busy else 0

    @property
    def wanting(self) -> bool:
        """Whether a turn may have something to fetch."""
        return bool(self._wanted)

    def fetched(self, door: Door, got: int, left: int) -> None:
        """What came of a fetch."""
        door.parked = left > 0
        if got:
            door.pause = 0.0
        if door.parked and got:
            self._wanted[door] = None  # at once, as far as there is room; unless one of these finds that it has to wait
        elif door.parked:
            self._look_later(door, None)

    # -- slots --------------------------------------------------------------------------------

    def give_back(self, job: JobContext) -> None:
        """A job has ended: its slots are free, and jobs that wait for them are fetched."""
        for gate, holder in job.permits or ():
            door = self._doors.get((job.queue, gate.keys.name))
            if door is None:
                gate.free([holder])
                continue
            if not door.freed:
                self._loop.call_soon(self._free, door, gate)
            door.freed.append(holder)
            self._want_more(door)
        job.permits = None

    def _free(self, door: Door, gate: Gate) -> None:
        holders, door.freed = door.freed, []
        gate.free(holders)

    # -- the end ------------------------------------------------------------------------------

    def drop(self, jobs: Iterable[JobContext] | None = None) -> list[JobContext]:
        """Let jobs wait no more (None: all); what they were granted goes back. Returns those that waited."""
        dropped = []
        for job in list(self._waiting) if jobs is None else jobs:
            waiting = self._waiting.get(job)
            if waiting is not None:
                self._leave(waiting)
                if waiting.task is not None:
                    waiting.task.cancel()
                dropped.append(job)
        return dropped

    def close(self) -> None:
        """Nothing is looked after any more."""
        self.drop()
        for door in self._doors.values():
            if door.timer is not None:
                door.timer.cancel()


def _score(job: JobContext) -> float:
    """The order in which parked jobs come back: by priority, then age."""
    return (10 - min(max(job.envelope.priority, 0), 10)) * 1e13 + job.envelope.enqueued_at
