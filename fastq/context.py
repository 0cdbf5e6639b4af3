"""The running job as its handler sees it, and what fastq puts into a handler's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from typing import Any, NoReturn, Protocol

import msgspec

from fastq.broker.command import Command, Operation
from fastq.broker.commands import recall, remember
from fastq.broker.keys import QueueKeys
from fastq.errors import Fail, FastQError, InvalidOption, Retry, Snooze
from fastq.job import Envelope, Extra, Progress, decode_progress, encode, seconds
from fastq.logs import FieldLogger, log_context

__all__ = ["Depends", "JobContext", "State", "current"]


STEP_TTL = 7 * 86_400.0
"""Seconds for which the steps of a job are remembered: longer than anyone waits with a replay. They are not deleted when the
job succeeds: should its lease have been lost, another worker runs it again."""
PROGRESS_LIMIT = 16_384
"""Most bytes of one progress report."""


_log = FieldLogger("fastq.job")


class _Breath:
    """An awaitable that lets others run once; nothing is lost when nobody awaits it."""

    def __await__(self) -> Generator[None, None, None]:
        yield


_BREATH = _Breath()


class Part(Protocol):
    """What a workflow is made of: ``task.s(…)``, a chain, a group, a chord (:class:`fastq.workflow.Work`)."""

    def graph(self) -> Any:
        """The graph that it becomes."""
        ...


class JobContext(msgspec.Struct, eq=False):
    """One run of a job. Get it with ``app.job()`` or as a parameter annotated ``fastq.JobContext``.

    Attributes:
        id, queue: which job this is.
        max_attempts: runs in all before the job goes to the dead-letter queue.
        timeout: seconds this run may take.
        enqueued_at: when the job was accepted, seconds since the epoch on Redis's clock.
        deliveries: workers that died with this job.
        state: what the application's lifespan yielded in this worker process.

    Example::

        @app.task
        async def send(to: str, job: fastq.JobContext) -> None:
            if job.attempt > 3:
                job.snooze(3600)
    """

    id: str
    queue: str
    envelope: Envelope
    deliveries: int = 0
    max_attempts: int = 1
    timeout: float = 0.0
    state: Any = None
    # What follows belongs to the executor.
    deadline: float = 0.0  # monotonic; 0 until started
    started: float = 0.0  # monotonic
    stopping: str = ""  # why the handler is being stopped: "timeout", "drain", "lost", "cancel"
    abandoned: bool = False
    soft: float = 0.0  # seconds of its soft limit, 0: none, or it was exceeded
    exceeded: bool = False  # SoftTimeLimitExceeded is on its way into the handler
    thread: int = 0  # the one its handler runs in, while it may be raised there
    desk: Any = None  # where reports go
    report: Any = None  # what was told and is not written yet
    row: int = -1
    home: Any = None  # the application
    runner: Any = None  # the asyncio task
    permits: Any = None  # what its limits granted: (gate, holder) of each slot; None: it was not asked for
    arguments: Any = None  # decoded already, or the exception that the run raises instead
    bound: bytes = b""  # its body with the argument that came from another job of its workflow
    unparked: bool = False  # fetched from behind a limit
    spawned: int = 0  # what it has added to its workflow without a key

    @property
    def task(self) -> str:
        """The task's name."""
        return self.envelope.task

    @property
    def attempt(self) -> int:
        """1 for the first run, one more after each failed one."""
        return self.envelope.attempt + 1

    @property
    def enqueued_at(self) -> float:
        """When the job was accepted, seconds since the epoch."""
        return self.envelope.enqueued_at / 1_000

    @property
    def extra(self) -> Extra:
        """The envelope's rare fields."""
        return self.envelope.extra or Extra()

    @property
    def cancelled(self) -> bool:
        """Whether the run is to stop. A handler that runs in a thread cannot be interrupted: it should look here
        now and then and return or raise.
        """
        return bool(self.stopping)

    @property
    def retries(self) -> int:
        """Failed runs before this one: 0 for the first."""
        return self.envelope.attempt

    @property
    def max_retries(self) -> int:
        """Runs after the first that the job may have."""
        return self.max_attempts - 1

    def progress(
        self, current: float | None = None, total: float | None = None, *, message: str = "", **meta: Any
    ) -> Awaitable[None]:
        """Say how far this job is: ``status.progress``, and an event for those who watch.

        Call it as often as you like, it is written twice a second at most, the latest always. It never waits for Redis. In a plain
        function, call it without ``await``; in a coroutine the ``await`` lets others run.

        Raises:
            InvalidOption: ``meta`` cannot be encoded, or it all takes more than 16 KiB.

        Example::

            for n, page in enumerate(pages):
                await job.progress(n, len(pages), message=page.title, size=page.size)
        """
        return self._tell(Progress("PROGRESS", current, total, message, meta))

    def update_state(self, state: str = "PROGRESS", meta: Mapping[str, Any] | None = None) -> Awaitable[None]:
        """:meth:`progress` with a word of your own; ``current``, ``total`` and ``message`` in ``meta`` are taken for those.

        Example::

            job.update_state("UPLOADING", {"current": 3, "total": 10, "file": "a.png"})
        """
        rest = dict(meta or {})
        known = {name: rest.pop(name) for name in ("current", "total", "message") if name in rest}
        return self._tell(Progress(str(state), meta=rest, **known))

    def _tell(self, progress: Progress) -> Awaitable[None]:
        progress.attempt = self.attempt
        if self.desk is not None:
            progress.at = self.desk.now()
        try:
            data = encode(progress)
            decode_progress(data)  # what is no number, or no text, is told here
        except Exception as error:  # noqa: BLE001 - see arguments.encode_untyped
            raise InvalidOption(f"the progress of task {self.task!r} cannot be told: {error}") from None
        if len(data) > PROGRESS_LIMIT:
            raise InvalidOption(
                f"the progress of task {self.task!r} takes {len(data):,} bytes, more than {PROGRESS_LIMIT:,}"
            )
        if self.desk is not None:
            self.desk.progress(self, data)
        return _BREATH

    @property
    def log(self) -> FieldLogger:
        """The logger for handlers; its lines carry this job's id, task, queue and attempt, and what is given as keywords:
        ``job.log.info("issue synced", issue_id=7)``.
        """
        return _log

    def snooze(self, delay: float) -> NoReturn:
        """End this run and run again in ``delay`` seconds; no attempt is charged."""
        raise Snooze(delay)

    def retry(self, delay: float | None = None, message: str = "") -> NoReturn:
        """End this run as failed and run again in ``delay`` seconds (None: the task's retry policy)."""
        raise Retry(message, delay=delay)

    async def once(self, step: str, fn: Callable[..., Any], *args: Any, ttl: float = STEP_TTL, **kwargs: Any) -> Any:
        """Call ``fn`` unless an earlier run of this job has: its result is remembered for the runs that follow.

        Everything the runs of a job share goes by: retries, snoozes, recoveries after a worker's death, replays. A worker that
        dies between the end of ``fn`` and the remembering has called it in vain: give a key such as ``f"{job.id}:charge"`` to
        whom you call.

        Args:
            step: its name within this job, 1 to 200 characters.
            fn: a coroutine function or a plain one; an exception of it is not remembered.
            ttl: seconds after the last step for which the steps of this job are remembered.

        Returns the result as msgpack brings it back, the first time, too.

        Raises:
            Fail: the result cannot be remembered; the job is not run again, because ``fn`` has been called.
            BrokerError: Redis did not answer.

        Example::

            receipt = await job.once("charge", gateway.charge, order_id, amount)
            await job.once("mail", send_mail, receipt["email"])
        """
        _check_step(step, ttl)
        keys = self.home.keys(self.queue)
        known = await self.home.run(_ask(recall(keys, self.id, step)))
        if known is None:
            result = fn(*args, **kwargs)
            if inspect.isawaitable(result):
                result = await result
            known = await self.home.run(_ask(self._remembering(keys, step, result, ttl)))
        return msgspec.msgpack.decode(known)

    def once_sync(self, step: str, fn: Callable[..., Any], *args: Any, ttl: float = STEP_TTL, **kwargs: Any) -> Any:
        """:meth:`once` for a handler that is a plain function."""
        _check_step(step, ttl)
        keys = self.home.keys(self.queue)
        known = self.home.run_sync(_ask(recall(keys, self.id, step)))
        if known is None:
            known = self.home.run_sync(_ask(self._remembering(keys, step, fn(*args, **kwargs), ttl)))
        return msgspec.msgpack.decode(known)

    async def spawn(self, work: Part, *, key: str | None = None, join: bool = False) -> list[str]:
        """Add work to the workflow that this job is a part of, while it runs. It begins at once, beside this job, and the
        workflow does not end before it has; one that fails counts as any other job of it.

        A repeated run of this job (a retry, the death of its worker) does not add it again: what is added is known by the
        job and by ``key``.

        Args:
            work: ``task.s(…)``, a chain, a group or a chord; its jobs run in the workflow's queue.
            key: what this addition is called within the job, 1 to 200 characters; None: it is the first, second … without one.
            join: whoever waits for this job as a part of a group waits for the result of ``work``, too: it joins the
                end of the list. A chord's header can grow that way.

        Returns the ids of the jobs added.

        Raises:
            InvalidArguments, BodyTooLarge, InvalidOption: nothing was added; also where this job is no part of a workflow.
            FastQError: the workflow was cancelled, or does not wait for this job any more. BrokerUnavailable: not confirmed.

        Example::

            @app.task
            async def crawl(url: str, job: fastq.JobContext) -> int:
                page = await fetch(url)
                for link in page.new_links:
                    await job.spawn(crawl.s(link), key=link, join=True)
                return page.words

            await fastq.chord([crawl.s("https://example.org")], total.s()).enqueue()
        """
        return await self.home.run(self._spawning(work, key, join))  # type: ignore[no-any-return]  # home is typed above this floor

    def spawn_sync(self, work: Part, *, key: str | None = None, join: bool = False) -> list[str]:
        """:meth:`spawn` for a handler that is a plain function."""
        return self.home.run_sync(self._spawning(work, key, join))  # type: ignore[no-any-return]  # home is typed above this floor

    def _spawning(self, work: Part, key: str | None, join: bool) -> Any:
        if self.extra.takes is None or not self.id.rpartition(".")[2].isdigit():
            raise InvalidOption(f"job {self.id} is no part of a workflow: enqueue() what it is to start")
        if key is not None:
            _check_step(key, STEP_TTL)
            return self.home.spawning(self.id, self.queue, f"~{key}", work, join=join)
        self.spawned += 1
        return self.home.spawning(self.id, self.queue, str(self.spawned), work, join=join)

    def _remembering(self, keys: QueueKeys, step: str, result: Any, ttl: float) -> Command[bytes]:
        try:
            data = encode(result)
        except Exception as error:
            raise Fail(
                f"the result of step {step!r} cannot be encoded, and it may not be called again: {error}"
            ) from error
        most = self.home.max_body()
        if len(data) > most:
            raise Fail(f"the result of step {step!r} takes {len(data):,} bytes, more than max_body={most:,}")
        return remember(keys, self.id, step, data, round(ttl * 1_000))

    def __repr__(self) -> str:
        return f"<JobContext {self.task} id={self.id} queue={self.queue} attempt={self.attempt}/{self.max_attempts}>"


