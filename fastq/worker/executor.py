"""One job -> one outcome: decode, run, classify.

An outcome is a row in the :class:`fastq.broker.commands.Batch` of the job's queue; the loop settles the batches.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from fastq._core import Runner
from fastq.app import FastQ
from fastq.arguments import with_first
from fastq.broker.commands import Batch
from fastq.broker.flows import inputs
from fastq.broker.keys import bucket_of
from fastq.context import JobContext, current, injection
from fastq.errors import (
    BadSignature,
    BrokerUnavailable,
    Fail,
    FastQError,
    InvalidArguments,
    JobCrashed,
    JobTimeout,
    LimitTimeout,
    Retry,
    Snooze,
    SoftTimeLimitExceeded,
    UndecodableJob,
    safe_text,
)
from fastq.job import ErrorInfo, Extra, JobRecord, JobState, delay_of, encode
from fastq.metrics import NOT_RUN, STATUSES, WorkerMetrics
from fastq.partitions import queue_of
from fastq.worker import soft, threads
from fastq.worker.ending import (
    MESSAGE_LIMIT,
    NOT_THE_HANDLERS,
    Ending,
    ending_of,
    fields_of,
    is_retryable,
    misfit,
    reason_of,
)
from fastq.worker.gathering import Gathering
from fastq.worker.isolated import Reply, Reported, Unkept
from fastq.worker.isolation import Pool
from fastq.worker.plan import Plan
from fastq.worker.soft import softly
from fastq.worker.stopping import Stops
from fastq.worker.strays import given_back, hint
from fastq.worker.threads import Threads

__all__ = ["Executor"]

log = logging.getLogger("fastq.worker")

_SUCCESS, _RETRY, _FAILED, _CANCELLED, _SNOOZED, _RELEASED, _LOST = range(7)
assert STATUSES == ("success", "retry", "failed", "cancelled", "snoozed", "released", "lost")
_EAGER = sys.version_info >= (3, 12)
_NOTHING = msgspec.Raw(b"\xc0")
NOT_THE_HANDLERS.update({__file__, soft.__file__, threads.__file__, "fastq/_core.pyx"})


class Executor:
    """Runs jobs on the current event loop.

    Args:
        app: tasks, settings, middleware.
        metrics: where runs are counted.
        batches: per queue, where outcomes are put.
        now_ms: Redis's time.
        ended: called once in the turn of the event loop after jobs have ended, for all of them.
        slots: how many jobs may run at once.
    """

    def __init__(
        self,
        app: FastQ,
        metrics: WorkerMetrics,
        batches: dict[str, Batch],
        now_ms: Callable[[], int],
        ended: Callable[[], None],
        slots: int,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._batches = batches
        self._now_ms = now_ms
        self._loop = asyncio.get_running_loop()
        self._host = socket.gethostname()
        self._rng = random.Random()
        self._tell = log.isEnabledFor(logging.DEBUG)  # asked once: a line per job is for development
        self.threads = Threads(min(app.settings.threads, app.settings.concurrency))
        self.isolation: Pool | None = None  # a worker process sets it, if any task needs it
        self._rows = list(range(app.settings.concurrency))
        self.runner = Runner(
            self, self.threads.put, metrics, batches, self._loop, current, time.monotonic, asyncio.Task, ended, slots,
            self._rows, _EAGER,
        )  # fmt: skip
        self.runner.home = app
        self.runner.offset = now_ms() / 1_000 - time.monotonic()
        self.running = self.runner.running
        """Job -> monotonic time at which a stop was asked for, 0: none."""
        self.give_back: Callable[[JobContext], None] = _nothing_to_give_back
        queues = tuple(batches)
        self.plans = {
            name: Plan(task, app, {queue: metrics.series(queue_of(queue), name) for queue in queues})
            for name, task in app.tasks.items()
        }
        self._other = {queue: metrics.series(queue_of(queue), "other") for queue in queues}
        self.gathering = Gathering(self, metrics, slots)
        self.stops = Stops(self)

    def hold(self) -> None:
        """This worker stops: what waits here for others, or for a thread, goes back."""
        self.gathering.hold(True)
        self.threads.hold()

    @property
    def finished(self) -> int:
        """Jobs that have ended here."""
        return self.runner.finished

    @property
    def state(self) -> Any:
        """What the application's lifespan yielded."""
        return self.runner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.runner.state = state

    # -- start ------------------------------------------------------------------------------

    def start(self, job: JobContext) -> None:
        """Run a job. Its outcome may be there when this returns (expired, unknown, finished eagerly)."""
        plan = self.plans.get(job.task)
        if plan is None:
            self._stray(job)
            return
        extra = job.envelope.extra
        if plan.plain and extra is None:
            self.runner.start(job, plan)
            return
        job.started = time.monotonic()
        job.timeout, job.max_attempts, soft = plan.timeout, plan.max_attempts, plan.soft_timeout
        if extra is not None:
            if extra.expires_at is not None and self._now_ms() > extra.expires_at:
                self._expire(job, plan)
                return
            job.timeout = extra.timeout or job.timeout
            job.max_attempts = extra.max_attempts or job.max_attempts
            soft = soft if extra.soft_timeout is None else extra.soft_timeout
        job.state, job.home, job.desk = self.state, self._app, self.runner.desk
        job.row = self._rows.pop()
        self._metrics.start(job.row, job.id)
        self.running[job] = 0.0
        if plan.is_async:
            job.deadline = job.started + job.timeout
        if soft and soft < job.timeout:
            job.soft = soft
            job.deadline = job.deadline and job.started + job.soft
        if extra is not None and extra.takes is not None and extra.takes >= 0:
            self._spawn(job, self._run_behind(job, plan, extra.takes))
        elif plan.threaded:
            self._hand_over(job, plan)
        else:
            self._spawn(job, self._run(job, plan))

    def _spawn(self, job: JobContext, run: Coroutine[Any, Any, None]) -> None:
        context = self.runner.context.copy()
        if _EAGER:
            task = asyncio.Task(run, loop=self._loop, context=context, eager_start=True)  # type: ignore[call-arg,unused-ignore]  # pyright: ignore[reportCallIssue]  # 3.12+
            if task.done():
                return
            job.runner = task
        else:
            job.runner = self._loop.create_task(run, context=context)

    async def _run(self, job: JobContext, plan: Plan) -> None:
        current.set(job)
        decoded = self._decoded(job, plan)
        if decoded is None:
            return
        try:
            if self._app.middlewares:
                result = await self._through_middleware(job, plan, *decoded)
            elif plan.direct and not job.soft:
                result = await plan.fn(*decoded[0], **decoded[1])
            else:
                result = await self._call(job, plan, *decoded)
        except BaseException as error:  # noqa: BLE001 - also SystemExit and KeyboardInterrupt: a handler does not stop the worker
            self.raised(job, plan, error)
        else:
            self._succeeded(job, plan, result)

    def _hand_over(self, job: JobContext, plan: Plan) -> None:
        """Have a thread run it: no Task, and nothing awaited."""
        decoded = self._decoded(job, plan)
        if decoded is None:
            return
        try:
            placed = self._placed(job, plan, *decoded)
        except BaseException as error:  # noqa: BLE001 - what it depends on is the user's
            self.raised(job, plan, error)
            return
        context = self.runner.context.copy()
        context.run(current.set, job)
        self.threads.put(job, plan, context, plan.fn, *placed, self._landed)

    def _landed(self, job: JobContext, plan: Plan, result: Any, error: BaseException | None) -> None:
        if error is None:
            self._succeeded(job, plan, result)
        else:
            self.raised(job, plan, error)

    def _placed(self, job: JobContext, plan: Plan, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if plan.injected:
            return plan.task.arguments.place(args, kwargs, lambda p: injection(p, job))
        return args, kwargs

    def _decoded(self, job: JobContext, plan: Plan) -> tuple[Any, Any] | None:
        """Its arguments; None: they cannot be had, and the job has ended."""
        try:
            if job.arguments is None:
                return plan.task.arguments.decode(job.envelope.body)
            if isinstance(job.arguments, BaseException):
                raise job.arguments
        except Exception as error:  # noqa: BLE001 - also the user's own limit_key or cost
            self._reject(job, plan, error)
            return None
        args, kwargs = job.arguments  # decoded for its limits
        return args, kwargs

    def _reject(self, job: JobContext, plan: Plan, error: BaseException) -> None:
        """The arguments cannot be had."""
        if isinstance(error, InvalidArguments | UndecodableJob):
            reason = "arguments" if isinstance(error, InvalidArguments) else "undecodable"
            self._fail(job, Ending(reason, type(error).__name__, safe_text(str(error), MESSAGE_LIMIT), ""))
        else:
            self.raised(job, plan, error)

    async def _run_behind(self, job: JobContext, plan: Plan, node: int) -> None:
        """A job of a workflow whose first argument is what another one has returned."""
        try:
            first = await self._app.run(inputs(self._app.keys(job.queue), job.id, node))
            job.bound = with_first(job.task, job.envelope.body, first)
            job.arguments = plan.task.arguments.decode(job.bound)
        except BrokerUnavailable:
            self.put_off(job, self._rng.uniform(0.5, 1.5))
            self._done(job, plan, _RELEASED)
            return
        except Exception as error:  # noqa: BLE001 - classified like any other error of the job
            job.arguments = error
        except BaseException as error:  # noqa: BLE001 - it is being stopped
            self.raised(job, plan, error)
            return
        await self._run(job, plan)

    async def _call(self, job: JobContext, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if plan.gatherer is not None:
            return await plan.gatherer.join(job, args[0])
        if plan.isolated:
            return await self._in_process(job, plan)
        positional, kwargs = self._placed(job, plan, args, kwargs)
        if plan.is_async:
            run = plan.fn(*positional, **kwargs)
            return await (softly(job, run) if job.soft else run)
        return await self.threads.call(job, plan.fn, positional, kwargs)

    async def _in_process(self, job: JobContext, plan: Plan) -> Any:
        if self.isolation is None:
            raise FastQError(f"task {job.task!r} has isolation='process', which works in a worker process only")
        reply = await self.isolation.run(job, plan.max_memory)
        if reply.how == "result":
            return msgspec.msgpack.decode(reply.result) if self._app.middlewares else reply.result
        if reply.how == "unkept":
            return Unkept(reply.ending.message)
        raise Reported(reply)

    async def _through_middleware(
        self, job: JobContext, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        stack = self._app.middlewares
        try:
            for middleware in stack:
                await middleware.before(job)
            result = await self._call(job, plan, args, kwargs)
        except BaseException as error:
            for middleware in reversed(stack):
                await _guarded(middleware.on_error(job, error), job)
            raise
        for middleware in reversed(stack):
            await _guarded(middleware.after(job, result), job)
        return result

    # -- outcomes -----------------------------------------------------------------------------

    def _succeeded(self, job: JobContext, plan: Plan, result: Any) -> None:
        if job.abandoned:
            self.stops.over(job)
            return
        if (wrong := misfit(result)) is not None:
            self._failure(job, plan, wrong, "exception")
            return
        extra = job.envelope.extra
        ttl = plan.result_ttl if extra is None or extra.result_ttl is None else extra.result_ttl
        if extra is not None and extra.takes is not None:
            self._passed_on(job, plan, result, ttl)
            return
        if ttl > 0:
            self._record(job, JobState.SUCCESS, ttl, *self._encoded(job, result))
        else:
            self._batches[job.queue].succeeded.append(job.id)
        self._done(job, plan, _SUCCESS)

    def _passed_on(self, job: JobContext, plan: Plan, result: Any, ttl: float) -> None:
        """A job of a workflow: others wait for its result, so one that cannot be kept is a failure."""
        data, failure = self._encoded(job, result)
        if failure is not None:
            self._fail(job, Ending("exception", "ResultNotKept", failure, ""), attempts=job.attempt, plan=plan)
            return
        self._batches[job.queue].outputs.append((job.id, bytes(data)))
        if ttl > 0:
            self._record(job, JobState.SUCCESS, ttl, data, None)
        else:
            self._batches[job.queue].succeeded.append(job.id)
        self._done(job, plan, _SUCCESS)

    def _encoded(self, job: JobContext, result: Any) -> tuple[msgspec.Raw, str | None]:
        if result is None:
            return _NOTHING, None
        try:
            data = encode(result)
        except Exception as error:  # noqa: BLE001 - see arguments.encode_untyped
            why = result.why if isinstance(result, Unkept) else error
            failure = f"the result of task {job.task!r} cannot be encoded and was not kept: {why}"
        else:
            if len(data) <= self._app.settings.max_body:
                return msgspec.Raw(data), None
            failure = (
                f"the result of task {job.task!r} takes {len(data):,} bytes, more than "
                f"max_body={self._app.settings.max_body:,}, and was not kept"
            )
        log.warning("result not kept", extra={"fields": {"error": failure}})
        return _NOTHING, failure

    def _record(
        self, job: JobContext, state: JobState, ttl: float, result: msgspec.Raw, error: str | None, *, ran: bool = True
    ) -> None:
        now, envelope = self._now_ms(), job.envelope
        started, attempts = self._started(job, now) if ran else 0, envelope.attempt + ran
        record = JobRecord(state.value, job.task, envelope.enqueued_at, started, now, attempts, result, error)
        name, expires = bucket_of(ttl, now)
        self._batches[job.queue].recorded.append((name, expires, job.id, encode(record)))

    def _started(self, job: JobContext, now: int) -> int:
        """When its run began, on Redis's clock; 0: it has not run."""
        return now - round((time.monotonic() - job.started) * 1_000) if job.started else 0

    def raised(self, job: JobContext, plan: Plan, error: BaseException) -> None:
        """A run has ended by an exception, or is taken to have."""
        if job.abandoned:
            self.stops.over(job)
            return
        if job.exceeded and isinstance(
            error, asyncio.CancelledError
        ):  # it came where the handler was not: in a middleware
            error = SoftTimeLimitExceeded()
        try:
            self._judge(job, plan, error)
        except Exception as wrong:  # the user's own class, or policy, of which nothing can be made
            log.exception("error cannot be judged", extra={"fields": fields_of(job)})
            ending, why = ending_of(error, "exception"), ending_of(wrong, "exception")
            told = f"{ending.message} (what follows could not be found out: {why.type}: {why.message})"
            ending = ending._replace(message=safe_text(told, MESSAGE_LIMIT))
            self._fail(job, ending, attempts=job.envelope.attempt + 1, plan=plan)

    def _judge(self, job: JobContext, plan: Plan, error: BaseException) -> None:
        why = job.stopping
        if why == "lost":
            self._done(job, plan, _LOST)
        elif why in ("cancel", "terminate"):
            self._cancelled(job, plan)
        elif why in ("drain", "stop") and _is_of_the_stop(error):
            self._batches[job.queue].released.append(job.id)
            self._done(job, plan, _RELEASED)
        elif isinstance(error, Snooze):
            self._later(job, error.delay, job.envelope.attempt, snoozed=True)
            self._done(job, plan, _SNOOZED)
        elif isinstance(error, LimitTimeout) and plan.hands_back:
            self._later(job, self._room_after(job, error.retry_after or 0.0), job.envelope.attempt, snoozed=True)
            self._done(job, plan, _SNOOZED)
        elif isinstance(error, Reported):
            self._reported(job, plan, error.reply)
        elif why == "timeout" and isinstance(error, asyncio.CancelledError | JobTimeout | JobCrashed):
            self._failure(job, plan, JobTimeout(f"ran longer than its timeout of {job.timeout:g} s"), "timeout")
        else:
            self._failure(job, plan, error, reason_of(error))

    def _cancelled(self, job: JobContext, plan: Plan) -> None:
        log.info("job cancelled", extra={"fields": fields_of(job)})
        began = bool(job.deadline)  # it had its thread, or process
        why = "cancelled while it ran" if began else "cancelled before it started"
        self._record_cancelled(job, plan, why, ran=began)
        self._done(job, plan, _CANCELLED)

    def _record_cancelled(self, job: JobContext, plan: Plan, why: str, *, ran: bool = False) -> None:
        extra = job.envelope.extra
        ttl = plan.result_ttl if extra is None or extra.result_ttl is None else extra.result_ttl
        if ttl > 0:
            self._record(job, JobState.CANCELLED, ttl, _NOTHING, why, ran=ran)
        else:
            self._batches[job.queue].end_unrecorded(job.id)

    def never_start(self, job: JobContext) -> None:
        """A job that was reserved and has not started was cancelled."""
        plan = self.plans.get(job.task)
        if plan is None:
            self.put_off(job, 0.0)  # an unknown task's job ends in settle.lua, as everything that was cancelled does
            return
        self._record_cancelled(job, plan, "cancelled before it started")
        self._metrics.observe(plan.series[job.queue], _CANCELLED, NOT_RUN, NOT_RUN)

    def _reported(self, job: JobContext, plan: Plan, reply: Reply) -> None:
        """What an isolated handler has raised; its process has judged it."""
        if reply.how == "snooze":
            self._later(job, reply.delay or 0.0, job.envelope.attempt, snoozed=True)
            self._done(job, plan, _SNOOZED)
        elif reply.how == "limit" and plan.hands_back:
            self._later(job, self._room_after(job, reply.delay or 0.0), job.envelope.attempt, snoozed=True)
            self._done(job, plan, _SNOOZED)
        else:
            self._judged(job, plan, reply.ending, reply.how != "fail", reply.delay if reply.how == "retry" else None)

    def _failure(self, job: JobContext, plan: Plan, error: BaseException, reason: str) -> None:
        delay = getattr(error, "delay", None) if isinstance(error, Retry) else None  # a subclass may have set none
        self._judged(job, plan, ending_of(error, reason), is_retryable(error, plan.rule), delay)

    def _judged(self, job: JobContext, plan: Plan, ending: Ending, retryable: bool, delay: float | None) -> None:
        attempts = job.envelope.attempt + 1
        if attempts >= job.max_attempts or not retryable:
            self._fail(job, ending, attempts=attempts, plan=plan)
            return
        if delay is None:
            try:
                delay = plan.rule.policy.delay(attempts, self._rng)
                round(delay)  # raises ValueError: no number of seconds
            except Exception as policy_error:  # the user's own function
                log.exception("retry policy failed", extra={"fields": {"task": job.task}})
                self._fail(job, ending_of(policy_error, "exception"), attempts=attempts, plan=plan)
                return
        self._later(job, delay, attempts, error=f"{ending.type}: {ending.message}"[:300])
        log.warning(
            "job retries",
            extra={
                "fields": fields_of(job) | {"error": ending.type, "message": ending.message, "delay": round(delay, 3)}
            },
        )
        self._done(job, plan, _RETRY)

    def _room_after(self, job: JobContext, room_in: float) -> float:
        """Seconds until a job that gave up on a limiter runs again: when it may have room, longer each time."""
        least = min(2.0 ** min(job.extra.snoozes, 6), 60.0)
        return max(room_in, least) * self._rng.uniform(1.0, 1.25)

    def _later(
        self, job: JobContext, delay: float, attempts: int, *, error: str | None = None, snoozed: bool = False
    ) -> None:
        old = job.envelope.extra or Extra()
        delay_ms = round(delay * 1_000)
        extra = msgspec.structs.replace(
            old,
            error=error or old.error,
            due_at=self._now_ms() + delay_ms,
            snoozes=old.snoozes + snoozed,
            strays=0,
        )
        envelope = msgspec.structs.replace(job.envelope, attempt=attempts, extra=extra)
        self._batches[job.queue].later.append((job.id, delay_ms, encode(envelope)))

    def put_off(self, job: JobContext, delay: float) -> None:
        """Give a job that has not started back for ``delay`` seconds; no attempt is charged."""
        self._later(job, delay, job.envelope.attempt)

    def _fail(self, job: JobContext, ending: Ending, *, attempts: int | None = None, plan: Plan | None = None) -> None:
        """Into the dead-letter queue."""
        attempts = job.envelope.attempt if attempts is None else attempts
        self._bury(job, attempts, ending)
        fields = fields_of(job) | {"reason": ending.reason, "error": ending.type, "message": ending.message}
        log.error("job failed", extra={"fields": fields | {"traceback": ending.traceback}})
        self._done(job, plan or self.plans.get(job.task), _FAILED)

    def _bury(self, job: JobContext, attempts: int, ending: Ending) -> None:
        now, envelope = self._now_ms(), msgspec.structs.replace(job.envelope, attempt=attempts)
        info = ErrorInfo(*ending, attempts, now, self._host, self._started(job, now))
        self._batches[job.queue].failed.append((job.id, encode(envelope), encode(info)))

    def undecodable(self, job_id: str, queue: str, raw: bytes, error: UndecodableJob) -> None:
        """A stored envelope that cannot be read goes to the dead-letter queue as it is; one that is not for now waits."""
        fields: dict[str, Any] = {"job": job_id, "queue": queue, "message": str(error)}
        delay = delay_of(error, self._now_ms(), self._app.settings.unknown_task_ttl)
        if delay:
            self._batches[queue].later.append((job_id, delay, raw))
            self._metrics.observe(self._other[queue], _RELEASED, NOT_RUN, NOT_RUN)
            log.warning("job given back", extra={"fields": fields | {"delay": delay / 1_000}})
            return
        reason = "signature" if isinstance(error, BadSignature) else "undecodable"
        info = ErrorInfo(reason, type(error).__name__, str(error)[:MESSAGE_LIMIT], "", 0, self._now_ms(), self._host)
        self._batches[queue].failed.append((job_id, raw, encode(info)))
        self._metrics.observe(self._other[queue], _FAILED, NOT_RUN, NOT_RUN)
        log.error("job failed", extra={"fields": fields | {"reason": reason}})

    def _expire(self, job: JobContext, plan: Plan) -> None:
        self._record_cancelled(job, plan, "expired: it had not started in time")
        log.info("job expired", extra={"fields": fields_of(job)})
        self._metrics.observe(plan.series[job.queue], _CANCELLED, NOT_RUN, NOT_RUN)
        if job.permits:
            self.give_back(job)
        self.runner.outcome()

    def _stray(self, job: JobContext) -> None:
        """A task that this release does not know: give the job back for another worker, for a while."""
        later, asked = given_back(job.envelope, self._app.settings.unknown_task_ttl), hint(job.task, self.plans)
        if isinstance(later, str):
            later = f"{later}: {asked}"
            self._bury(job, job.envelope.attempt, Ending("unknown_task", "UnknownTask", later, ""))
            log.error("job failed", extra={"fields": fields_of(job) | {"reason": "unknown_task", "message": later}})
            status = _FAILED
        else:
            self._batches[job.queue].later.append((job.id, *later))
            log.warning(
                "unknown task given back", extra={"fields": fields_of(job) | {"delay": later[0] / 1_000, "hint": asked}}
            )
            status = _RELEASED
        self._metrics.observe(self._other[job.queue], status, NOT_RUN, NOT_RUN)
        self.runner.outcome()

    def _done(self, job: JobContext, plan: Plan | None, status: int) -> None:
        if job.permits:
            self.give_back(job)
        envelope = job.envelope
        ready_at = envelope.enqueued_at if envelope.extra is None else envelope.extra.due_at or envelope.enqueued_at
        if self._tell:
            told = {"outcome": STATUSES[status], "seconds": round(time.monotonic() - job.started, 4)}
            log.debug("job done", extra={"fields": fields_of(job) | told})
        self.runner.done(job, self._other[job.queue] if plan is None else plan.series[job.queue], status, ready_at)

    def tick(self, now: float) -> None:
        """Look after the clock and the deadlines. Call it every 100 ms or so."""
        self.runner.offset = self._now_ms() / 1_000 - now
        self.stops.sweep(now)

    def close(self) -> None:
        """Let the threads go; those that still run do not hold the process up."""
        self.threads.close()
        if self.isolation is not None:
            self.isolation.close()


def _is_of_the_stop(error: BaseException) -> bool:
    """Whether a handler that was told to stop has ended for that: it may fail while it tidies up. What it says on purpose counts."""
    if isinstance(error, Reported):
        return (
            error.reply.how in ("retry", "fail") and error.reply.delay is None and error.reply.ending.reason != "fail"
        )
    return not isinstance(error, Fail | Retry | Snooze | LimitTimeout)


def _nothing_to_give_back(job: JobContext) -> None:
    """Until the worker's turnstile says what to do with slots."""


async def _guarded(hook: Coroutine[Any, Any, None], job: JobContext) -> None:
    try:
        await hook
    except (Exception, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and (job.stopping or (task is not None and task.cancelling())):
            raise  # the job's own; what the hook awaited may have been cancelled by others
        log.exception("middleware failed", extra={"fields": fields_of(job)})
