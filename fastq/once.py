"""Once: which jobs count as the same, how long that is so, and what becomes of the second one. Pure.

A unique key is the task's name and a hash of the arguments that were chosen; it lives in the queue of the job
(enqueue_once.lua), and goes with the job in every final state, or with time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec

from fastq.errors import InvalidOption, did_you_mean
from fastq.job import Seconds, seconds

__all__ = ["IDEMPOTENT_TTL", "OnDuplicate", "Unique", "Until", "as_unique", "make_idempotency_key", "unique_key"]

Until = Literal["until_executed", "until_started", "while_running"]
OnDuplicate = Literal["existing", "raise", "replace"]

IDEMPOTENT_TTL = 86_400.0
"""Seconds that an ``idempotency_key`` is remembered when the task does not say."""

_encode = msgspec.msgpack.Encoder(order="deterministic").encode


class Unique(msgspec.Struct, frozen=True):
    """When two jobs of a task count as one, and what the second gets.

    Args:
        until: ``"until_executed"``: while the first is not in a final state; ``"until_started"``: until a worker takes it;
            ``"while_running"``: any number may wait, one at a time runs (an option of a task; the others are parked);
            or seconds: for so long from the first enqueue on, whatever became of the job (a throttle).
        by: names of the arguments that count, or a function of the arguments by name; default: all of them.
        on_duplicate: ``"existing"``: the call returns the handle of the job that is there, ``created`` is False;
            ``"raise"``: :class:`fastq.DuplicateJob`; ``"replace"``: the job that is there gets the new arguments and due
            time, unless a worker has it already. It keeps its id.
        debounce: seconds; each call puts the job off by so long, and the last arguments count. Means ``"until_started"``
            and ``"replace"``.
        at_most: seconds after the first call at which a debounced job runs, however many calls follow.

    Example::

        @app.task(unique=fastq.Unique("until_started", by="user_id", debounce=5, at_most=60))
        async def rebuild_feed(user_id: int, reason: str) -> None: ...
    """

    until: Until | Seconds = "until_executed"
    by: str | Sequence[str] | Callable[[Mapping[str, Any]], Any] | None = None
    on_duplicate: OnDuplicate = "existing"
    debounce: Seconds | None = None
    at_most: Seconds | None = None

    def __post_init__(self) -> None:
        if isinstance(self.until, str):
            if self.until not in get_args(Until):
                known = get_args(Until)
                raise InvalidOption(
                    f"unique={self.until!r:.100} is neither {' nor '.join(known)} nor seconds{did_you_mean(self.until, known)}"
                )
        else:
            seconds("unique", self.until, least=0.001)
        if self.on_duplicate not in get_args(OnDuplicate):
            raise InvalidOption(
                f"on_duplicate={self.on_duplicate!r:.100} is not one of {', '.join(get_args(OnDuplicate))}"
            )
        if self.debounce is not None:
            seconds("debounce", self.debounce, least=0.001)
        if self.at_most is not None:
            seconds("at_most", self.at_most, least=0.001)
            if self.debounce is None:
                raise InvalidOption("at_most is for debounce: give that, too")
        if self.until == "while_running" and (self.on_duplicate != "existing" or self.debounce is not None):
            raise InvalidOption(
                "while_running lets every job in: there is no duplicate to replace, to refuse or to put off"
            )
        if not isinstance(self.until, str) and (self.on_duplicate == "replace" or self.debounce is not None):
            raise InvalidOption(
                "a unique key that lives for some seconds names a job that may have run: nothing to replace"
            )

    def check(self, task: inspect.Signature) -> Unique:
        """The rule itself. Raises InvalidOption: ``by`` names what is no parameter of the task."""
        parameters = task.parameters
        names = [self.by] if isinstance(self.by, str) else [] if self.by is None or callable(self.by) else self.by
        strange = next((name for name in names if name not in parameters), None)
        if strange is not None and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise InvalidOption(
                f"unique by {strange!r}: the handler has no such parameter{did_you_mean(strange, parameters)}"
            )
        return self

    @property
    def hold(self) -> str:
        """What keeps the key, in the word of enqueue_once.lua."""
        if not isinstance(self.until, str):
            return "ttl"
        return "started" if self.debounce is not None else self.until.removeprefix("until_")

    @property
    def replaces(self) -> bool:
        """Whether a duplicate changes the job that is there."""
        return self.debounce is not None or self.on_duplicate == "replace"


def as_unique(value: Any) -> Unique | None:
    """What the option ``unique=`` means.

    Raises:
        InvalidOption: nothing.
    """
    if value is None or value is False:
        return None
    if isinstance(value, Unique):
        return value
    return Unique() if value is True else Unique(value)


def unique_key(task: str, rule: Unique, arguments: Mapping[str, Any]) -> str:
    """The key of a call: the task and a hash of the chosen arguments, 128 bits.

    Raises:
        InvalidOption: ``by`` names an argument that the call does not have, or its values cannot be encoded.

    >>> unique_key("t", Unique(by="a"), {"a": 1, "b": 2}) == unique_key("t", Unique(by=["a"]), {"a": 1, "b": 3})
    True
    """
    by = rule.by
    if by is None:
        chosen: Any = arguments
    elif callable(by):
        chosen = by(arguments)
    else:
        names = [by] if isinstance(by, str) else list(by)
        missing = [name for name in names if name not in arguments]
        if missing:
            raise InvalidOption(
                f"task {task!r} is unique by {missing[0]!r}, which this call does not have"
                f"{did_you_mean(missing[0], arguments)}"
            )
        chosen = {name: arguments[name] for name in names}
    try:
        data = _encode(chosen)
    except Exception as error:  # noqa: BLE001 - see arguments.encode_untyped
        raise InvalidOption(f"the unique key of task {task!r} cannot be encoded: {error}") from None
    return key_of(task, data)


def key_of(task: str, data: bytes) -> str:
    """A key of bounded length for any bytes."""
    return f"{task}:{hashlib.blake2b(data, digest_size=16).hexdigest()}"


def make_idempotency_key(task: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> str:
    """``idem:`` and the SHA-256 of the call as JSON with sorted keys: the same call, the same key, in any process.

    What JSON does not know counts by its ``str()``.

    Example::

        key = fastq.make_idempotency_key("charge", ("order-17",), {"amount": 9.99})
        await charge.options(idempotency_key=key).enqueue("order-17", amount=9.99)
    """
    payload = json.dumps({"task": task, "args": list(args), "kwargs": dict(kwargs or {})}, sort_keys=True, default=str)
    return f"idem:{hashlib.sha256(payload.encode()).hexdigest()}"
