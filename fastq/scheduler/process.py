"""A scheduler process after the fork: set up, run its loops, take signals, exit.

``main`` is the supervisor's entry point; ``run_alone`` is ``fastq scheduler``, one process without a supervisor. Any number
may run: one leads, the others stand by.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable

from fastq import logs
from fastq.app import FastQ
from fastq.board import Board, ChildContext, Slot, SlotState
from fastq.broker.connection import AsyncConnection
from fastq.broker.inspector import Inspector
from fastq.broker.keys import GlobalKeys
from fastq.broker.planner import Declared, Planner
from fastq.broker.schema import agree
from fastq.errors import BrokerUnavailable, ExitCode, FastQError
from fastq.launch import Launch, load_app, report
from fastq.logs import fields
from fastq.metrics import WorkerMetrics
from fastq.scheduler.link import Leadership, Link, Roster
from fastq.scheduler.maintenance import WAIT, Promoter, Pruner, Recoverer, Unparker, Waker
from fastq.scheduler.periodic import Ticker, shown
from fastq.schedules import declared_by
from fastq.service import Service
from fastq.values import parse_queues

__all__ = ["main", "run_alone"]

log = logging.getLogger("fastq.scheduler")

TICK = 0.1
"""Seconds between two signs of life on the board."""

STOP_GRACE = 1.0
"""Seconds for the round trips that are under way at the end; what they do is whole in Redis or not at all."""


def main(context: ChildContext) -> int:
    """A scheduler under a supervisor."""
    launch: Launch = context.settings
    logs.setup(launch.settings.log_level, launch.settings.log_format, background=True)
    try:
        return _live(launch, context.slot, context.orphaned)
    finally:
        logs.flush()  # the supervisor's child ends with os._exit


def run_alone(launch: Launch) -> int:
    """One scheduler process without a supervisor."""
    slot = Board(1).claim("scheduler")
    assert slot is not None
    slot.pid = os.getpid()
    return _live(launch, slot, lambda: False)


def _live(launch: Launch, slot: Slot, orphaned: Callable[[], bool]) -> int:
    loaded = _load(launch)
    if loaded is None:
        return ExitCode.USAGE
    slot.state = SlotState.BOOTED
    return _serve(*loaded, launch.app, slot, orphaned)


def _load(launch: Launch) -> tuple[FastQ, list[Declared]] | None:
    """The application and its schedules; a schedule whose arguments do not fit its task is told here, not at each tick."""
    try:
        app = load_app(launch)
        return app, declared_by(app, launch.app)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        report(error, launch.app)
        return None


def _serve(app: FastQ, declared: list[Declared], source: str, slot: Slot, orphaned: Callable[[], bool]) -> int:
    import uvloop

    gc.freeze()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_Scheduler(app, declared, source, slot, orphaned).run())
    except FastQError as error:
        log.error("scheduler cannot work", extra=fields(error=str(error)))
        return ExitCode.USAGE
    except Exception:
        log.exception("scheduler crashed")
        return ExitCode.CRASH
    return ExitCode.OK


def scheduler_name() -> str:
    """Unique for this process."""
    return f"{socket.gethostname()[:60]}.{os.getpid()}.{secrets.token_hex(3)}"


def queues_of(app: FastQ) -> set[str]:
    """The queues that the settings and the registered tasks name."""
    named = {app.queue_of(task.name, task.defaults.queue) for task in app.tasks.values()}
    named.update(parse_queues(app.settings.queues).names)
    return {each for queue in named for each in app.served(queue)}


class _Scheduler:
    """The loops of one process and what surrounds them: connections, signals, signs of life."""

    def __init__(
        self, app: FastQ, declared: list[Declared], source: str, slot: Slot, orphaned: Callable[[], bool]
    ) -> None:
        settings = app.settings
        metrics = WorkerMetrics(slot)
        self._slot = slot
        self._orphaned = orphaned
        self._ended = asyncio.Event()
        self._commands = _connection(app)
        self._prefix = settings.prefix
        self._link = link = Link(self._commands, metrics)
        self._leadership = Leadership(link, GlobalKeys(settings.prefix), scheduler_name())
        self._roster = Roster(self._leadership, link, settings.prefix, queues_of(app))
        promoter = Promoter(self._leadership, link, self._roster)
        self._waker = Waker(self._leadership, Link(_connection(app, WAIT), metrics, quiet=True), self._roster, promoter)
        self._roster.on_new = promoter.look_again
        planner, inspector = Planner(settings.prefix), Inspector(settings.prefix, result_ttl=settings.result_ttl)
        self._ticker = Ticker(self._leadership, link, planner, source, declared, inspector, app.sealer())
        self._services = [
            Service("tick", self._tick),
            self._leadership.service,
            self._roster.service,
            promoter.service,
            self._waker.service,
            self._ticker.declaring,
            self._ticker.service,
            self._ticker.tracer,
            Unparker(self._leadership, link, self._roster).service,
            Recoverer(self._leadership, link, self._roster, settings).service,
            Pruner(self._leadership, link, self._roster, settings).service,
        ]

    async def run(self) -> None:
        """Until a signal, or until the supervisor has gone."""
        started = time.monotonic()
        self._signals()
        await self._services[0].start()
        try:
            await self._agree()
        except FastQError:
            await self._commands.close()
            raise
        for service in () if self._ended.is_set() else self._services[1:]:
            await service.start()
        await self._ended.wait()
        self._slot.state = SlotState.DRAINING
        # The blocking pop is not waited for. A token on its way to it is no loss: who leads next looks at every queue first.
        await asyncio.gather(self._waker.service.stop(0), *(service.stop(STOP_GRACE) for service in self._services))
        await self._leadership.give_up()
        await self._commands.close()
        await self._waker.close()
        log.info("scheduler stopped", extra=fields(seconds=round(time.monotonic() - started, 1)))

    async def _agree(self) -> None:
        """Before anything is touched; where Redis is away, whoever watches sees that this process lives."""
        while not self._ended.is_set():
            try:
                await self._commands.run(agree(self._prefix))
                return
            except BrokerUnavailable as error:
                await asyncio.sleep(self._link.outage(error))

    async def _tick(self) -> float:
        self._slot.ticked_at = time.monotonic()
        if self._leadership.answered and self._slot.state is SlotState.BOOTED:
            self._slot.state = SlotState.RUNNING  # also as a standby
        if self._orphaned():
            self._end("supervisor gone")
        return TICK

    def _signals(self) -> None:
        loop = asyncio.get_running_loop()
        ends = [signal.SIGTERM, signal.SIGQUIT]
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # alone: Ctrl-C is ours
            ends.append(signal.SIGINT)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # alone, and not under nohup
            ends.append(signal.SIGHUP)
        for number in ends:
            loop.add_signal_handler(number, self._end, number.name)
        loop.add_signal_handler(signal.SIGUSR2, self._dump)

    def _end(self, reason: str) -> None:
        if not self._ended.is_set():
            log.info("scheduler stopping", extra=fields(reason=reason))
            self._ended.set()

    def _dump(self) -> None:
        """What it does and what it will fire next."""
        said = fields(leading=self._leadership.leading, queues=sorted(self._roster.queues), services=self._services)
        log.info("scheduler state", extra=said)
        for name, due in self._ticker.upcoming:
            log.info("next tick", extra=fields(schedule=name, at=shown(due)))


def _connection(app: FastQ, longest_wait: float = 0.0) -> AsyncConnection:
    settings = app.settings
    return AsyncConnection.to(
        app.endpoint(),
        connect_timeout=settings.connect_timeout,
        response_timeout=settings.response_timeout + longest_wait,
    )
