"""A consumer for those who bring a loop of their own: messages one by one, acknowledged by hand, under the leases and the fence
of every worker.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Protocol, Self, cast

import msgspec

from fastq.broker.command import raw
from fastq.broker.commands import Batch, announce, extend, recover, register, reserve, resume, settle
from fastq.broker.fence import FencedConnection
from fastq.broker.keys import GlobalKeys, QueueKeys, bucket_of
from fastq.broker.schema import agree
from fastq.broker.url import Endpoint
from fastq.config import Settings
from fastq.errors import BadSignature, BrokerError, BrokerUnavailable, InvalidOption, LeaseLost, UndecodableJob
from fastq.job import (
    ID_MOST,
    Envelope,
    ErrorInfo,
    Extra,
    JobRecord,
    JobState,
    WorkerCard,
    decode_envelope,
    delay_of,
    encode,
    seconds,
)
from fastq.logs import fields
from fastq.retry import RetryRule
from fastq.task import Task

__all__ = ["Consumer", "Message"]

log = logging.getLogger("fastq.consumer")

IDLE_WAIT: Final = 2.0
"""Seconds of one blocking pop on the wake list."""

DEAD_LETTER: Final = "nack"
"""The reason of a dead letter that a consumer has refused."""


class Home(Protocol):
    """Whose jobs are consumed: the application."""

    tasks: dict[str, Task[..., Any]]

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

    def opener(self, now_ms: Callable[[], int]) -> Callable[[str, str, bytes], Envelope] | None:
        """What reads an envelope, given its queue and id; None: nothing is verified."""
        ...


class Message:
    """A job that this process holds until it is acknowledged, handed back or refused.

    Attributes:
        id, queue, name: which job this is; ``name`` is its task's.
        args, payload: its positional and its keyword arguments, in plain types (those of msgpack). A call with positional arguments
            of a task that is registered here has them in ``payload`` by name.
        attempt: 1 for the first run, one more after each failed one.
        enqueued_at: seconds since the epoch.
    """

    __slots__ = ("_consumer", "args", "attempt", "envelope", "id", "payload", "queue", "started")

    def __init__(self, consumer: Consumer, job_id: str, queue: str, envelope: Envelope) -> None:
        self._consumer = consumer
        self.id = job_id
        self.queue = queue
        self.envelope = envelope
        self.attempt = envelope.attempt + 1
        self.args, self.payload = consumer.read(envelope)
        self.started = time.monotonic()

    @property
    def name(self) -> str:
        """Its task's name."""
        return self.envelope.task

    @property
    def enqueued_at(self) -> float:
        """When it was accepted, seconds since the epoch."""
        return self.envelope.enqueued_at / 1_000

    async def ack(self, result: Any = None) -> None:
        """See :meth:`Consumer.ack`."""
        await self._consumer.ack(self, result)

    async def nack(self, *, requeue: bool = False, delay: float = 0.0, error: str = "") -> None:
        """See :meth:`Consumer.nack`."""
        await self._consumer.nack(self, requeue=requeue, delay=delay, error=error)

    async def fail(self, error: str | BaseException = "") -> None:
        """See :meth:`Consumer.fail`."""
        await self._consumer.fail(self, error)

    def __repr__(self) -> str:
        return f"<Message {self.name} id={self.id} queue={self.queue} attempt={self.attempt}>"


