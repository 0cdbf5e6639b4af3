"""What the verbs share: settings, one blocking connection, and an answer in text or JSON.

A verb pays only for what it uses: settings are read, and Redis is dialled, when they are first asked for.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
import msgspec

from fastq.errors import ConfigError, FastQError, did_you_mean
from fastq.partitions import parse_partitions

if TYPE_CHECKING:
    from fastq.broker.command import Operation
    from fastq.broker.connection import SyncConnection
    from fastq.broker.inspector import Inspector
    from fastq.config import Loaded, Settings

__all__ = ["NotFound", "Session", "confirmed", "with_session", "with_text_session"]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class NotFound(FastQError):
    """What was named does not exist (exit status 1)."""


class Session:
    """One call of a verb.

    Args:
        arguments: settings given as options; None: not given.
        file: the settings file (``--config``).
        as_json: answer in JSON.
    """

    def __init__(self, arguments: dict[str, Any], file: str | None, *, as_json: bool) -> None:
        self._arguments = arguments
        self._file = file
        self.as_json = as_json
        self._agreed = False

    @functools.cached_property
    def loaded(self) -> Loaded:
        """The settings in force and their origins; what looks like a mistake is said on stderr."""
        from fastq.config import load

        loaded = load(arguments=self._arguments, file=Path(self._file) if self._file else None)
        for warning in loaded.warnings:
            click.echo(f"fastq: {warning}", err=True)
        return loaded

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self.loaded.settings

    @functools.cached_property
    def connection(self) -> SyncConnection:
        """The connection, not yet open."""
        from fastq.broker.connection import SyncConnection
        from fastq.broker.url import parse_url

        settings = self.settings
        if settings.url.startswith("memory://"):
            raise ConfigError("memory:// is the private server of another process: name a server with --redis-url")
        return SyncConnection.to(
            parse_url(settings.url),
            connect_timeout=settings.connect_timeout,
            response_timeout=settings.response_timeout,
        )

    @functools.cached_property
    def inspector(self) -> Inspector:
        """The operations."""
        from fastq.broker.inspector import Inspector

        settings = self.settings
        return Inspector(
            settings.prefix, result_ttl=settings.result_ttl, partitions=parse_partitions(settings.partitions)
        )

    def run(self, operation: Operation[T]) -> T:
        """Drive an operation.

        Raises:
            SchemaMismatch: this Redis was written by a release that this one does not know.
        """
        self.agree()
        return self.connection.run(operation)

    def agree(self) -> None:
        """Look, once, whether this release knows what it will touch. Raises as :meth:`run`."""
        if not self._agreed:
            from fastq.broker.schema import look

            self.connection.run(look(self.settings.prefix))
            self._agreed = True

    def known_queue(self, name: str) -> str:
        """The name itself.

        Raises:
            NotFound: nobody ever used a queue of this name.
        """
        if self.run(self.inspector.queue(name)) is None:
            names = self.run(self.inspector.queues())
            raise NotFound(f"no queue {name!r}{did_you_mean(name, names)}")
        return name

    def answer(self, value: Any, lines: Iterable[str]) -> None:
        """Print ``value`` as JSON, or the lines that say the same to people."""
        if self.as_json:
            click.echo(as_json(value))
            return
        for line in lines:
            click.echo(line)

    def close(self) -> None:
        """Close the connection, if there is one."""
        if "connection" in self.__dict__:
            self.connection.close()


def as_json(value: Any) -> bytes:
    """One line of JSON: bytes as base64, whatever JSON does not know as its repr."""
    try:
        return msgspec.json.encode(value, enc_hook=repr)
    except Exception:  # noqa: BLE001 - keys of a handler's result, say, that JSON has no form for
        return msgspec.json.encode(_plain(msgspec.to_builtins(value, builtin_types=(bytes,), enc_hook=repr)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


REDIS: list[Callable[[Any], Any]] = [
    click.option("--redis-url", metavar="URL", help="Where Redis is (FASTQ_REDIS_URL)."),
    click.option("--prefix", metavar="TEXT", help="The first part of every key (FASTQ_PREFIX)."),
    click.option("--config", "config_file", metavar="FILE", help="A settings file in place of ./fastq.toml."),
]
JSON: list[Callable[[Any], Any]] = [click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")]


def with_session(verb: F) -> F:
    """Give a verb the options that all have, and a :class:`Session` as its first argument."""
    return _with(verb, [*REDIS, *JSON])


def with_text_session(verb: F) -> F:
    """The same without ``--json``, for a verb to which that means something else."""
    return _with(verb, REDIS)


def _with(verb: F, options: list[Callable[[Any], Any]]) -> F:
    @functools.wraps(verb)
    def command(
        *args: Any,
        redis_url: str | None,
        prefix: str | None,
        config_file: str | None,
        as_json: bool = False,
        **rest: Any,
    ) -> Any:
        session = Session({"url": redis_url, "prefix": prefix}, config_file, as_json=as_json)
        try:
            return verb(session, *args, **rest)
        finally:
            session.close()

    made: Any = command
    for option in reversed(options):
        made = option(made)
    return cast(F, made)


def confirmed(question: str, *, yes: bool) -> None:
    """Go on only if the operator means it.

    Raises:
        click.UsageError: nobody is there to be asked, and ``--yes`` was not given.
        click.Abort: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Give --yes", click.get_current_context())
    click.confirm(question, abort=True, err=True)
