"""``fastq dev|supervise|worker|scheduler``: options into settings, then :mod:`fastq.cli.processes`.

An option is a setting of the same name; it wins over environment and file. The metrics token has no option: the list of
processes shows every option to every user of the host.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastq.errors import ConfigError, FastQError

if TYPE_CHECKING:
    from fastq.app import FastQ
    from fastq.config import Loaded, Settings
    from fastq.launch import Asking, Launch

__all__ = ["APP", "application", "verbs"]

F = TypeVar("F", bound=Callable[..., Any])

APP = click.argument("app", metavar="[APP]", envvar="FASTQ_APP", default="")

REDIS = {
    "--redis-url": "Where Redis is (FASTQ_REDIS_URL).",
    "--prefix": "The first part of every key.",
}
WORKER = {
    "--concurrency -c": "Jobs that one worker runs at the same time.",
    "--queues -q": "critical,default in strict order, or critical=6,default=3 by weight.",
    "--threads": "Threads for handlers that are not async.",
    "--grace": "How long a stopping worker waits for its jobs: 25s.",
    "--lease": "How long a vanished host keeps its jobs: 15s.",
    "--hang-timeout": "Kill a worker whose loop is blocked for longer: 60s.",
    "--max-jobs": "Replace a worker after so many jobs.",
    "--max-rss": "Replace a worker that holds more memory: 512MB.",
    "--metrics-host": "The address of /metrics, /healthz, /readyz.",
    "--metrics-port": "Their port; 0 = off.",
}
LOGS = {
    "--log-level -l": "debug, info, warning, error or critical.",
    "--log-format": "auto, text or json.",
}
NAMES = {"--redis-url": "url"}


def _options(*tables: dict[str, str], reload: bool = False) -> Callable[[F], F]:
    """These options, each the setting of its name; values are read by the rules of the settings."""

    def decorate(verb: F) -> F:
        made = [
            click.option(
                *flags.split(), NAMES.get(flags, flags.split()[0][2:].replace("-", "_")), metavar="VALUE", help=text
            )
            for table in tables
            for flags, text in table.items()
        ]
        if reload:
            made.append(
                click.option("--reload", is_flag=True, default=None, help="Restart workers when a file changes.")
            )
        made.append(
            click.option("--config", "config_file", metavar="FILE", help="A settings file in place of ./fastq.toml.")
        )
        for option in reversed(made):
            verb = option(verb)
        return verb

    return decorate


def _load(options: dict[str, Any]) -> Loaded:
    """The settings of a process; what looks like a mistake is said on stderr."""
    from fastq.config import load

    file = options.pop("config_file")
    loaded = load(arguments=options, file=Path(file) if file else None)
    for warning in loaded.warnings:
        click.echo(f"fastq: {warning}", err=True)
    return loaded


def _asking(app: str, options: dict[str, Any]) -> Callable[[], Asking]:
    """What the processes are started with, asked for anew at each call; the options are checked at once."""
    from fastq.launch import ALL_QUEUES, Asking

    _load(options | ({"queues": None} if options.get("queues") == ALL_QUEUES else {}))
    file = options.pop("config_file")
    return lambda: Asking(app, options, Path(file) if file else None)


def _planned(app: str, options: dict[str, Any]) -> Launch:
    from fastq.launch import ImportFailed

    try:
        return _asking(app, options)().wait()
    except ImportFailed:
        raise click.exceptions.Exit(2) from None  # why has been said


def application(settings: Settings, app: str) -> FastQ:
    """The application, for verbs that need its code.

    Raises:
        FastQError: it is not there. What its own modules raise is shown with their own frames, and ends the verb.
    """
    from fastq.launch import Launch, load_app, report

    try:
        return load_app(Launch(settings, app))
    except FastQError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the modules of an application raise
        report(error, app)
        raise click.exceptions.Exit(2) from None


@click.command()
@APP
@_options(
    REDIS,
    {"--workers -w": "Worker processes."},
    WORKER,
    LOGS,
    {"--pidfile": "Where the process id is written."},
    reload=True,
)
def supervise(app: str, **options: Any) -> int:
    """Run workers, a scheduler and a monitor on this host.

    APP is package.module:app (FASTQ_APP); without it, installed libraries bring the tasks. TERM and Ctrl-C drain, a second
    Ctrl-C and QUIT stop now, HUP restarts the workers one by one, TSTP and CONT quiet and resume, TTIN and TTOU add and
    remove a worker, USR2 dumps what runs.
    """
    from fastq.cli import processes

    return processes.supervise(_asking(app, options))


@click.command()
@APP
@_options(REDIS, WORKER, LOGS)
def worker(app: str, **options: Any) -> int:
    """Run one worker process, without a supervisor.

    For containers that are restarted from outside. A scheduler must run somewhere, too. TERM and the first Ctrl-C drain.
    """
    from fastq.cli import processes

    return processes.worker(_planned(app, options))


@click.command()
@APP
@_options(REDIS, {"--queues -q": "Whose scheduled jobs and lost leases it looks after."}, LOGS)
def scheduler(app: str, **options: Any) -> int:
    """Run the scheduler alone.

    It makes due jobs and retries ready, fires cron and intervals, and hands back the jobs of lost workers. Any number may
    run; one leads.
    """
    from fastq.cli import processes

    return processes.scheduler(_planned(app, options))


@click.command()
@APP
@_options({"--redis-url": "A server of yours in place of the embedded one."}, WORKER, LOGS)
def dev(app: str, **options: Any) -> int:
    """Everything for development in one command, Redis included.

    A private server whose data stay in .fastq/, one worker, a scheduler, a monitor; they restart when a file changes. APP may
    be a file: fastq dev app.py.
    """
    from fastq.cli import processes

    if not app:
        raise ConfigError("no application was named: fastq dev app.py, or set FASTQ_APP")
    return processes.dev(_load(dict(options)), lambda **more: _asking(app, {**options, **more})())


verbs = {"supervise": supervise, "worker": worker, "scheduler": scheduler, "dev": dev}
