"""The process of an isolated handler: one job at a time, from its socket to its socket.

Bodies and results cross as msgpack, errors as text with the decision already made: whether to retry is decided here, where
the class of the error is at hand. Nothing of it is ever imported from data.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
import threading
import time
from typing import Any, Literal

import msgspec

from fastq import logs
from fastq.app import FastQ
from fastq.config import Settings
from fastq.context import JobContext, current, injection
from fastq.errors import LimitTimeout, Retry, Snooze, SoftTimeLimitExceeded
from fastq.job import decode_envelope, encode
from fastq.task import Task
from fastq.worker.ending import NOT_THE_HANDLERS, Ending, ending_of, is_retryable, misfit, reason_of
from fastq.worker.reports import LineHandler
from fastq.worker.soft import exceed, softly

__all__ = ["Order", "Reply", "Reported", "Unkept", "live"]

NOT_THE_HANDLERS.add(__file__)


class Order(msgspec.Struct, array_like=True):
    """A job to run. An empty frame instead of one says that the running job was cancelled."""

    id: str
    queue: str
    envelope: bytes
    deliveries: int
    max_attempts: int
    timeout: float
    soft: float
    max_memory: int


class Reply(msgspec.Struct, array_like=True):
    """What became of it."""

    how: Literal["result", "unkept", "retry", "fail", "snooze", "limit", "progress", "line"]  # the last two: it goes on
    result: msgspec.Raw = msgspec.Raw(b"\xc0")  # of "progress": the report
    ending: Ending = Ending("", "", "", "")
    delay: float | None = None  # of "retry", "snooze", "limit": the error's own
    spent: bool = False  # this process should not run another job


class Reported(Exception):
    """An isolated handler has raised; ``reply`` says what."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"{reply.ending.type}: {reply.ending.message}")
        self.reply = reply


class Unkept:
    """The result of an isolated handler that could not be encoded there."""

    def __init__(self, why: str) -> None:
        self.why = why


class _Context(JobContext, eq=False):
    """The running job here: it looks into the socket whether it was cancelled."""

    sock: Any = None

    @property
    def cancelled(self) -> bool:
        if not self.stopping:
            with contextlib.suppress(BlockingIOError):
                if self.sock.recv(4, socket.MSG_DONTWAIT) == bytes(4):
                    self.stopping = "cancel"
        return bool(self.stopping)


def live(settings: Settings, app: FastQ, sock: socket.socket) -> None:
    """Run jobs until end of file."""
    logs.setup(settings.log_level, settings.log_format)
    desk = _Desk(sock)
    if settings.job_log_lines:
        logging.getLogger("fastq.job").addHandler(LineHandler(desk))
    signal.signal(signal.SIGALRM, _alarm)
    decode = msgspec.msgpack.Decoder(Order).decode
    loop = _Loop()
    while True:
        size = int.from_bytes(_exactly(sock, 4), "big")
        if size == 0:
            continue  # the job that was cancelled had ended
        order = decode(_exactly(sock, size))
        _send(sock, _run(app, sock, desk, loop, order))


def _send(sock: socket.socket, reply: Reply) -> None:
    data = encode(reply)
    sock.sendall(len(data).to_bytes(4, "big") + data)


