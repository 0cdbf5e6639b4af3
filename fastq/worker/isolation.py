"""``isolation="process"`` on the worker's side: a pool of processes, each running one handler at a time.

Whatever happens to such a process - a segfault, ``os._exit``, a kill for its time or memory limit - ends the one job that it
runs. The processes come from the nursery (nursery.py); what they do is in isolated.py.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections import deque

import msgspec

from fastq.board import exit_text
from fastq.context import JobContext
from fastq.errors import JobCrashed
from fastq.job import encode
from fastq.worker.isolated import Order, Reply
from fastq.worker.nursery import ENDED, FORK, KILL, RECORD, STARTED, Nursery

__all__ = ["Pool"]

log = logging.getLogger("fastq.worker")

_decode = msgspec.msgpack.Decoder(Reply).decode
_REPORT_WITHIN = 5.0  # seconds that the nursery has to say how a process ended


class _Child:
    """One process."""

    __slots__ = ("doomed", "ended", "jobs", "pid", "reader", "writer")

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int) -> None:
        self.reader, self.writer, self.pid = reader, writer, pid
        self.jobs = 0
        self.doomed = False  # it runs no other job
        self.ended: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()

    async def read(self) -> Reply:
        """What it says next."""
        size = int.from_bytes(await self.reader.readexactly(4), "big")
        return _decode(await self.reader.readexactly(size))


def _pass_on(job: JobContext, reply: Reply) -> None:
    """A report of the handler, to where the worker's own handlers report."""
    if job.desk is not None and reply.how == "progress":
        job.desk.progress(job, bytes(reply.result))
    elif job.desk is not None:
        job.desk.line(job, reply.ending.message)


class Pool:
    """At most ``most`` processes, each replaced after ``jobs_each`` jobs. Jobs that find none free wait, first come first.

    Args:
        nursery: opened; the pool closes it.
        most: processes at once.
        jobs_each: jobs that one process runs.
    """

    def __init__(self, nursery: Nursery, most: int, jobs_each: int) -> None:
        self._nursery = nursery
        self._most = most
        self._jobs_each = jobs_each
        self._loop = asyncio.get_running_loop()
        self._idle: list[_Child] = []
        self._all: dict[int, _Child] = {}
        self._count = 0  # those that live or are being started
        self._starting: deque[asyncio.Future[int]] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._at_work: dict[JobContext, _Child] = {}
        self.broken = False
        """Whether the nursery is gone: this worker has to be replaced."""
        nursery.control.setblocking(False)
        self._loop.add_reader(nursery.control.fileno(), self._on_report)

    # -- a job --------------------------------------------------------------------------------

    async def run(self, job: JobContext, max_memory: int) -> Reply:
        """Run a job's handler in a process of its own.

        Raises:
            JobCrashed: the process ended before it had answered.
        """
        soft, job.soft = job.soft, 0.0  # the process itself watches this one
        child = await self._take()
        if job.stopping:  # it was cancelled while it waited
            self._leave(child)
            raise asyncio.CancelledError
        self._at_work[job] = child
        job.deadline = time.monotonic() + job.timeout  # counts from here: it may have waited for a process
        envelope = msgspec.structs.replace(job.envelope, body=job.bound) if job.bound else job.envelope
        order = encode(
            Order(job.id, job.queue, encode(envelope), job.deliveries, job.max_attempts, job.timeout, soft, max_memory)
        )
        try:
            child.writer.write(len(order).to_bytes(4, "big") + order)
            while (reply := await child.read()).how in ("progress", "line"):
                _pass_on(job, reply)
        except (asyncio.IncompleteReadError, ConnectionError):
            child.doomed = True
            raise JobCrashed(await self._how(child)) from None
        except BaseException:  # the worker gives the job up
            self._kill(child)
            raise
        else:
            child.doomed = child.doomed or reply.spent
            return reply
        finally:
            del self._at_work[job]
            self._leave(child)

    def interrupt(self, job: JobContext, why: str) -> bool:
        """Do what a stop of a running job asks for; False: it has no process yet."""
        child = self._at_work.get(job)
        if child is None:
            return False
        if why == "cancel":
            child.writer.write(bytes(4))
        else:
            self._kill(child)
        return True

    async def _how(self, child: _Child) -> str:
        try:
            status, rss = await asyncio.wait_for(asyncio.shield(child.ended), _REPORT_WITHIN)
        except TimeoutError:
            return "its process ended, nobody knows how"
        return f"its process ended by {exit_text(status)}, with {rss >> 20} MiB at the most"

    # -- processes ----------------------------------------------------------------------------

    async def _take(self) -> _Child:
        while True:
            while self._idle:
                child = self._idle.pop()
                if not child.ended.done():
                    return child
            if self._count < self._most:
                self._count += 1
                try:
                    return await self._start()
                except BaseException:
                    self._count -= 1
                    self._next()
                    raise
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._next()
                raise

    async def _start(self) -> _Child:
        if self.broken:
            raise JobCrashed("this worker cannot start processes any more: it is being replaced")
        ours, theirs = socket.socketpair()
        started: asyncio.Future[int] = self._loop.create_future()
        self._starting.append(started)
        with theirs:
            socket.send_fds(self._nursery.control, [RECORD.pack(FORK, 0, 0, 0)], [theirs.fileno()])
        try:
            pid = await asyncio.shield(started)
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()  # the process leaves by itself
            raise
        child = self._all[pid] = _Child(reader, writer, pid)
        return child

    def _leave(self, child: _Child) -> None:
        """A job has left its process."""
        child.jobs += 1
        if child.doomed or child.jobs >= self._jobs_each:
            child.doomed = True
            child.writer.close()  # it ends at end of file
            self._count -= 1
        else:
            self._idle.append(child)
        self._next()

    def _next(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _kill(self, child: _Child) -> None:
        child.doomed = True
        if not self.broken:
            self._nursery.control.send(RECORD.pack(KILL, child.pid, 0, 0))

    # -- the nursery --------------------------------------------------------------------------

    def _on_report(self) -> None:
        try:
            data = self._nursery.control.recv(RECORD.size * 100)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._on_end()
        for what, pid, status, rss in RECORD.iter_unpack(data):
            if what == STARTED:
                started = self._starting.popleft()
                if not started.done():
                    started.set_result(pid)
            elif what == ENDED and (child := self._all.pop(pid, None)) is not None:
                if not child.ended.done():
                    child.ended.set_result((status, rss))
                if child in self._idle:
                    self._idle.remove(child)
                    child.writer.close()
                    self._count -= 1
                    self._next()

    def _on_end(self) -> None:
        self.broken = True
        self._loop.remove_reader(self._nursery.control.fileno())
        log.error("nursery of isolated handlers is gone")
        for child in self._all.values():  # they were killed with it
            if not child.ended.done():
                child.ended.set_result((signal.SIGKILL, 0))
        for started in self._starting:
            if not started.done():
                started.set_exception(JobCrashed("the process could not be started: the nursery is gone"))

    def close(self) -> None:
        """End all processes."""
        if not self.broken:
            self._loop.remove_reader(self._nursery.control.fileno())
        self.broken = True
        for child in self._all.values():
            child.writer.close()
        self._nursery.close()