def _ask(command: Command[Any]) -> Operation[Any]:
    return (yield command)


def _check_step(step: str, ttl: float) -> None:
    if not isinstance(step, str) or not 1 <= len(step) <= 200:
        raise InvalidOption(f"step={step!r:.100} is not a text of 1 to 200 characters")
    seconds("ttl", ttl, least=1.0)


current = log_context
"""The running job of this context; log lines take its id, task, queue and attempt from here."""


def running_job() -> JobContext:
    """The job whose handler is running in this context.

    Raises:
        FastQError: no handler is running here.
    """
    job = current.get()
    if not isinstance(job, JobContext):
        raise FastQError("no job is running here: app.job() works inside a handler only")
    return job


def requeue(delay: float = 0.0) -> NoReturn:
    """Inside a handler: end this run and run again in ``delay`` seconds; no attempt is charged. It does not return.

    Raises:
        FastQError: called outside a handler.

    Example::

        try:
            await limiter.acquire(timeout=30)
        except TimeoutError:
            fastq.requeue(delay=60)
    """
    running_job().snooze(delay)


class _State:
    """Marks a parameter that receives what the lifespan yielded; see :func:`State`."""

    __slots__ = ("key",)

    def __init__(self, key: str | None) -> None:
        self.key = key

    def pick(self, state: Any) -> Any:
        if self.key is None:
            return state
        try:
            return state[self.key] if isinstance(state, dict) else getattr(state, self.key)
        except (KeyError, AttributeError):
            raise FastQError(f"State({self.key!r}): the lifespan yielded {type(state).__name__} without it") from None


