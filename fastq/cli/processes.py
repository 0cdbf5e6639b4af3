"""The processes behind ``fastq dev|supervise|worker|scheduler``: who is started with what."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastq import logs
from fastq.app import FastQ
from fastq.board import Board
from fastq.config import Loaded
from fastq.errors import ConfigError, ExitCode
from fastq.launch import ALL_QUEUES, Asking, ImportFailed, Launch
from fastq.monitor import check_exposure

if TYPE_CHECKING:
    from fastq.supervisor import ChildSpec

__all__ = ["dev", "scheduler", "supervise", "worker"]

log = logging.getLogger("fastq.supervisor")

SPARE_SLOTS = 16
"""Places on the board beyond twice the workers: TTIN adds workers, and a dead one keeps its place for a moment."""

DEFAULT_PORT = 6_379
"""Redis's own port: when it is free, `fastq dev` serves there, and other terminals find it without being told."""

FOLDER = Path(".fastq")
"""What `fastq dev` keeps: the data of its server."""


def specs(launch: Launch) -> list[ChildSpec]:
    """What a supervisor runs."""
    from fastq.supervisor import ChildSpec  # a worker alone starts without it

    return [
        ChildSpec(
            role="worker",
            entry="fastq.worker.process:main",
            count=launch.settings.workers,
            settings=launch,
            takes_jobs=True,
        ),
        ChildSpec(role="scheduler", entry="fastq.scheduler.process:main", settings=launch),
        ChildSpec(role="monitor", entry="fastq.monitor:main", settings=launch, stop_last=True),
    ]


class _Reload:
    """New specs for a running supervisor, which goes on while the application is asked."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking

    def poll(self) -> list[ChildSpec] | None:
        launch = self._asking.poll()
        return None if launch is None else specs(launch)

    def close(self) -> None:
        self._asking.close()


def supervise(ask: Callable[[], Asking]) -> int:
    """Run until told to stop. ``ask`` begins to read the settings, at the start and at each HUP."""
    from fastq.supervisor import Supervisor

    try:
        launch = ask().wait()
    except ImportFailed:
        return ExitCode.USAGE  # why has been said
    settings = launch.settings
    check_exposure(settings)
    logs.setup(settings.log_level, settings.log_format)
    if os.geteuid() == 0:
        log.warning("running as root", extra=logs.fields(fix="run it as a user of its own: User= in the systemd unit"))
    board = Board(2 * settings.workers + SPARE_SLOTS)
    paths = [_watched(launch.app)] if settings.reload else []
    return Supervisor(
        specs(launch),
        board,
        grace=settings.grace,
        reload=lambda: _Reload(ask()),
        reload_paths=paths,
        pidfile=settings.pidfile,
    ).run()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _watched(app: str) -> Path:
    """The folder whose sources are watched: that of the file, else the working directory."""
    name = app.partition(":")[0]
    return Path(name).resolve().parent if name.endswith(".py") else Path.cwd()


def worker(launch: Launch) -> int:
    """One worker, with the monitor's work done by a thread of its own."""
    from fastq.monitor import keep_in_thread
    from fastq.worker.process import run_alone

    logs.setup(launch.settings.log_level, launch.settings.log_format)

    def keep(loaded: FastQ, board: Board) -> None:
        keep_in_thread(board, loaded.settings, loaded.endpoint())

    return run_alone(launch, keep)


def scheduler(launch: Launch) -> int:
    """The scheduler alone."""
    from fastq.scheduler.process import run_alone

    logs.setup(launch.settings.log_level, launch.settings.log_format, background=True)
    return run_alone(launch)


def dev(loaded: Loaded, ask: Callable[..., Asking]) -> int:
    """Everything for development. ``ask(**settings)`` reads the settings with these as options, too."""
    from fastq.broker.embedded import EmbeddedServer
    from fastq.supervisor.host import PidFile, PidFileHeld

    ours: dict[str, Any] = {"workers": 1, "reload": True}
    if loaded.origins["queues"] == "default":
        ours["queues"] = ALL_QUEUES
    if loaded.origins["log_level"] == "default":
        ours["log_level"] = "debug"  # a line per job
    if loaded.origins["url"] != "default":
        return supervise(lambda: ask(**ours))
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    lock = PidFile(os.fspath(FOLDER / "pid"))
    try:
        lock.acquire()  # two servers must not write into one folder
    except ConfigError as error:
        click.echo(f"fastq: {error}", err=True)
        return ExitCode.PIDFILE if isinstance(error, PidFileHeld) else ExitCode.USAGE
    try:
        port = DEFAULT_PORT if _is_free(DEFAULT_PORT) else 0
        with EmbeddedServer(data_dir=FOLDER / "redis", appendonly=True, port=port) as server:
            click.echo(f"Redis for development on {server.url}, its data in {FOLDER}/", err=True)
            if not port:
                click.echo(
                    f"Port {DEFAULT_PORT} is taken; in other terminals: export FASTQ_REDIS_URL='{server.url}'", err=True
                )
            return supervise(lambda: ask(**ours, url=server.url))
    finally:
        lock.release()
