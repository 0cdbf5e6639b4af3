"""A worker process after the fork: set up, run the loop, take signals, exit.

``main`` is the supervisor's entry point; ``run_alone`` is ``fastq worker``, one process without a supervisor.
"""

from __future__ import annotations

import asyncio
import faulthandler
import functools
import gc
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastq import logs
from fastq.app import FastQ
from fastq.board import Board, ChildContext, Slot, SlotState, run_exit_functions
from fastq.broker.connection import AsyncConnection
from fastq.broker.fence import FencedConnection
from fastq.errors import ExitCode, FastQError
from fastq.job import WorkerCard
from fastq.launch import Launch, load_app, report
from fastq.metrics import WorkerMetrics, count_limits_in
from fastq.partitions import queue_of
from fastq.values import parse_queues
from fastq.worker.isolated import live
from fastq.worker.isolation import Pool
from fastq.worker.listing import Listing
from fastq.worker.loop import WorkerLoop
from fastq.worker.nursery import Nursery
from fastq.worker.ticker import beat
from fastq.worker.waker import IDLE_WAIT

__all__ = ["main", "run_alone"]

log = logging.getLogger("fastq.worker")

STALL = 1.0
"""Seconds without a sign of life after which the event loop counts as blocked."""


def main(context: ChildContext) -> int:
    """A worker under a supervisor."""
    launch: Launch = context.settings
    nursery = _nursery(launch)  # before there is any thread, or anything of the application
    logs.setup(launch.settings.log_level, launch.settings.log_format, background=True)
    app = _load(launch)
    if app is None:
        return ExitCode.USAGE
    context.slot.state = SlotState.BOOTED
    if context.number == 1:
        warn_of_unserved_queues(app)
    try:
        return _serve(app, context.slot, context.board, context.orphaned, nursery)
    finally:
        logs.flush()  # what a process says last must not end with it


def run_alone(launch: Launch, keep: Callable[[FastQ, Board], Any]) -> int:
    """One worker process without a supervisor, for containers that bring their own.

    ``keep`` starts whatever extends the leases meanwhile (the monitor's keeper, as a thread).
    """
    nursery = _nursery(launch)
    logs.setup(launch.settings.log_level, launch.settings.log_format, background=True)
    app = _load(launch)
    if app is None:
        return ExitCode.USAGE
    board = Board(1)
    slot = board.claim("worker")
    assert slot is not None
    slot.pid = os.getpid()
    slot.state = SlotState.BOOTED
    warn_of_unserved_queues(app)
    keep(app, board)
    try:
        return _serve(app, slot, board, lambda: False, nursery)
    finally:
        logs.flush()


def _load(launch: Launch) -> FastQ | None:
    try:
        return load_app(launch)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        report(error, launch.app)
        return None


def _nursery(launch: Launch) -> Nursery:
    return Nursery(lambda: load_app(launch), functools.partial(live, launch.settings))


def _serve(app: FastQ, slot: Slot, board: Board, orphaned: Callable[[], bool], nursery: Nursery) -> int:
    import uvloop

    if any(task.defaults.isolation for task in app.tasks.values()):
        nursery.open()
    else:
        nursery.close()
    faulthandler.enable()  # the monitor ends a hung worker with SIGABRT: this writes the stacks first
    gc.freeze()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_Worker(app, slot, board, orphaned, nursery).run())
    except FastQError as error:
        log.error("worker cannot work", extra={"fields": {"error": str(error)}})
        return ExitCode.USAGE
    except Exception:
        log.exception("worker crashed")
        return ExitCode.CRASH
    return ExitCode.OK


def warn_of_unserved_queues(app: FastQ) -> None:
    """A task whose own queue nobody serves is a mistake that shows itself by nothing at all."""
    served = {queue_of(name) for name in parse_queues(app.settings.queues).names}
    for task in app.tasks.values():
        queue = app.queue_of(task.name, task.defaults.queue)
        if queue not in served:
            log.warning(
                "queue not served here",
                extra={"fields": {"task": task.name, "queue": queue, "serving": ",".join(sorted(served))}},
            )