class _Desk:
    """Where the handler's reports go: through the worker, to where those of its own handlers go."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()  # a handler may have threads

    def now(self) -> float:
        return time.time()

    def progress(self, _job: JobContext, data: bytes) -> None:
        self._say(Reply("progress", msgspec.Raw(data)))

    def line(self, _job: JobContext, line: str) -> None:
        self._say(Reply("line", ending=Ending("", "", line, "")))

    def _say(self, reply: Reply) -> None:
        with self._lock:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # the soft limit must not cut it in two
            try:
                _send(self._sock, reply)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise SystemExit  # the worker is gone, or does not need us any more
        data += part
    return bytes(data)


class _Loop:
    """One event loop for the async handlers of this process, made for the first one."""

    def __init__(self) -> None:
        self._runner: asyncio.Runner | None = None

    def run(self, job: JobContext, handler: Any) -> Any:
        if self._runner is None:
            import uvloop

            self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        return self._runner.run(_limited(job, handler))


async def _limited(job: JobContext, handler: Any) -> Any:
    current.set(job)
    if not job.soft:
        return await handler
    job.runner = asyncio.current_task()
    timer = asyncio.get_running_loop().call_later(job.soft, exceed, job)
    try:
        return await softly(job, handler)
    finally:
        timer.cancel()


def _run(app: FastQ, sock: socket.socket, desk: _Desk, loop: _Loop, order: Order) -> Reply:
    envelope = decode_envelope(order.envelope)
    task = app.tasks[envelope.task]
    job = _Context(
        order.id, order.queue, envelope, order.deliveries, order.max_attempts, order.timeout,
        soft=order.soft, home=app, desk=desk, sock=sock,
    )  # fmt: skip
    try:
        with _memory(order.max_memory):
            result = _call(task, job, loop)
            if (wrong := misfit(result)) is not None:
                raise wrong
    except BaseException as error:  # noqa: BLE001 - also SystemExit and KeyboardInterrupt: the next job is another one
        if isinstance(error, MemoryError) and not error.args and order.max_memory:
            error.args = (f"more than max_memory={order.max_memory:,} bytes",)  # CPython says nothing at all
        return _judged(error, task)
    try:
        return Reply("result", msgspec.Raw(encode(result)))
    except Exception as error:  # noqa: BLE001 - see arguments.encode_untyped
        return Reply("unkept", ending=Ending("", "", str(error), ""))


def _call(task: Task[..., Any], job: JobContext, loop: _Loop) -> Any:
    args, kwargs = task.arguments.decode(job.envelope.body)
    positional: Any = args
    if task.arguments.injected:
        positional, kwargs = task.arguments.place(args, kwargs, lambda parameter: injection(parameter, job))
    token = current.set(job)
    try:
        if task.is_async:
            return loop.run(job, task.fn(*positional, **kwargs))
        with _Alarm(job.soft):
            return task.fn(*positional, **kwargs)
    finally:
        current.reset(token)


def _judged(error: BaseException, task: Task[..., Any]) -> Reply:
    rule, spent = task.defaults.retry, isinstance(error, MemoryError)
    if isinstance(error, Snooze):
        return Reply("snooze", delay=error.delay)
    ending = ending_of(error, reason_of(error))
    if isinstance(error, LimitTimeout):
        return Reply("limit", ending=ending, delay=error.retry_after or 0.0)
    how: Literal["retry", "fail"] = "retry" if is_retryable(error, rule) else "fail"
    return Reply(how, ending=ending, delay=error.delay if isinstance(error, Retry) else None, spent=spent)


# -- limits ---------------------------------------------------------------------------------------


class _Alarm:
    """The soft limit of a plain function: raised in it by a signal, also while it sleeps or waits for a system call."""

    armed = False

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        if self._seconds:
            _Alarm.armed = True
            signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *_: object) -> None:
        _Alarm.armed = False  # first: a signal from here on is too late
        if self._seconds:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _alarm(_number: int, _frame: object) -> None:
    if _Alarm.armed:
        _Alarm.armed = False
        raise SoftTimeLimitExceeded


@contextlib.contextmanager
def _memory(most: int) -> Any:
    """While this lasts, this process holds ``most`` bytes of data at most; asking for more is a MemoryError (Linux)."""
    if not most or sys.platform != "linux":
        yield
        return
    with open("/proc/self/statm", "rb") as file:
        held = int(file.read().split()[5]) * resource.getpagesize()
    if held >= most:
        raise MemoryError(f"max_memory={most:,} is less than the {held:,} bytes that the application itself holds")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
