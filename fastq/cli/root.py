"""The list of verbs, and what becomes of an error: one line on stderr and an exit status (``errors.ExitCode``)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import click

from fastq.errors import (
    BrokerUnavailable,
    ConfigError,
    EnqueueError,
    ExitCode,
    FastQError,
    JobIdReused,
    MissingExtra,
    SchemaMismatch,
    did_you_mean,
    safe_text,
)

__all__ = ["root", "run"]

INTERRUPTED = 130
"""What a shell says of a process that Ctrl-C has ended."""

COMPLETE = "_FASTQ_COMPLETE"
"""Set by the shell's completion script (`_FASTQ_COMPLETE=bash_source fastq` prints it)."""

Commands = Mapping[str, click.Command]


def _processes() -> Commands:
    from fastq.cli.serve import verbs

    return verbs


def _status() -> Commands:
    from fastq.cli.status import verbs

    return verbs


def _top() -> Commands:
    from fastq.cli.top import verbs

    return verbs


def _jobs() -> Commands:
    from fastq.cli.jobs import verbs

    return verbs


def _enqueue() -> Commands:
    from fastq.cli.enqueue import verbs

    return verbs


def _queues() -> Commands:
    from fastq.cli.queues import verbs

    return verbs


def _dlq() -> Commands:
    from fastq.cli.dlq import verbs

    return verbs


def _cron() -> Commands:
    from fastq.cli.cron import verbs

    return verbs


def _limits() -> Commands:
    from fastq.cli.limits import verbs

    return verbs


def _doctor() -> Commands:
    from fastq.cli.doctor import verbs

    return verbs


def _check() -> Commands:
    from fastq.cli.check import verbs

    return verbs


def _batch() -> Commands:
    from fastq.cli.batch import verbs

    return verbs


def _workflow() -> Commands:
    from fastq.cli.workflow import verbs

    return verbs


class Verb(NamedTuple):
    """What `fastq --help` says of a verb, and where it is."""

    help: str
    load: Callable[[], Commands]


VERBS: Mapping[str, Mapping[str, Verb]] = {
    "Processes": {
        "dev": Verb("Everything for development in one command, Redis included.", _processes),
        "supervise": Verb("Run workers, a scheduler and a monitor on this host.", _processes),
        "worker": Verb("Run one worker process, without a supervisor.", _processes),
        "scheduler": Verb("Run the scheduler alone.", _processes),
    },
    "Look": {
        "status": Verb("Queues, workers and the scheduler at a glance.", _status),
        "explain": Verb("Say why a job does not run.", _jobs),
        "top": Verb("Queues, workers and the scheduler, live.", _top),
        "doctor": Verb("Find what is wrong with Redis, permissions or the fleet.", _doctor),
        "check": Verb("Look whether every job is in exactly one place, and repair.", _check),
        "version": Verb("The versions of fastq and of what it stands on.", _status),
    },
    "Work": {
        "enqueue": Verb("Enqueue a job by its task's name.", _enqueue),
        "jobs": Verb("List, show, cancel and retry jobs.", _jobs),
        "queues": Verb("List, pause, resume and purge queues.", _queues),
        "limits": Verb("Look at limits, change them, stop everybody for a while.", _limits),
        "dlq": Verb("List, show, replay and purge dead letters.", _dlq),
        "batch": Verb("Say how far a batch is, with a bar that moves; list those under way.", _batch),
        "workflow": Verb("Draw a workflow with the states of its jobs; cancel it, or send it on.", _workflow),
        "cron": Verb("List schedules, and change those in Redis.", _cron),
    },
}


class Verbs(click.Group):
    """A group that alone prints its help, and suggests a verb for a word that is none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise click.UsageError(f"no such command {name!r}{did_you_mean(name, self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)


class Root(Verbs):
    """The group of all verbs: a verb's module is imported when the verb is called, not for the list of verbs."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - see click.Group
        return [name for part in VERBS.values() for name in part]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        verb = next((part[cmd_name] for part in VERBS.values() if cmd_name in part), None)
        return None if verb is None else verb.load()[cmd_name]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        for title, part in VERBS.items():
            with formatter.section(title):
                formatter.write_dl([(name, verb.help) for name, verb in part.items()])


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from fastq import __version__

        click.echo(f"fastq {__version__}")
        ctx.exit()


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
def root() -> None:
    """The job queue that is fast and loses nothing.

    Settings come from options, FASTQ_… variables, ./fastq.toml or [tool.fastq] of ./pyproject.toml; `fastq doctor
    --show-config` prints each with its origin.
    """


def run(arguments: Sequence[str]) -> int:
    """Run one command line. Returns its exit status; whatever went wrong has been said on stderr in one line."""
    try:
        code = _invoke(list(arguments)) or ExitCode.OK
        sys.stdout.flush()
    except click.ClickException as error:
        return _complain(_usage(error), ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        if sys.stderr.isatty():
            click.echo(err=True)  # after the terminal's own ^C
        return INTERRUPTED
    except BrokenPipeError:
        return _closed_pipe()
    except FastQError as error:
        return _complain(str(error), _code(error))
    return int(code)


def _invoke(arguments: list[str]) -> int | None:
    """What ``root.main`` does, but for its newline at Ctrl-C: into a log or a pipe, an interrupt says nothing."""
    if COMPLETE in os.environ:
        root.main(arguments, prog_name="fastq")
    try:
        with root.make_context("fastq", arguments) as context:
            return root.invoke(context)  # type: ignore[no-any-return]  # verbs return an exit status or None
    except click.exceptions.Exit as stop:
        return stop.exit_code


def _usage(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context else "fastq"
    text = error.message
    if isinstance(error, click.NoSuchOption):
        text = f"no such option {error.option_name!r}{_instead(error.option_name, context)}"
    else:
        text = error.format_message()
    text = text[:1].lower() + text[1:].rstrip(".")
    return f"{text} (see {path} --help)"


def _instead(option: str, context: click.Context | None) -> str:
    """What to say behind "no such option"."""
    params = context.command.params if context else []
    for param in params:
        if isinstance(param, click.Argument) and param.name == option.lstrip("-").replace("-", "_"):
            return f": {param.human_readable_name} is an argument, give its value alone"
    return did_you_mean(option, [name for param in params if isinstance(param, click.Option) for name in param.opts])


def _code(error: FastQError) -> ExitCode:
    if isinstance(error, BrokerUnavailable):
        return ExitCode.UNREACHABLE
    if isinstance(error, (ConfigError, EnqueueError, MissingExtra, SchemaMismatch)) and not isinstance(
        error, JobIdReused
    ):
        return ExitCode.USAGE
    return ExitCode.CRASH


def _complain(text: str, code: ExitCode) -> int:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        click.echo(f"fastq: {safe_text(text)}", err=True)
    return code


def _closed_pipe() -> int:
    """Whoever read our output has left (`| head`): leave too, and keep Python from complaining at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.CRASH