class Consumer:
    """Takes the jobs of one queue, for a loop of your own. Made by ``app.consume(queue)``; of one event loop.

    It is a worker to everybody else: it holds what it has reserved under a lease that it renews by itself while the event loop
    runs, and what it holds goes back to the queue when it is closed, or when its process dies and the lease runs out.
    Task options (time limits, limits, ``unique="while_running"``, isolation) are the worker's business and have no effect here.

    Args:
        prefetch: most messages that are held at once, not acknowledged ones included.

    Example::

        async with app.consume("emails", prefetch=20) as messages:
            async for message in messages:
                try:
                    await send(**message.payload)
                except TimeoutError:
                    await message.nack(requeue=True, delay=30)
                else:
                    await message.ack()
    """

    def __init__(self, app: Home, queue: str, *, prefetch: int = 1) -> None:
        if not isinstance(prefetch, int) or not 1 <= prefetch <= 2_000:
            raise InvalidOption(f"prefetch={prefetch!r:.100} is not a number from 1 to 2,000")
        self._app = app
        self._settings = settings = app.settings
        self._keys = app.keys(queue)
        self.queue = queue
        self._prefetch = prefetch
        self._lease_ms = round(settings.lease * 1_000)
        host = "".join(c if c.isalnum() or c in "-_" else "-" for c in socket.gethostname())[:60]
        self._name = f"{host}.{os.getpid()}.{secrets.token_hex(3)}"
        self._lives = 0
        self.worker_id = ""
        self._connection = FencedConnection.to(app.endpoint(), response_timeout=settings.response_timeout)
        self._waker = FencedConnection.to(app.endpoint(), response_timeout=settings.response_timeout + IDLE_WAIT)
        self._opener = app.opener(self._connection.clock.now_ms)
        self._connects = 0
        self._held: dict[str, Message | None] = {}  # None: settled, but for the answer
        self._ready: list[Message] = []
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()
        self._heart: asyncio.Task[None] | None = None
        self._closed = False

    # -- taking -------------------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        message = await self.reserve_next(timeout=None)
        if message is None:
            raise StopAsyncIteration
        return message

    async def reserve_next(self, timeout: float | None = 0.0) -> Message | None:
        """The next job, held by this process; None when there is none, or ``prefetch`` are held.

        Args:
            timeout: seconds to wait for one; None: until the consumer is closed.

        Raises:
            BrokerUnavailable: with a timeout of 0, Redis is away. A longer wait outlives that.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._closed:
            left = IDLE_WAIT if deadline is None else deadline - time.monotonic()
            try:
                async with self._turn:
                    if not self._ready:
                        await self._reserve()
                    if self._ready:
                        return self._ready.pop(0)
                if left <= 0:
                    return None
                await self._wait(min(left, IDLE_WAIT))
            except BrokerUnavailable as error:
                if left <= 0:
                    raise
                log.warning("redis unavailable, retrying", extra=fields(queue=self.queue, error=str(error)))
                await asyncio.sleep(min(0.2, left))
        return None

    async def _wait(self, longest: float) -> None:
        if len(self._held) < self._prefetch:
            await self._waker.call(raw("BLPOP", self._keys.wake, longest))
            return
        self._room.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._room.wait(), longest)

    async def _reserve(self) -> None:
        await self._connect()
        want = self._prefetch - len(self._held)
        if want <= 0:
            return
        reserved = await self._connection.call(reserve(self._keys, self.worker_id, want))
        if reserved.held < 0:
            await self._begin()
            return
        for job_id, data in zip(reserved.ids, reserved.envelopes, strict=True):
            await self._admit(job_id, data or b"")

    async def _admit(self, raw_id: bytes, data: bytes) -> None:
        job_id = raw_id.decode("latin-1")  # one character for each byte, whatever a foreign producer takes for an id
        self._held[job_id] = None
        key = job_id if raw_id.isascii() else cast(str, raw_id)  # Redis knows it by no other name
        try:
            if not raw_id.isascii() or len(raw_id) > ID_MOST:
                raise UndecodableJob(f"its id is not 1 to {ID_MOST} ASCII characters: {raw_id[:40]!r}")
            read = self._opener
            envelope = decode_envelope(data) if read is None else read(self.queue, job_id, data)
            message = Message(self, job_id, self.queue, envelope)
        except UndecodableJob as error:
            batch = Batch()
            if delay := delay_of(error, self._connection.clock.now_ms(), self._settings.unknown_task_ttl):
                batch.later.append((key, delay, data))
            else:
                reason = "signature" if isinstance(error, BadSignature) else "undecodable"
                info = self._error(reason, type(error).__name__, str(error), 0)
                batch.failed.append((key, data, encode(info)))
            await self._settle(job_id, batch)
            return
        self._held[job_id] = message
        self._ready.append(message)

    def read(self, envelope: Envelope) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a call.

        Raises:
            UndecodableJob: they are not msgpack of the right shape.
        """
        try:
            body = msgspec.msgpack.decode(envelope.body)
        except Exception as error:  # noqa: BLE001 - see arguments.encode_untyped: msgspec raises more than its own errors
            raise UndecodableJob(f"the arguments cannot be decoded: {type(error).__name__}: {error}") from None
        payload = body if isinstance(body, dict) else {}
        args = payload.pop("", []) if isinstance(body, dict) else body
        if not isinstance(args, list):
            raise UndecodableJob("the body is neither an array nor a map of arguments")
        task = self._app.tasks.get(envelope.task)
        names = task.arguments.names if task is not None else []
        if len(args) <= len(names):
            return [], {**dict(zip(names, args, strict=False)), **payload}
        return args, payload

    async def process_one(self, handler: Callable[[Message], Awaitable[Any]]) -> bool:
        """Take one job, if there is one, and run ``handler`` on it: what it returns is the result, an exception has the job fail.

        A handler that has settled the message itself is left to its word.

        Returns:
            Whether there was one.
        """
        message = await self.reserve_next()
        if message is None:
            return False
        await self.process(message, handler)
        return True

    async def process(self, message: Message, handler: Callable[[Message], Awaitable[Any]]) -> None:
        """Run ``handler`` on a message, and settle it: acknowledged with what it returns, failed with what it raises.

        Raises:
            LeaseLost: it was another one's before that. The outcome is dropped.
            asyncio.CancelledError: whoever called was cancelled; the job goes back to its queue, uncharged.
        """
        try:
            result = await handler(message)
        except asyncio.CancelledError:
            if message.id in self._held:
                await asyncio.shield(self.nack(message, requeue=True))
            raise
        except Exception as error:  # noqa: BLE001 - the user's own handler
            if message.id in self._held:
                await self.fail(message, error)
        else:
            if message.id in self._held:
                await self.ack(message, result)

    # -- settling -----------------------------------------------------------------------------

    async def ack(self, message: Message, result: Any = None) -> None:
        """The job is done. ``result`` is kept for its ``result_ttl``, and given to those who wait for it.

        Raises:
            LeaseLost: this process does not hold it any more; another one runs it, or has.
            BrokerUnavailable: Redis did not answer for 30 seconds. The job runs again once the lease is out.
        """
        batch, extra = Batch(), message.envelope.extra
        ttl = self._result_ttl(message)
        if extra is not None and extra.result_ttl is not None:
            ttl = extra.result_ttl
        if ttl > 0:
            now = self._connection.clock.now_ms()
            record = JobRecord(
                JobState.SUCCESS.value, message.name, message.envelope.enqueued_at, self._started(message), now,
                message.attempt, msgspec.Raw(encode(result)),
            )  # fmt: skip
            name, expires = bucket_of(ttl, now)
            batch.recorded.append((name, expires, message.id, encode(record)))
        else:
            batch.succeeded.append(message.id)
        await self._settle(message.id, batch)

    async def nack(self, message: Message, *, requeue: bool = False, delay: float = 0.0, error: str = "") -> None:
        """Hand the job back, or refuse it.

        Args:
            requeue: True: it runs again after ``delay`` seconds, and no attempt is charged; False: into the dead-letter queue.
            error: why, for the dead letter.

        Raises:
            As :meth:`ack`.
        """
        batch = Batch()
        if not requeue:
            self._bury(batch, message, DEAD_LETTER, "Nack", error or "refused by its consumer")
        elif seconds("delay", delay) > 0:
            self._later(batch, message, delay, message.envelope.attempt, None)
        else:
            batch.released.append(message.id)
        await self._settle(message.id, batch)

    async def fail(self, message: Message, error: str | BaseException = "") -> None:
        """The run has failed: the job is retried by its task's policy, and after ``max_attempts`` a dead letter.

        Raises:
            As :meth:`ack`.
        """
        kind = type(error).__name__ if isinstance(error, BaseException) else "Error"
        text, batch = str(error)[:2_000], Batch()
        task = self._app.tasks.get(message.name)
        rule = task.defaults.retry if task is not None else RetryRule()
        most = (message.envelope.extra or Extra()).max_attempts or (task.defaults.max_attempts if task else None)
        again = not isinstance(error, Exception) or rule.retryable(error)
        if again and message.attempt < (most or self._settings.default_max_attempts):
            delay = rule.policy.delay(message.attempt)
            self._later(batch, message, delay, message.attempt, f"{kind}: {text}"[:300])
        else:
            self._bury(batch, message, "exception", kind, text, attempts=message.attempt)
        await self._settle(message.id, batch)

    def _later(self, batch: Batch, message: Message, delay: float, attempt: int, error: str | None) -> None:
        old, delay_ms = message.envelope.extra or Extra(), round(delay * 1_000)
        due = self._connection.clock.now_ms() + delay_ms
        extra = msgspec.structs.replace(
            old, error=error or old.error, due_at=due, snoozes=old.snoozes + (error is None)
        )
        envelope = msgspec.structs.replace(message.envelope, attempt=attempt, extra=extra)
        batch.later.append((message.id, delay_ms, encode(envelope)))

    def _bury(
        self, batch: Batch, message: Message, reason: str, kind: str, text: str, *, attempts: int | None = None
    ) -> None:
        attempts = message.envelope.attempt if attempts is None else attempts
        envelope = msgspec.structs.replace(message.envelope, attempt=attempts)
        error = self._error(reason, kind, text, attempts, self._started(message))
        batch.failed.append((message.id, encode(envelope), encode(error)))

    def _error(self, reason: str, kind: str, text: str, attempts: int, started: int = 0) -> ErrorInfo:
        now = self._connection.clock.now_ms()
        return ErrorInfo(reason, kind, text, "", attempts, now, socket.gethostname(), started)

    def _started(self, message: Message) -> int:
        return self._connection.clock.now_ms() - round((time.monotonic() - message.started) * 1_000)

    def _result_ttl(self, message: Message) -> float:
        task = self._app.tasks.get(message.name)
        own = task.defaults.result_ttl if task is not None else None
        return self._settings.result_ttl if own is None else own

    async def _settle(self, job_id: str, batch: Batch) -> None:
        """Write one outcome. Sent again after a lost reply: then "not held" means that the first one has arrived."""
        if job_id not in self._held:
            raise LeaseLost(f"job {job_id!r} of queue {self.queue!r} is not held by this consumer (any more)")
        command = settle(self._keys, self.worker_id, batch, self._settings.dead_max)
        deadline, settled, sent_before = time.monotonic() + 30.0, None, False
        while settled is None:
            try:
                settled = await self._connection.call(command)
            except BrokerUnavailable:
                if time.monotonic() > deadline:
                    raise
                sent_before = True
                await asyncio.sleep(0.1)
        self._held.pop(job_id, None)
        self._room.set()
        if settled.stale and not sent_before:
            raise LeaseLost(f"job {job_id!r} of queue {self.queue!r}: the lease ran out, another worker has it")

    # -- the lease ----------------------------------------------------------------------------

    async def _connect(self) -> None:
        """Be registered; after a lost connection, learn what was in a lost reply."""
        if self._heart is None:
            await self._begin()
            self._heart = asyncio.create_task(self._extend())
        await self._connection.connect()
        if self._connects != self._connection.connects:
            held = await self._connection.call(resume(self._keys, self.worker_id))
            if held.held < 0:
                await self._begin()
                return
            self._connects = self._connection.connects
            for job_id, data in zip(held.ids, held.envelopes, strict=True):
                if job_id.decode("latin-1") not in self._held:
                    await self._admit(job_id, data or b"")

    async def _begin(self) -> None:
        """A new incarnation: what the last one held is others' now."""
        if self._held:
            log.error("lease lost", extra=fields(worker=self.worker_id, queue=self.queue, jobs=len(self._held)))
        self._held.clear()
        self._ready.clear()
        self._lives += 1
        self.worker_id = self._name if self._lives == 1 else f"{self._name}~{self._lives}"
        card = WorkerCard(
            socket.gethostname(), os.getpid(), self._prefetch, int(time.time() * 1_000), "consumer", self._lease_ms, []
        )
        await self._connection.run(agree(self._settings.prefix))
        await self._connection.call(register(self._keys, self.worker_id, self._lease_ms, encode(card)))
        await self._connection.call(announce(GlobalKeys(self._settings.prefix).queues, self.queue))
        self._connects = self._connection.connects

    async def _extend(self) -> None:
        pause = self._lease_ms / 3_000
        while True:
            await asyncio.sleep(pause)
            with suppress(BrokerError):
                await self._connection.call(extend(self._keys, self._lease_ms, [self.worker_id]))

    # -- its end ------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Hand back what is still held, uncharged, and close the connections. An iteration ends."""
        if self._closed:
            return
        self._closed = True
        self._room.set()
        self._waker.drop("closed")
        if self._heart is not None:
            self._heart.cancel()
            with suppress(BrokerError, TimeoutError):
                async with asyncio.timeout(2.0):
                    await self._hand_back()
        self._held.clear()
        self._ready.clear()
        await self._waker.close()
        await self._connection.close()

    async def _hand_back(self) -> None:
        remaining = 1
        while remaining > 0:
            command = recover(
                self._keys, self.worker_id, expired=False, charge="none",
                max_deliveries=self._settings.max_deliveries, dead_max=self._settings.dead_max,
            )  # fmt: skip
            remaining = (await self._connection.call(command)).remaining
        if await self._connection.call(raw("EXISTS", *self._keys.ready, decode=int)):
            await self._connection.call(raw("RPUSH", self._keys.wake, "1"))  # a token may have been on its way here
