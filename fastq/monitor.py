"""The host's keeper: extends the leases of live workers, hands a dead worker's jobs back, ends hung ones, serves health.

A lease is about life, not about run time: the monitor sees on the board that a worker lives, so a handler that blocks
its worker's event loop for minutes keeps its jobs, and a killed worker's jobs are ready again within milliseconds.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fastq import logs
from fastq.board import Board, ChildContext, Slot, SlotState, exit_text
from fastq.broker.command import Command, raw
from fastq.broker.commands import extend, recover
from fastq.broker.connection import SyncConnection
from fastq.broker.keys import GlobalKeys, QueueKeys
from fastq.broker.url import Endpoint, parse_url
from fastq.config import Settings
from fastq.errors import BrokerError, ConfigError, ExitCode
from fastq.exposition import CONTENT_TYPE, Exposition, QueueGauge
from fastq.job import ErrorInfo, culprits, encode
from fastq.launch import Launch
from fastq.logs import fields
from fastq.metrics import WorkerMetrics
from fastq.partitions import parse_partitions, served
from fastq.values import parse_queues

__all__ = ["Keeper", "main", "serve_http"]

log = logging.getLogger("fastq.monitor")

READY_WITHIN = 10.0
"""Seconds within which a worker must have reserved for the host to count as ready."""

_SERVING = (SlotState.RUNNING, SlotState.QUIET, SlotState.DRAINING)
ABORT_GRACE = 1.0

SECOND_LOOK = 0.5
"""Seconds that workers are given for a sign of life when the monitor itself stood still: five of their ticks."""


# -- leases ---------------------------------------------------------------------------------


class Keeper:
    """Leases and deaths of the workers of one board.

    Args:
        board: the workers.
        settings: queues, lease, hang_timeout, max_deliveries, dead_max.
        endpoint: where Redis is.
        metrics: where deaths and recoveries are counted.
        pace: seconds between two looks.
    """

    def __init__(
        self, board: Board, settings: Settings, endpoint: Endpoint, metrics: WorkerMetrics, pace: float = 0.25
    ) -> None:
        self._pace = pace
        self._board = board
        self._settings = settings
        self._metrics = metrics
        self._keys: dict[str, QueueKeys] = {}
        self._serve(())
        # An answer that takes longer than a third of a lease is too late: better to connect anew in time.
        patience = min(settings.response_timeout, max(settings.lease / 3, 0.5))
        self._connection = SyncConnection.to(endpoint, connect_timeout=patience, response_timeout=patience)
        self._extend_at = 0.0
        self._retry_at = 0.0
        self.troubled = False  # Redis did not answer the last time
        self._examined = False
        self._aborted: dict[int, float] = {}  # pid -> when it was sent SIGABRT
        self._looked_at = time.monotonic()  # for hung workers
        self._extended: tuple[str, ...] = ()

    def step(self) -> float:
        """Do what is due. Returns seconds until the next look."""
        now = time.monotonic()
        self._end_hung(now)
        if now < self._retry_at:
            return self._retry_at - now
        try:
            self._examine()
            for slot in self._board:
                if slot.state is SlotState.DEAD:
                    self._hand_back(slot)
            self._extend(now)
        except BrokerError as error:
            self._retry_at = now + 0.5
            if not self.troubled:
                log.warning("redis unavailable, retrying", extra=fields(error=str(error)))
            self.troubled = True
            self._metrics.count("redis_errors")
            return max(self._retry_at - time.monotonic(), 0.0)  # what was spent on waiting for an answer counts
        if self.troubled:
            self.troubled = False
            log.info("redis is back")
        return 0.05 if self._starting() else self._pace

    def _examine(self) -> None:
        """Once per host: say what may cost jobs on this server, with the line to change."""
        if self._examined:
            return
        from fastq.broker.doctor import startup_warnings

        for warning in self._connection.run(startup_warnings(self._settings.prefix, self._connection.endpoint)):
            log.warning("redis may lose jobs", extra=fields(fix=warning))
        self._examined = True

    @property
    def _queues(self) -> list[QueueKeys]:
        return list(self._keys.values())

    def _look_for_partitions(self) -> None:
        """The code that splits queues is not known here; workers announce what they serve. What was seen once stays.

        The list may be on a node of a cluster that is away: the leases on the others go on.
        """
        try:
            listed: list[bytes] = self._connection.call(raw("SMEMBERS", GlobalKeys(self._settings.prefix).queues))
        except BrokerError:
            return
        self._serve([name.decode("utf-8", "replace") for name in listed])

    def _serve(self, listed: Sequence[str]) -> None:
        counts = parse_partitions(self._settings.partitions)
        for queue in parse_queues(self._settings.queues).names:
            for name in served(queue, counts.get(queue, 1), listed):
                if name not in self._keys:
                    self._keys[name] = QueueKeys(self._settings.prefix, name)

    def _starting(self) -> bool:
        return any(slot.state in (SlotState.STARTING, SlotState.BOOTED) for slot in self._board)

    def _extend(self, now: float) -> None:
        workers = tuple(slot.worker_id for slot in self._board if self._deserves(slot, now))
        due = now >= self._extend_at or not set(workers) <= set(self._extended)
        if not workers or not due:
            return
        lease_ms = round(self._settings.lease * 1_000)
        self._connection.call_many([extend(q, lease_ms, workers) for q in self._queues])
        self._extended = workers
        self._extend_at = now + self._settings.lease / 3
        self._look_for_partitions()  # for the next time: a worker that registers in one has a whole lease

    def _deserves(self, slot: Slot, now: float) -> bool:
        """A live worker keeps its lease, blocked loop or not, up to the hang timeout."""
        if slot.role != "worker" or not slot.worker_id or slot.state not in _SERVING:
            return False
        return now - slot.ticked_at <= self._settings.hang_timeout

    # -- deaths -----------------------------------------------------------------------------

    def _hand_back(self, slot: Slot) -> None:
        """Make a dead worker's jobs ready again; those that had started are charged a delivery."""
        worker, status = slot.worker_id, slot.exit_status
        clean = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        started = slot.running_ids()
        ready = dead = 0
        if worker:
            self._look_for_partitions()
            charged = self._culprits(started)
            for keys in self._queues:
                more = 1
                while more > 0:
                    recovered = self._connection.call(self._recovery(keys, slot, clean, charged))
                    ready, dead, more = ready + recovered.ready, dead + recovered.dead, recovered.remaining
                if self._connection.call(
                    raw("EXISTS", *keys.ready, decode=int)
                ):  # it may have died with the wake token
                    self._connection.call(raw("RPUSH", keys.wake, "1"))
        self._metrics.count("recovered", ready)
        self._metrics.count("poisoned", dead)
        if not clean:
            self._metrics.count("died")
        if not clean or ready or dead:
            log.log(
                logging.INFO if clean else logging.ERROR,
                "worker died, jobs handed back",
                extra=fields(
                    worker=worker, pid=slot.pid, end=exit_text(status), rss=slot.rss, ready=ready, dead=dead,
                    started=started[:5],
                ),
            )  # fmt: skip
        self._aborted.pop(slot.pid, None)
        slot.free()

    def _culprits(self, started: list[str]) -> list[str]:
        """Whom to charge of those that had started."""
        if not started:
            return started
        counts = self._connection.call_many([raw("HMGET", keys.deliveries, *started) for keys in self._queues])
        deaths = [max(int(n or 0) for n in found) for found in zip(*counts, strict=True)]
        return culprits(started, deaths, self._settings.max_deliveries)

    def _recovery(self, keys: QueueKeys, slot: Slot, clean: bool, started: list[str]) -> Command[Any]:
        most = self._settings.max_deliveries
        how = exit_text(slot.exit_status)
        if slot.pid in self._aborted:
            how += f" (its event loop stood still for hang_timeout={self._settings.hang_timeout:g} s)"
        message = f"its worker died {most} times while it ran; the last one ended by {how} with {slot.rss >> 20} MiB"
        now_ms = self._connection.clock.now_ms()
        error = ErrorInfo("poison", "WorkerDied", message, "", 0, now_ms, socket.gethostname())
        return recover(
            keys, slot.worker_id, expired=False, charge="none" if clean else "started", started=started,
            max_deliveries=most, dead_max=self._settings.dead_max, error=encode(error),
        )  # fmt: skip

    def _end_hung(self, now: float) -> None:
        """A loop without a sign of life for hang_timeout: SIGABRT (its stacks go to stderr), then SIGKILL."""
        if now - self._looked_at > self._settings.hang_timeout / 2:
            time.sleep(SECOND_LOOK)  # a paused container, a frozen host: everybody was silent, and nobody hangs
        self._looked_at = now = time.monotonic()
        for slot in self._board:
            if slot.role != "worker" or slot.state not in _SERVING or not slot.pid:
                continue
            silent = now - slot.ticked_at
            if silent <= self._settings.hang_timeout:
                continue
            aborted = self._aborted.get(slot.pid)
            if aborted is None:
                self._aborted[slot.pid] = now
                self._metrics.count("killed")
                log.error(
                    "worker hangs, killing it",
                    extra=fields(
                        worker=slot.worker_id, pid=slot.pid, seconds=round(silent, 1), jobs=slot.running_ids()[:5]
                    ),
                )
                _signal(slot.pid, signal.SIGABRT)
            elif now - aborted > ABORT_GRACE:
                _signal(slot.pid, signal.SIGKILL)

    def orphaned(self) -> None:
        """The supervisor is gone and its workers die with it: hand their jobs back, without waiting long."""
        deadline = time.monotonic() + 3.0
        left = [slot for slot in self._board if slot.role == "worker" and (slot.alive or slot.state is SlotState.DEAD)]
        while left and time.monotonic() < deadline:
            for slot in [slot for slot in left if not _exists(slot.pid)]:
                slot.state = SlotState.DEAD
                slot.exit_status = slot.exit_status or signal.SIGKILL
                left.remove(slot)
            self.step()
            time.sleep(0.01)
        self.step()


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it ended meanwhile; the supervisor will say so on the board


