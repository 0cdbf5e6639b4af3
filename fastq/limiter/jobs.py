"""Limits on jobs: which limiters a task's jobs have to pass in a queue, with which key and at which cost."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastq.errors import ConfigError
from fastq.limiter.api import Limiter
from fastq.limiter.options import JobLimits, Key, key_of_call
from fastq.limits import check_cost, check_whole

__all__ = ["JobLimiter", "bind"]


class JobLimiter(NamedTuple):
    """One limiter that a task's jobs have to pass."""

    limiter: Limiter
    key: Key | None
    cost: int | Callable[..., int]

    @property
    def plain(self) -> bool:
        """Whether it is the same for all jobs: nothing depends on their arguments."""
        return self.key is None and isinstance(self.cost, int)

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Limiter, int]:
        """The limiter, or partition, and the cost for a job with these arguments.

        Raises whatever the user's functions raise; ConfigError for a key or cost that cannot be one.
        """
        limiter = self.limiter
        if self.key is not None:
            key = self.key(args, kwargs)
            if not isinstance(key, str):
                raise ConfigError(f"limiter {limiter.id!r}: limit_key returned {key!r:.100}: return a string")
            limiter = limiter.for_key(key)
        if isinstance(self.cost, int):
            return limiter, self.cost
        return limiter, check_whole(
            self.cost(*args, **kwargs)
        )  # whether it can ever be granted, the rule in force says


def bind(
    owner: str,
    options: JobLimits,
    find: Callable[..., Limiter],
    signature: inspect.Signature | None = None,
) -> list[JobLimiter]:
    """The limiters of one task, or queue.

    Args:
        owner: ``task:<name>`` or ``queue:<name>``; its own limiter has that name.
        options: what was asked for.
        find: makes or finds a limiter, as ``app.limiter`` does.
        signature: of the handler, whose parameters templates name.

    Raises ConfigError: a limiter that does not exist, a template that names no parameter, a cost that is never granted.
    """
    bound = []
    if options.own:
        key = options.limit_key
        if isinstance(key, str):
            key = None if signature is None else key_of_call(key, signature, f"the handler of {owner}")
        elif key is not None:
            key = _called(key)
        bound.append(JobLimiter(find(limiter_name(owner), **options.own), key, options.cost))
    bound += [_shared(owner, shared, options.cost, find, signature) for shared in options.limits]
    for each in bound:
        if isinstance(each.cost, int):
            check_cost(each.limiter.plan.rule.terms(0), each.cost)
    return bound


def _called(function: Callable[..., str]) -> Key:
    return lambda args, kwargs: function(*args, **kwargs)


def _shared(
    owner: str, shared: Any, cost: Any, find: Callable[..., Limiter], signature: inspect.Signature | None
) -> JobLimiter:
    if isinstance(shared, Limiter):
        return JobLimiter(shared, None, cost)
    if not isinstance(shared, str):
        raise ConfigError(f"limits: {shared!r:.100} is neither a limiter nor the name of one")
    name, brace, rest = shared.partition("{")
    if not brace or signature is None:
        return JobLimiter(find(shared), None, cost)
    key = key_of_call(brace + rest, signature, f"the handler of {owner}")
    return JobLimiter(find(name.removesuffix(":")), key, cost)


def limiter_name(owner: str) -> str:
    """The name of the limiter that a task or queue has for itself; too long a name is cut, with its hash behind it.

    >>> limiter_name("task:send_email")
    'task:send_email'
    """
    if len(owner) <= 100:
        return owner
    return f"{owner[:80]}.{hashlib.blake2b(owner.encode(), digest_size=8).hexdigest()}"
