"""The worker's loop: one turn settles the last outcomes and reserves the next jobs, in one write per queue.

What can get lost is a reply. After a connection was lost, ``resume.lua`` tells what this worker holds: jobs that it
does not know were in a lost reply of reserve and are run; outcomes of jobs that it does not hold any more were settled.
The same comparison of counts after every turn finds whatever else could ever go apart.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Iterable

from fastq._core import take_in
from fastq.app import FastQ
from fastq.board import Slot, SlotState
from fastq.broker.command import raw
from fastq.broker.commands import Batch, Held, Recovered, Reserved, Unparked, recover, reserve, resume, unpark
from fastq.broker.connection import AsyncConnection
from fastq.context import JobContext
from fastq.errors import BrokerError, BrokerReplyError, UndecodableJob
from fastq.job import WorkerCard, read_envelope
from fastq.metrics import WorkerMetrics
from fastq.values import QueueOrder
from fastq.worker.beside import Beside
from fastq.worker.cancels import Cancels
from fastq.worker.executor import Executor
from fastq.worker.lane import Lane, Turns, hungry, key_of, lanes_of, unsettled
from fastq.worker.pauses import Pauses
from fastq.worker.plan import slots
from fastq.worker.rate import Rate
from fastq.worker.registration import Registration
from fastq.worker.reports import Reports
from fastq.worker.ticker import Ticker
from fastq.worker.trouble import Trouble, hopeless, refused
from fastq.worker.turnstile import LOOKED_AFTER, Turnstile
from fastq.worker.waker import RESERVE_MOST, Wakers

__all__ = ["WorkerLoop"]

log = logging.getLogger("fastq.worker")

SURPLUS_SECONDS = 0.05
"""Jobs are reserved beyond the free slots only as far as the measured rate says they start within this time."""

BACKLOG_PATIENCE = 0.25
"""Reserved jobs that have not started after so many seconds, all slots taken, are handed back."""

GLANCE = 0.02
"""A busy worker looks into its other, supposedly empty queues every so many seconds; an idle one waits for their tokens."""


class WorkerLoop:
    """Reserves, runs and settles until it is told to stop.

    Args:
        app: tasks and settings.
        connection: for this loop alone.
        waker: a second connection, for the blocking pop on the wake lists.
        order: the queues and their order.
        slot: where signs of life go.
        metrics: where runs are counted.
        worker_id: unique for this incarnation; no colon in it.
    """

    def __init__(
        self,
        app: FastQ,
        connection: AsyncConnection,
        waker: AsyncConnection,
        order: QueueOrder,
        slot: Slot,
        metrics: WorkerMetrics,
        card: WorkerCard,
        worker_id: str,
    ) -> None:
        self._app = app
        self._settings = app.settings
        self._connection = connection
        self._slot = slot
        self._metrics = metrics
        self.worker_id = worker_id
        self._incarnation = 1
        self._lanes = lanes_of(app, order, connection.clock.now_ms)
        self._by_name = {lane.name: lane for lane in self._lanes}
        self._registration = Registration(connection, app.settings, self._lanes, card, self._what_it_is)
        self._in_turn = Turns(self._lanes, weighted=order.weights is not None)
        self._event = asyncio.Event()
        batches = self._batches = {lane.name: lane.batch for lane in self._lanes}
        self.executor = Executor(app, metrics, batches, connection.clock.now_ms, self._after_outcomes, slots(app))
        self._runs = self.executor.runner
        self._turnstile = Turnstile(app, batches, self.executor.plans, self._start_waiting, self._event.set)
        self._pauses = Pauses(connection, self._lanes, self._turnstile)
        self.executor.give_back = self._turnstile.give_back
        self._reports = self._runs.desk = Reports(app, connection, lambda: self.worker_id)
        self._backlog: deque[JobContext] = deque()
        self._backlog_since = 0.0
        self._aside: JobContext | None = None  # waits until it is the only one here on its last life
        self._last_life = max(self._settings.max_deliveries - 1, 1)
        self._filling = False
        self._asleep = False  # and only outcomes, tokens and signals wake it
        self._cancels = Cancels(connection, self._lanes, self._cancel)
        self._waker = Wakers(waker, connection, self._lanes, self._ask_of_next, self._arrived, self._called)
        self._registered = False
        self.quiet = False
        self._stop_at: float | None = None  # monotonic time at which running jobs are interrupted
        self._stopping = False
        self._rate = Rate(time.monotonic(), slots(app))
        self._random = random.Random()
        self._ticker = Ticker()
        self._trouble = Trouble()
        self._unsure = False  # a turn has failed: what Redis has of it is not known, and no other one may begin

    # -- from outside -------------------------------------------------------------------------

    def stop(self, grace: float, reason: str) -> None:
        """Take nothing new, hand back what has not started, interrupt what still runs after ``grace`` seconds.

        A later call may only shorten the time.
        """
        at = time.monotonic() + grace
        self._stop_at = at if self._stop_at is None else min(self._stop_at, at)
        if not self._stopping:
            self._stopping = True
            self.executor.hold()
            self._slot.state = SlotState.DRAINING
            self._ticker.hurry()
            fields = {"worker": self.worker_id, "reason": reason, "running": len(self.executor.running)}
            log.info("worker drains", extra={"fields": fields})
        self._release_backlog()
        self._event.set()

    def set_quiet(self, quiet: bool) -> None:
        """Take nothing new (True), or again (False)."""
        if self._stopping or quiet == self.quiet:
            return
        self.quiet = quiet
        self.executor.gathering.hold(quiet)
        self._slot.state = SlotState.QUIET if quiet else SlotState.RUNNING
        log.info("worker quiet" if quiet else "worker resumes", extra={"fields": {"worker": self.worker_id}})
        if quiet:
            self._release_backlog()
        self._all_hungry()
        self._event.set()

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for."""
        return self._stopping

    # -- the loop -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until stopped; returns with nothing held in Redis, unless Redis stays away.

        Raises:
            BrokerReplyError: this user may not do what a worker does, and has never done it.
        """
        self._runs.begin_here()
        beside = Beside(
            self._event.set,
            self._tick(),
            self._waker.run(),
            self._cancels.run(),
            self._pauses.run(),
            self._turnstile.watch(),
            self._registration.run(),
        )
        try:
            while not (self._stopping and self._over()):
                beside.check()
                try:
                    if self._unsure:
                        await self._find_out()
                    if not self._registered:
                        await self._register()
                    await self._step()
                    self._trouble.ends(self._held)
                except BrokerError as error:
                    if self._incarnation == 1 and not self._registered and hopeless(error):
                        raise
                    await self._after_error(error)
            await self._goodbye()
        finally:
            self._turnstile.close()
            self.executor.close()
            await asyncio.gather(beside.close(), self._reports.close(), return_exceptions=True)
            await self._connection.close()
            await self._waker.close()

    def _over(self) -> bool:
        if not self._stopping or self.executor.running:
            return False
        if not any(lane.held for lane in self._lanes):
            return True
        # Redis is away: the outcomes wait for it until the grace is over, and not until the supervisor kills.
        return self._unsure and self._stop_at is not None and time.monotonic() > self._stop_at + 1.0

    async def _step(self) -> None:
        want, wanting = self._want(), self._turnstile.wanting and self._runs.free > 0
        if not want and not wanting and not unsettled(self._lanes):
            await self._sleep()
            return
        now = time.monotonic()
        for lane in self._in_turn():
            ask = min(want, RESERVE_MOST) if lane.hungry or now - lane.asked_at > GLANCE else 0
            if ask > 0 or wanting or lane.batch:
                want -= await self._turn(lane, max(ask, 0))
        if not self._backlog and not hungry(self._lanes):
            await self._sleep()

    async def _sleep(self) -> None:
        """Until an outcome, a wake token or a signal."""
        if self._stopping and self._over():
            return  # the last outcome was settled just now, and nothing else will happen
        if not unsettled(self._lanes):
            self._trouble.ends(self._held)
            self._waker.wait()
            self._asleep = True
            try:
                await self._event.wait()
            finally:
                self._asleep = False
        self._event.clear()

    def _want(self) -> int:
        """How many jobs to reserve now: the free slots, and the surplus that will start at once."""
        if self._stopping or self.quiet or not hungry(self._lanes):
            return 0
        return self._room(min(int(self._rate.value * SURPLUS_SECONDS), self._settings.prefetch_max))

    def _room(self, surplus: int) -> int:
        """How many more jobs would fit: into the free slots, and into the surplus."""
        room = self._runs.free + surplus - len(self._backlog) - self._turnstile.unanswered
        if self._backlog and room < surplus // 2:
            return 0  # enough to go on with: fewer, larger batches
        if self._settings.max_jobs:  # its last jobs are on their way: the process is about to be replaced
            room = min(room, self._settings.max_jobs - self.executor.finished - self._held())
        return max(room, 0)

    # -- a turn ---------------------------------------------------------------------------------

    async def _turn(self, lane: Lane, ask: int) -> int:
        """Settle the lane's outcomes and reserve up to ``ask`` jobs in one write. Returns how many came."""
        commands, arrivals = lane.outcomes(self._batches, self.worker_id, self._settings.dead_max), self._waker.arrivals
        outcomes = len(commands)
        if ask:
            commands.append(reserve(lane.keys, self.worker_id, ask))
        fetches = self._turnstile.fetches(lane.name, self._runs.free) if self._turnstile.wanting else ()
        for door, want in fetches:
            commands.append(unpark(lane.keys, self.worker_id, door.name, want, LOOKED_AFTER))
        if not commands:
            return 0
        sent = self._connection.send_all(commands)
        self._metrics.count("round_trips")
        try:
            replies = [await self._connection.finish(c, future) for c, future in zip(commands, sent, strict=True)]
        except BrokerReplyError as error:
            raise refused(lane.name, error) from None
        if outcomes:
            self._confirm(lane, [job_id for settled in replies[:outcomes] for job_id in settled.stale])
        got = self._reserved(lane, replies[outcomes], ask) if ask else 0
        for (door, _), unparked in zip(fetches, replies[outcomes + (ask > 0) :], strict=True):
            self._turnstile.fetched(door, self._take_in(lane, unparked), unparked.left)
        held = replies[-1].held
        if held == -1:
            self._lost_lease()
        elif held == len(lane.held):
            lane.doubt = False
        elif self._waker.armed or self._waker.arrivals != arrivals:  # what the waker took may be in one count only
            lane.doubt = True
        else:
            await self._reconcile(lane)
        self._fill()
        return got

    def _ask_of_next(self) -> tuple[str, int]:
        """For the waker: this worker's id, and for how many jobs it has room. Nobody: it takes nothing now."""
        if self._stopping or self.quiet or not self._registered:
            return "", 0
        return self.worker_id, self._room(0)

    def _arrived(self, lane: Lane, reserved: Reserved | None, ask: int) -> bool:
        """The waker's pop has ended: with jobs, if it had a reserve behind it; the loop looks into the lane otherwise.

        Whether the loop sleeps on, as it has nothing to do before an outcome is there.
        """
        if reserved is None or reserved.held == -1:
            lane.hungry = True
        else:
            if lane.sent is not None:
                lane.taken_anew(reserved.ids)
            self._reserved(lane, reserved, ask)
            self._fill()
            if self._asleep and not lane.hungry and not lane.batch:
                return True
        self._event.set()
        return False

    async def _called(self) -> None:
        """This worker was meant: a job that it holds was cancelled, or it has room again."""
        await self._cancels.look()
        self._event.set()

    def _reserved(self, lane: Lane, reserved: Reserved, ask: int) -> int:
        got = self._take_in(lane, reserved)
        lane.hungry = got >= ask
        lane.asked_at = self._slot.reserved_at = now = time.monotonic()
        if lane.hungry:
            self._rate.notice(now, self.executor.finished)
        return got

    def _confirm(self, lane: Lane, stale: list[bytes]) -> None:
        lane.confirm()
        if stale:
            self._metrics.count("stale_outcomes", len(stale))
            ids = [job_id.decode("utf-8", "replace") for job_id in stale[:5]]
            log.warning(
                "outcomes dropped, lease lost", extra={"fields": {"queue": lane.name, "count": len(stale), "jobs": ids}}
            )

    def _take_in(self, lane: Lane, reserved: Reserved | Unparked) -> int:
        ids, envelopes, deliveries = reserved.ids, reserved.envelopes, reserved.deliveries
        if not self._backlog:
            self._backlog_since = time.monotonic()
            if self._ticker.resting:
                self._ticker.hurry()
        if isinstance(reserved, Unparked):
            odd: Iterable[int] = range(len(ids))
        else:
            odd = take_in(
                ids, envelopes, deliveries, lane.name, lane.held, self._backlog, read_envelope, JobContext, lane.plain,
                self._settings.max_body,
            )  # fmt: skip
        unparked = isinstance(reserved, Unparked)
        for index in odd:
            self._admit(lane, ids[index], envelopes[index], deliveries[index] if deliveries else 0, unparked=unparked)
        return len(ids)

    def _admit(self, lane: Lane, raw_id: bytes, data: bytes | None, deliveries: int, *, unparked: bool = False) -> None:
        job_id = key_of(raw_id)
        if isinstance(job_id, bytes):
            lane.set_aside(self.executor, raw_id, data)
            return
        lane.held[job_id] = None
        if not data:  # somebody removed the envelope by hand: nothing to run, nothing to keep
            log.error("job without envelope", extra={"fields": {"job": job_id, "queue": lane.name}})
            lane.batch.end_unrecorded(job_id)
            return
        try:
            envelope = lane.read(job_id, data)
            if len(envelope.body) > self._settings.max_body:
                raise UndecodableJob(f"the body has {len(envelope.body):,} bytes, more than max_body")
        except UndecodableJob as error:
            self.executor.undecodable(job_id, lane.name, data, error)
            return
        job = JobContext(job_id, lane.name, envelope, deliveries)
        if unparked:
            job.unparked = True
        lane.held[job_id] = job
        self._backlog.append(job)

    def _fill(self) -> None:
        """Start reserved jobs while slots are free."""
        if self._filling:
            return
        if self._stopping or self.quiet:  # they were on their way when the word came
            self._release_backlog()
            return
        self._filling = True
        runs, backlog, last_life = self._runs, self._backlog, self._last_life
        limited, plans = self._turnstile.limited, self.executor.plans
        try:
            while runs.free > 0 and (backlog or (self._aside is not None and self._bring_back())):
                if not runs.fill(backlog, plans, limited, last_life):
                    continue
                job = backlog.popleft()
                if job.deliveries >= last_life and self._wait_for_trial(job):
                    continue
                if limited and job.permits is None and job.task in limited:
                    passed = self._turnstile.passes(job, runs.free)
                    if passed is None:
                        backlog.appendleft(job)
                        break
                    if not passed:
                        continue
                runs.free -= 1
                self.executor.start(job)
        finally:
            self._filling = False

    def _after_outcomes(self) -> None:
        if self._backlog or self._aside is not None:
            self._fill()
        self._event.set()

    def _start_waiting(self, job: JobContext) -> bool:
        """A job has waited for its limits and has them; False: there is no slot now, it has to wait for both."""
        if self._runs.free > 0 and not self._stopping and not self.quiet:
            self._runs.free -= 1
            self.executor.start(job)
            return True
        self._backlog.appendleft(job)
        self._fill()  # releases it, if this worker stops
        return False

    def _release_backlog(self) -> None:
        self._backlog.extendleft(self._turnstile.drop())
        if self._aside is not None:
            self._backlog.appendleft(self._aside)
            self._aside = None
        while self._backlog:
            job = self._backlog.popleft()
            self._batches[job.queue].released.append(job.id)
        self._event.set()

    def _cancel(self, job: JobContext, terminate: bool) -> None:
        if job is self._aside:
            self._aside = None
        elif job in self._backlog:
            self._backlog.remove(job)
        elif not self._turnstile.drop([job]):
            self.executor.stops.stop(job, "terminate" if terminate else "cancel")
            return
        self.executor.never_start(job)
        self._event.set()

    # -- jobs on their last life: one more death of their worker, and they are buried as poison. Such a job runs when it is
    # -- the only one of its kind that this worker holds; so the death has one culprit, and only that one is charged (F-07).

    def _alone(self, job: JobContext) -> bool:
        held = (other for lane in self._lanes for other in lane.held.values())
        return all(other is job or other is None or other.deliveries < self._last_life for other in held)

    def _wait_for_trial(self, job: JobContext) -> bool:
        """Whether this job has to wait: the first one here, until the others are gone; they for another time or worker."""
        if self._alone(job):
            return False
        if self._aside is None and not any(other.deliveries >= self._last_life for other in self.executor.running):
            self._aside = job
        else:
            self.executor.put_off(job, self._random.uniform(0.5, 1.5))
            self._event.set()
        return True

    def _bring_back(self) -> bool:
        """Let the job that waits be the next, if it may start now."""
        job = self._aside
        if job is None or not self._alone(job):
            return False
        self._aside = None
        self._backlog.appendleft(job)
        return True

    # -- when things go wrong ---------------------------------------------------------------------

    async def _after_error(self, error: BrokerError) -> None:
        self._metrics.count("redis_errors")
        self._unsure = True
        pause = self._trouble.goes_on(error)
        if not self._over():
            await asyncio.sleep(pause)

    def _held(self) -> int:
        return sum(len(lane.held) for lane in self._lanes)

    async def _find_out(self) -> None:
        """Connect, and learn what Redis has of ours; before that a new turn would overwrite what the last one sent."""
        await self._connection.connect()
        self._waker.drop("the other connection was lost")  # a reserve behind its pop would go on changing what is held
        for lane in self._lanes:
            if self._registered:
                await self._reconcile(lane)
        self._unsure = False
        self._all_hungry()
        self._metrics.count("reconnects")

    async def _reconcile(self, lane: Lane) -> None:
        """Compare what this worker knows with what Redis has in its running set, and mend either side."""
        lane.doubt = True  # until it is known: no reserve goes out behind the blocking pop
        try:
            reply: Held = await self._connection.call(resume(lane.keys, self.worker_id))
        except BrokerReplyError as error:
            raise refused(lane.name, error) from None
        if reply.held < 0:
            self._lost_lease()
            return
        lane.doubt = False
        theirs = {key_of(job_id): data for job_id, data in zip(reply.ids, reply.envelopes, strict=True)}
        if lane.sent is not None:  # its reply was lost
            lane.put_back(theirs)
        gone = [lane.held.pop(job_id) for job_id in list(lane.held) if job_id not in theirs]
        for job in gone:
            if job is not None and job in self.executor.running:
                self._lose(job)
        if gone:
            self._turnstile.drop(job for job in gone if job is not None)
            self._backlog = deque(job for job in self._backlog if job not in gone)
            self._aside = None if self._aside in gone else self._aside
        for job_id, data in theirs.items():
            if job_id not in lane.held:
                self._admit(lane, job_id if isinstance(job_id, bytes) else job_id.encode(), data, 0)
        self._fill()

    def _lose(self, job: JobContext) -> None:
        self._metrics.count("leases_lost")
        log.error("lease lost", extra={"fields": {"job": job.id, "task": job.task, "queue": job.queue}})
        self.executor.stops.stop(job, "lost")

    def _lost_lease(self) -> None:
        """This incarnation is over in Redis: others have its jobs. Stop them here, begin a new incarnation."""
        lost = 0
        for lane in self._lanes:
            for job in lane.held.values():
                if job is not None and job in self.executor.running:
                    self._lose(job)
            lost += len(lane.held)
            lane.held.clear()
            lane.batch = self._batches[lane.name] = Batch()
            lane.sent = None
        self._turnstile.drop()
        self._backlog.clear()
        self._aside = None
        self._registered = False
        self._incarnation += 1
        self._all_hungry()  # nobody else would wake the loop to register again: it has no jobs and no wake list
        log.error("worker lost its lease", extra={"fields": {"worker": self.worker_id, "jobs": lost}})

    # -- registration -------------------------------------------------------------------------------

    async def _register(self) -> None:
        await self._registration.agree()
        if self._incarnation > 1:
            self.worker_id = f"{self.worker_id.partition('~')[0]}~{self._incarnation}"
        self._slot.worker_id = self.worker_id  # the monitor extends the lease of this name
        await self._registration.begin(self.worker_id)
        await self._pauses.look()  # before the first job
        self._registered = True
        self._all_hungry()
        if not self._stopping:
            self._slot.state = SlotState.QUIET if self.quiet else SlotState.RUNNING
        log.info("worker ready", extra={"fields": {"worker": self.worker_id, "queues": ",".join(self._by_name)}})

    def _what_it_is(self) -> tuple[str, str]:
        state = "draining" if self._stopping else "quiet" if self.quiet else "running"
        return self.worker_id if self._registered else "", state

    async def _pass_the_token_on(self, lane: Lane) -> None:
        """A wake token may be on its way to this worker, which will not use it: leave one if there is work."""
        if await self._connection.call(raw("EXISTS", *lane.keys.ready, decode=int)):
            await self._connection.call(raw("RPUSH", lane.keys.wake, "1"))

    async def _goodbye(self) -> None:
        """Leave Redis as if this worker had never been there; what it still holds goes back uncharged."""
        self._waker.drop("leaving")
        try:
            async with asyncio.timeout(2.0):
                for lane in self._lanes:
                    remaining = 1 if self._registered else 0
                    while remaining > 0:
                        recovered: Recovered = await self._connection.call(
                            recover(
                                lane.keys, self.worker_id, expired=False, charge="none",
                                max_deliveries=self._settings.max_deliveries, dead_max=self._settings.dead_max,
                            )
                        )  # fmt: skip
                        remaining = recovered.remaining
                    await self._pass_the_token_on(lane)
        except (TimeoutError, BrokerError) as error:
            log.warning("redis unavailable at exit, the lease will run out", extra={"fields": {"error": str(error)}})

    # -- background -----------------------------------------------------------------------------------

    def _all_hungry(self) -> None:
        for lane in self._lanes:
            lane.hungry = True
        self._event.set()

    async def _tick(self) -> None:
        slot, executor = self._slot, self.executor
        while True:
            slot.ticked_at = now = time.monotonic()
            slot.busy = len(executor.running)
            executor.tick(now)
            if self._rate.measure(now, executor.finished):
                self._backlog_since = now
            if self._backlog and self._runs.free == 0 and now - self._backlog_since > BACKLOG_PATIENCE:
                self._release_backlog()
                self._rate.forget()
            if self._stop_at is not None and now > self._stop_at:
                for job in list(executor.running):
                    executor.stops.stop(job, "drain")
            await self._ticker.rest(idle=not (slot.busy or self._backlog or self._stopping or self._rate.value > 0.1))
