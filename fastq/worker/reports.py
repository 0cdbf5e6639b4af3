"""What running jobs tell of themselves: progress and log lines, gathered here and written twice a second per job at most.

A job that tells nothing costs nothing here. A report that Redis does not take is lost: a handler never waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from fastq.app import FastQ
from fastq.broker.command import Command
from fastq.broker.commands import report
from fastq.broker.connection import AsyncConnection
from fastq.context import JobContext, current
from fastq.errors import BrokerError

__all__ = ["LineHandler", "Reports"]

log = logging.getLogger("fastq.worker")

INTERVAL = 0.5
"""Seconds between two writes of one job."""

KEPT_MS = 3_600_000
"""How long progress and lines are kept after the last report, in ms."""

LINE_LIMIT = 2_000
"""Characters of a line."""


class Pending:
    """What one job has told and is not written yet."""

    __slots__ = ("at", "due", "lines", "lock", "progress")

    def __init__(self, most: int) -> None:
        self.lock = threading.Lock()  # the handler may run in a thread
        self.at = 0.0  # monotonic time of the last write
        self.due = False  # whether a write is to come
        self.progress = b""
        self.lines: deque[str] = deque(maxlen=max(most, 1))


class Reports:
    """The reports of one worker's jobs. Handlers in threads may call, too."""

    def __init__(self, app: FastQ, connection: AsyncConnection, worker_id: Callable[[], str]) -> None:
        self._app = app
        self._connection = connection
        self._worker_id = worker_id
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._most = app.settings.job_log_lines
        self._writes: set[asyncio.Task[None]] = set()
        self._handler = LineHandler(self) if self._most else None
        if self._handler is not None:
            logging.getLogger("fastq.job").addHandler(self._handler)

    def now(self) -> float:
        """Redis's time in seconds since the epoch."""
        return self._connection.clock.now_ms() / 1_000

    def progress(self, job: JobContext, data: bytes) -> None:
        """Take the latest progress; an earlier one that is not written yet is dropped."""
        self._take(job, data, "")

    def line(self, job: JobContext, line: str) -> None:
        """Take a log line."""
        self._take(job, b"", line)

    def _take(self, job: JobContext, data: bytes, line: str) -> None:
        pending = job.report
        if pending is None:
            pending = job.report = Pending(self._most)
        with pending.lock:
            pending.progress = data or pending.progress
            if line:
                pending.lines.append(line)
            if pending.due:
                return  # and no call into the loop: a thread may report as fast as it can
            pending.due = True
        if threading.get_ident() == self._thread:
            self._schedule(job)
        else:
            self._loop.call_soon_threadsafe(self._schedule, job)

    def _schedule(self, job: JobContext) -> None:
        self._loop.call_later(max(job.report.at + INTERVAL - time.monotonic(), 0.0), self._write, job)

    def _write(self, job: JobContext) -> None:
        pending: Pending = job.report
        with pending.lock:
            pending.due = False
            progress, lines = pending.progress, [*pending.lines]
            pending.progress = b""
            pending.lines.clear()
        pending.at = time.monotonic()
        q = self._app.keys(job.queue)
        command = report(q, self._worker_id(), job.id, progress, KEPT_MS, self._most, lines)
        task = self._loop.create_task(self._send(command))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _send(self, command: Command[bool]) -> None:
        try:
            await self._connection.call(command)
        except BrokerError as error:
            log.debug("report lost", extra={"fields": {"error": str(error)}})

    async def close(self) -> None:
        """Wait for what is on its way."""
        if self._handler is not None:
            logging.getLogger("fastq.job").removeHandler(self._handler)
        await asyncio.gather(*self._writes, return_exceptions=True)


class Desk(Protocol):
    """Who takes lines: the worker's reports, or what stands for them in the process of an isolated handler."""

    def line(self, job: JobContext, line: str, /) -> None:
        """Take a log line."""
        ...


class LineHandler(logging.Handler):
    """Hands the lines of ``job.log`` to the reports of the job's own worker."""

    def __init__(self, reports: Desk) -> None:
        super().__init__()
        self._reports = reports

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line of a running job, of this desk's."""
        job = current.get()
        if isinstance(job, JobContext) and job.desk is self._reports:
            when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            text = f"{when}.{int(record.msecs):03}Z {record.levelname} {record.getMessage()}"
            self._reports.line(job, text[:LINE_LIMIT])
