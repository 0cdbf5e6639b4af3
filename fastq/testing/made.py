"""Jobs and messages that no queue has seen: for tests that call a handler like any function."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from fastq.app import FastQ
from fastq.consumer import Message
from fastq.context import JobContext
from fastq.job import VERSION, Envelope, Progress, decode_progress, encode

__all__ = ["MadeMessage", "make_job", "make_message", "told"]


class _Desk:
    """Where a made job reports: nowhere."""

    def now(self) -> float:
        return time.time()

    def progress(self, job: JobContext, data: bytes) -> None:
        job.report = decode_progress(data)


def make_job(
    task: str = "test",
    *,
    id: str = "test-job",  # noqa: A002 - as the attribute
    queue: str = "default",
    attempt: int = 1,
    max_attempts: int = 5,
    timeout: float = 300.0,
    cancelled: bool = False,
    state: Any = None,
    app: FastQ | None = None,
) -> JobContext:
    """A :class:`fastq.JobContext` for a handler that is called by a test.

    Its progress goes nowhere but to ``told(job)``. ``job.once`` needs an ``app`` with a server.

    Example::

        async def test_the_last_attempt_gives_up() -> None:
            with pytest.raises(fastq.Fail):
                await send("ann", job=fastq.testing.make_job(attempt=5, max_attempts=5))
    """
    envelope = Envelope(5, VERSION, task, b"\x90", round(time.time() * 1_000), attempt - 1)
    job = JobContext(
        id, queue, envelope, max_attempts=max_attempts, timeout=timeout, state=state, home=app, desk=_Desk()
    )
    job.stopping = "cancel" if cancelled else ""
    return job


def told(job: JobContext) -> Progress | None:
    """The last progress that the handler of a made job told."""
    return job.report if isinstance(job.report, Progress) else None


class _NoConsumer:
    def read(self, envelope: Envelope) -> tuple[list[Any], dict[str, Any]]:
        args, payload = msgspec.msgpack.decode(envelope.body)
        return args, payload


class MadeMessage(Message):
    """A :class:`fastq.Message` that belongs to no queue. What its handler does with it is written down here.

    Attributes:
        settled: ``"ack"``, ``"nack"`` or ``"fail"``; empty while nothing was.
        outcome: what that was called with: ``result``, or ``requeue``, ``delay`` and ``error``, or ``error``.
    """

    __slots__ = ("outcome", "settled")

    def __init__(self, job_id: str, queue: str, envelope: Envelope) -> None:
        super().__init__(_NoConsumer(), job_id, queue, envelope)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        self.settled: Literal["", "ack", "nack", "fail"] = ""
        self.outcome: dict[str, Any] = {}

    async def ack(self, result: Any = None) -> None:  # noqa: D102 - see Message
        self._settle("ack", result=result)

    async def nack(self, *, requeue: bool = False, delay: float = 0.0, error: str = "") -> None:  # noqa: D102
        self._settle("nack", requeue=requeue, delay=delay, error=error)

    async def fail(self, error: str | BaseException = "") -> None:  # noqa: D102
        self._settle("fail", error=error)

    def _settle(self, how: Literal["ack", "nack", "fail"], **outcome: Any) -> None:
        if self.settled:
            raise AssertionError(f"message {self.id!r} is settled twice: {self.settled}, then {how}")
        self.settled, self.outcome = how, outcome


def make_message(
    name: str,
    payload: Mapping[str, Any] | None = None,
    *,
    args: tuple[Any, ...] = (),
    id: str = "1",  # noqa: A002 - as the attribute
    queue: str = "default",
    attempt: int = 1,
    enqueued_at: float | None = None,
) -> MadeMessage:
    """A message for a handler of :class:`fastq.JobRegistry` or of a loop of one's own. The payload goes through msgpack, as it would.

    Example::

        message = fastq.testing.make_message("send_email", {"to": "ann@example.org"})
        result = await registry.dispatch(message)
    """
    now = time.time() if enqueued_at is None else enqueued_at
    envelope = Envelope(5, VERSION, name, encode([list(args), dict(payload or {})]), round(now * 1_000), attempt - 1)
    return MadeMessage(id, queue, envelope)
