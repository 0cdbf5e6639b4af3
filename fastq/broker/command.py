"""What is sent to Redis and how its reply is read, and several of them with decisions in between."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Command", "Operation", "Packed", "Waiter", "as_is", "raw"]

T = TypeVar("T")


class Command(Generic[T]):
    """What to send and how to read the reply.

    ``script`` is a script's name, or ``None`` for a plain Redis command whose words are ``args``.
    """

    __slots__ = ("args", "decode", "keys", "script")

    def __init__(
        self, script: str | None, keys: Sequence[bytes], args: Sequence[Any], decode: Callable[[Any], T]
    ) -> None:
        self.script = script
        self.keys = keys
        self.args = args
        self.decode = decode


class Packed(Command[T]):
    """A command whose bytes are there already. Its words are asked for where they are looked at, and when Redis has not got its script."""

    __slots__ = ("_words", "packed")

    def __init__(
        self,
        script: str | None,
        keys: Sequence[bytes],
        words: Callable[[], Sequence[Any]],
        decode: Callable[[Any], T],
        packed: bytes,
    ) -> None:
        self.script = script
        self.keys = keys
        self.decode = decode
        self.packed = packed
        self._words = words

    @property
    def args(self) -> Sequence[Any]:  # type: ignore[override]  # as all commands, it is made once and read
        """As of any command."""
        return self._words()


class Waiter(Protocol):
    """What waits for a reply: a future, or what is told about it as one is, without a turn of the event loop in between."""

    def done(self) -> bool:
        """Whether it does not want the reply any more."""
        ...

    def set_result(self, reply: Any, /) -> None:
        """The reply is here; an error reply is a value."""
        ...

    def set_exception(self, error: Exception, /) -> None:
        """The connection is gone: the command may or may not have run."""
        ...

    def exception(self) -> object:
        """Called after ``set_exception``, so that a future whose caller went away leaves no warning."""
        ...


Operation = Generator[Command[Any] | list[Command[Any]], Any, T]
"""Several commands with decisions between them, as a generator: it yields a command, or a list of them for one round
trip, is sent the decoded reply (or a list of them) and returns its result. An error reply is raised at the ``yield``.
Both movers ``run`` it, so what spans several round trips is written once too."""


def as_is(reply: Any) -> Any:
    """A reply whose decoded form is itself."""
    return reply


def raw(*words: Any, decode: Callable[[Any], T] = as_is) -> Command[T]:
    """A plain Redis command.

    >>> raw("LLEN", "fastq:{default}:ready:5").args
    ('LLEN', 'fastq:{default}:ready:5')
    """
    return Command(None, (), words, decode)