def known_tasks(app: FastQ) -> list[str]:
    """What the worker's card says that it knows; nothing when that would make a large card."""
    return sorted(app.tasks) if len(app.tasks) <= MOST_TASKS else []


def worker_name() -> str:
    """Unique for this process: host, pid and a random part. No colon, so that it fits into a key name."""
    host = "".join(c if c.isalnum() or c in "-_" else "-" for c in socket.gethostname())[:60]
    return f"{host}.{os.getpid()}.{secrets.token_hex(3)}"


MOST_TASKS = 1_000
"""Task names on a worker's card: 20 KB or so, read by whoever asks why a job does not run."""


class _Worker:
    """What surrounds the loop: signals, lifespan, recycling, the watchdog."""

    def __init__(self, app: FastQ, slot: Slot, board: Board, orphaned: Callable[[], bool], nursery: Nursery) -> None:
        self._app = app
        self._settings = app.settings
        self._slot = slot
        self._board = board
        self._orphaned = orphaned
        self._nursery = nursery
        self._started = time.monotonic()
        self._watchdog = threading.Event()
        self._log_lines = 0  # dropped ones that were counted

    async def run(self) -> None:
        settings, slot = self._settings, self._slot
        order = parse_queues(settings.queues)
        metrics = WorkerMetrics(slot, queues=set(map(queue_of, order.names)), tasks=self._app.tasks)
        count_limits_in(metrics)
        slot.concurrency = settings.concurrency
        slot.ticked_at = time.monotonic()
        from fastq import __version__

        connection, waker = self._connect(), self._connect(patience=IDLE_WAIT)
        self._listing = Listing(self._app, connection, order.names)
        await self._listing.learn()
        started, lease = int(time.time() * 1_000), round(settings.lease * 1_000)
        card = WorkerCard(
            socket.gethostname(), os.getpid(), settings.concurrency, started, __version__, lease, known_tasks(self._app)
        )
        self._loop = WorkerLoop(self._app, connection, waker, order, slot, metrics, card, worker_name())
        self._metrics = metrics
        if not self._nursery.closed:
            self._loop.executor.isolation = Pool(self._nursery, settings.processes, settings.process_jobs)
        if self._board.quiet:
            self._loop.set_quiet(True)  # the fleet is quiet: nothing may be reserved, not even once
        self._signals()
        threading.Thread(target=self._watch, args=(threading.get_ident(),), name="fastq-watchdog", daemon=True).start()
        async with self._lifespan() as state:
            self._loop.executor.state = state
            keeper = asyncio.gather(self._keep(), self._listing.run())
            try:
                await self._loop.run()
            finally:
                keeper.cancel()
                await asyncio.gather(keeper, return_exceptions=True)
                self._watchdog.set()
        await self._app.aclose()
        finished = self._loop.executor.finished
        log.info(
            "worker stopped",
            extra={"fields": {"jobs": finished, "seconds": round(time.monotonic() - self._started, 1)}},
        )
        if self._loop.executor.stops.stuck or threading.active_count() > 1:
            run_exit_functions(ExitCode.OK)
            logs.flush()
            sys.stdout.flush()
            os._exit(ExitCode.OK)  # a thread that never ends must not keep the process

    def _connect(self, patience: float = 0.0) -> AsyncConnection:
        """``patience``: seconds that Redis may keep an answer back by design, as a blocking pop does."""
        settings = self._settings
        return FencedConnection.to(
            self._app.endpoint(),
            connect_timeout=settings.connect_timeout,
            response_timeout=settings.response_timeout + patience,
        )

    @asynccontextmanager
    async def _lifespan(self) -> AsyncIterator[Any]:
        function = self._app.lifespan_function
        if function is None:
            yield None
            return
        import inspect

        wants_app = len(inspect.signature(function).parameters) > 0
        async with function(self._app) if wants_app else function() as state:
            yield state

    # -- signals --------------------------------------------------------------------------------

    def _signals(self) -> None:
        loop, worker = asyncio.get_running_loop(), self._loop
        grace = self._settings.grace
        loop.add_signal_handler(signal.SIGTERM, lambda: worker.stop(grace, "SIGTERM"))
        loop.add_signal_handler(signal.SIGQUIT, lambda: worker.stop(0.0, "SIGQUIT"))
        loop.add_signal_handler(signal.SIGTSTP, lambda: worker.set_quiet(True))
        loop.add_signal_handler(signal.SIGCONT, lambda: worker.set_quiet(False))
        loop.add_signal_handler(signal.SIGUSR2, self._dump)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # alone: Ctrl-C is ours
            loop.add_signal_handler(signal.SIGINT, self._interrupt)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # alone, and not under nohup
            loop.add_signal_handler(signal.SIGHUP, lambda: worker.stop(grace, "SIGHUP"))

    def _interrupt(self) -> None:
        self._loop.stop(0.0 if self._loop.stopping else self._settings.grace, "SIGINT")

    def _dump(self) -> None:
        """Every running job and where it is."""
        now = time.monotonic()
        for job in list(self._loop.executor.running):
            stack = "" if job.runner is None else _task_stack(job.runner)
            fields = {"job": job.id, "task": job.task, "queue": job.queue, "attempt": job.attempt}
            log.info(
                "running job", extra={"fields": {**fields, "seconds": round(now - job.started, 3), "traceback": stack}}
            )
        for ident, frame in sys._current_frames().items():
            name = next((t.name for t in threading.enumerate() if t.ident == ident), str(ident))
            log.info(
                "thread",
                extra={"fields": {"name": name, "traceback": "".join(traceback.format_stack(frame, limit=20))}},
            )

    # -- recycling --------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            await beat()
            self._slot.rss = _rss()
            if lost := logs.dropped() - self._log_lines:
                self._metrics.count("log_lines_dropped", lost)
                self._log_lines += lost
            if self._orphaned():
                os._exit(ExitCode.CRASH)  # where the system has no death signal: the leases hand the jobs back
            reason = self._recycle_reason()
            if reason and not self._loop.stopping and self._board.may_recycle(self._slot):
                self._slot.recycling = True
                self._metrics.count("recycled")
                self._loop.stop(math.inf, reason)

    def _recycle_reason(self) -> str:
        settings, executor = self._settings, self._loop.executor
        if self._listing.unserved:
            return f"there are partitions that it does not serve: {', '.join(self._listing.unserved[:5])}"
        if executor.stops.stuck:
            return "a handler does not stop"
        if executor.isolation is not None and executor.isolation.broken:
            return "it cannot start processes any more"
        if settings.max_jobs and executor.finished + len(executor.running) >= settings.max_jobs:  # it takes no more
            return f"max_jobs={settings.max_jobs}"
        if settings.max_rss and self._slot.rss > settings.max_rss:
            return f"max_rss={settings.max_rss}, rss={self._slot.rss}"
        return ""

    # -- a blocked loop -------------------------------------------------------------------------------

    def _watch(self, main_thread: int) -> None:
        """Say which line blocks the event loop (a thread; C code that holds the GIL is the monitor's case)."""
        told = 0.0
        while not self._watchdog.wait(STALL / 2):
            ticked = self._slot.ticked_at
            blocked = time.monotonic() - ticked
            if blocked < STALL or ticked == told:
                continue
            told = ticked
            frame = sys._current_frames().get(main_thread)
            stack = "".join(traceback.format_stack(frame, limit=12)) if frame else ""
            self._metrics.count("loop_stalls")
            fields = {"seconds": round(blocked, 1), "jobs": self._slot.running_ids()[:5], "traceback": stack}
            log.warning("event loop blocked", extra={"fields": fields})


def _task_stack(task: asyncio.Task[Any]) -> str:
    """Where a suspended task is: from its coroutine along what each one awaits (``get_stack`` knows the first only)."""
    lines: list[str] = []
    at: Any = task.get_coro()
    while at is not None and len(lines) < 20:
        frame = getattr(at, "cr_frame", None) or getattr(at, "gi_frame", None)
        if frame is not None:
            lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}\n')
        at = getattr(at, "cr_await", None) or getattr(at, "gi_yieldfrom", None)
    return "".join(lines)


def _rss() -> int:
    """Resident memory of this process in bytes."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes, the peak