def State(key: str | None = None) -> Any:  # noqa: N802 - reads as a type at the place of use, like FastAPI's Depends
    """As a parameter's default: the value that ``@app.lifespan`` yielded in this worker, or one item of it.

    Example::

        @app.task
        async def save(row: dict[str, str], pool: Pool = fastq.State("pool")) -> None: ...
    """
    return _State(key)


class _Depends:
    """Marks a parameter that is made for each run; see :func:`Depends`."""

    __slots__ = ("dependency",)

    def __init__(self, dependency: Any) -> None:
        self.dependency = dependency


def Depends(dependency: Callable[..., Any]) -> Any:  # noqa: N802 - FastAPI's
    """As a parameter's default, or in its ``Annotated``: what ``dependency()`` returns, or yields, made for each run of the job.

    It may be a plain or an async function or a generator, which tidies up after the handler, however that ends; its own parameters may be
    ``Depends``, ``State`` and ``JobContext``. One that several depend on is made once per run. A handler that is a plain
    function can depend on plain ones only. Called as a function, a handler takes the value as an argument. Handlers without
    any cost nothing.

    Example::

        async def session(pool: Pool = fastq.State("pool")):
            async with pool.acquire() as connection:
                yield connection

        @app.task
        async def save(row: dict[str, str], db: Connection = fastq.Depends(session)) -> None: ...
    """
    return _Depends(dependency)


def depends_of(parameter: Any, annotation: Any) -> Any:
    """The parameter's ``Depends``, or None."""
    if isinstance(parameter.default, _Depends):
        return parameter.default
    return next((each for each in getattr(annotation, "__metadata__", ()) if isinstance(each, _Depends)), None)


def is_injected(parameter: Any, annotation: Any) -> bool:
    """Whether fastq fills this parameter in."""
    return (
        annotation is JobContext
        or isinstance(parameter.default, _State)
        or depends_of(parameter, annotation) is not None
    )


def takes_state(parameters: Iterable[Any]) -> str | None:
    """The first of these parameters that the lifespan's value goes to; None without one."""
    return next((p.name for p in parameters if isinstance(p.default, _State)), None)


def injection(parameter: Any, job: JobContext) -> Any:
    """The value for a parameter that fastq fills in; for a ``Depends`` the job, of which fastq.depends makes it."""
    return parameter.default.pick(job.state) if isinstance(parameter.default, _State) else job