def _exists(pid: int) -> bool:
    """Whether the process lives; one that nobody has reaped yet (a zombie) does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] != b"Z"
    except ProcessLookupError:
        return False
    except OSError:
        return not os.path.isdir("/proc/self")


# -- HTTP ---------------------------------------------------------------------------------------


class QueueReader:
    """Reads the gauges of the configured queues, for scrapes."""

    def __init__(self, settings: Settings, endpoint: Endpoint) -> None:
        from fastq.broker.inspector import Inspector

        self._inspector = Inspector(settings.prefix)
        self._names = parse_queues(settings.queues).names
        self._connection = SyncConnection.to(endpoint, connect_timeout=2.0, response_timeout=2.0)

    def __call__(self) -> list[QueueGauge]:
        return [gauge for name in self._names if (gauge := self._read(name)) is not None]

    def _read(self, name: str) -> QueueGauge | None:
        info = self._connection.run(self._inspector.queue(name))
        if info is None:
            return None
        age = info.oldest_age or 0.0
        return QueueGauge(name, info.pending, info.scheduled, info.parked, info.running, info.dead, age, info.paused)


def healthy(board: Iterable[Slot], *, redis_away: bool = False) -> tuple[bool, str]:
    """Whether this host's workers work: (ready, why not).

    A worker whose slots are all taken has no reason to reserve; for it the monitor's own contact with Redis counts.
    """
    workers = [slot for slot in board if slot.role == "worker" and slot.alive]
    if not workers:
        return False, "no worker lives"
    if all(slot.state in (SlotState.DRAINING, SlotState.QUIET) for slot in workers):
        return False, "draining"
    oldest = time.monotonic() - READY_WITHIN
    for slot in workers:
        full = slot.busy >= slot.concurrency and slot.ticked_at > oldest and not redis_away
        if slot.state is SlotState.RUNNING and (slot.reserved_at > oldest or full):
            return True, "ok"
    return False, f"no worker has reserved within {READY_WITHIN:g} s"


def check_exposure(settings: Settings) -> None:
    """Refuse to serve metrics to others without authentication.

    Raises:
        ConfigError: ``metrics_host`` is not this host's own, and there is no ``metrics_token``.
    """
    if settings.metrics_port and not _loopback(settings.metrics_host) and not settings.metrics_token:
        raise ConfigError(
            f"metrics_host={settings.metrics_host} can be reached from outside and has no authentication: "
            "set metrics_token (FASTQ_METRICS_TOKEN), or serve on 127.0.0.1"
        )


def serve_http(
    board: Board,
    settings: Settings,
    endpoint: Endpoint,
    last_step: Callable[[], float],
    redis_away: Callable[[], bool] = lambda: False,
) -> None:
    """Serve /metrics, /healthz, /livez and /readyz in a daemon thread, unless ``metrics_port`` is 0.

    Raises:
        ConfigError: an address that is not this host's own, without a token.
    """
    check_exposure(settings)
    if not settings.metrics_port:
        return
    bound = {
        "exposition": Exposition(board, QueueReader(settings, endpoint)),
        "board": board,
        "token": settings.metrics_token.encode(),
        "last_step": (last_step,),
        "redis_away": (redis_away,),
    }
    handler = type("_BoundHandler", (_Handler,), bound)
    try:
        server = _Server((settings.metrics_host, settings.metrics_port), handler)
    except OSError as error:
        where = f"{settings.metrics_host}:{settings.metrics_port}"
        log.warning("metrics cannot be served", extra=fields(address=where, error=error.strerror or str(error)))
        return
    threading.Thread(target=server.serve_forever, name="fastq-http", daemon=True).start()
    log.info("metrics served", extra=fields(address=f"{settings.metrics_host}:{settings.metrics_port}"))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 16
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6  # the socket is made of it in the next line
        super().__init__(address, handler)


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD; a subclass binds it to its monitor."""

    exposition: Exposition
    board: Board
    token: bytes
    last_step: tuple[Callable[[], float]]  # a tuple: a bare function would become a method
    redis_away: tuple[Callable[[], bool]]

    timeout = 5
    server_version = "fastq"
    sys_version = ""

    def do_GET(self) -> None:
        """The four pages."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._metrics()
        elif path in ("/healthz", "/livez"):
            alive = time.monotonic() - self.last_step[0]() < READY_WITHIN
            self._answer(200 if alive else 503, b"ok\n" if alive else b"the monitor does not move\n")
        elif path == "/readyz":
            ready, why = healthy(self.board, redis_away=self.redis_away[0]())
            self._answer(200 if ready else 503, f"{why}\n".encode())
        else:
            self._answer(404, b"not found: /metrics, /healthz, /livez, /readyz\n")

    do_HEAD = do_GET  # noqa: N815 - the base class's naming

    def _metrics(self) -> None:
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and hmac.compare_digest(given.encode("utf-8", "replace"), self.token)
        if self.token and not known:
            self._answer(401, b"a bearer token is needed\n")
            return
        self._answer(200, self.exposition.render(), CONTENT_TYPE)

    def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """At level debug: probes come every few seconds."""
        log.debug("http", extra=fields(client=self.client_address[0], request=format % args))


# -- the process ------------------------------------------------------------------------------------


def main(context: ChildContext) -> int:
    """The monitor under a supervisor: until it is told to stop, or until the supervisor is gone."""
    launch: Launch = context.settings
    settings = launch.settings
    logs.setup(settings.log_level, settings.log_format)
    told, wake = _take_signals()
    endpoint = parse_url(settings.url)
    slot = context.slot
    keeper = Keeper(context.board, settings, endpoint, WorkerMetrics(slot))
    try:
        serve_http(context.board, settings, endpoint, lambda: slot.ticked_at, lambda: keeper.troubled)
    except ConfigError as error:
        log.error("monitor cannot work", extra=fields(error=str(error)))
        return ExitCode.USAGE
    slot.state = SlotState.RUNNING
    while not told:
        slot.ticked_at = time.monotonic()
        pause = keeper.step()
        readable = select.select([context.control_fd, wake], [], [], pause)[0]
        if context.control_fd in readable and not os.read(context.control_fd, 4_096):
            log.error("supervisor is gone, handing jobs back")
            keeper.orphaned()
            return ExitCode.CRASH
    keeper.step()
    return ExitCode.OK


def _take_signals() -> tuple[list[int], int]:
    """A list that TERM and QUIT append to, and a descriptor that becomes readable when they do."""
    told: list[int] = []

    def tell(number: int, _frame: object) -> None:
        told.append(number)

    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, tell)
    return told, reading


def keep_in_thread(board: Board, settings: Settings, endpoint: Endpoint) -> None:
    """The keeper and the health server of a worker that runs alone, as a daemon thread.

    It extends the lease through a handler that blocks the loop in Python; C code that holds the GIL stops it too.
    """
    pace = min(1.0, settings.lease / 6)  # its only worker dies with it: there is nothing else to see than the lease
    keeper = Keeper(board, settings, endpoint, WorkerMetrics(board[0]), pace)
    stepped = [time.monotonic()]

    def run() -> None:
        while True:
            pause = keeper.step()
            stepped[0] = time.monotonic()
            time.sleep(pause)

    serve_http(board, settings, endpoint, lambda: stepped[0], lambda: keeper.troubled)
    threading.Thread(target=run, name="fastq-keeper", daemon=True).start()
