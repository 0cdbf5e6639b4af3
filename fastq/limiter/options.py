"""Limits on jobs, as options of a task or of a queue. Light: importing an application reads them, a worker binds them."""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from fastq.errors import ConfigError
from fastq.limits import Rule, read_rule

__all__ = ["JOB_LIMITS", "JobLimits", "Key", "key_of_call", "read_job_limits"]


Key = Callable[[Sequence[Any], Mapping[str, Any]], str]
"""The key of a call, by its positional and keyword arguments."""


def key_of_call(template: str, signature: inspect.Signature, where: str) -> Key:
    """What ``"tenant:{tenant_id}"`` is for each call of a function with this signature.

    >>> key_of_call("tenant:{who}", inspect.signature(lambda who, what=1: None), "f")(("x",), {})
    'tenant:x'

    Raises ConfigError: the function, ``where`` in the message, has no such parameter.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"the key {template!r} cannot be read: {error}") from None
    strange = [name for name in names if name.partition(".")[0].partition("[")[0] not in signature.parameters]
    if strange:
        raise ConfigError(f"{where} has no parameter {strange[0]!r}, which {template!r} names")

    def key(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        bound = signature.bind_partial(*args, **kwargs)
        bound.apply_defaults()
        return template.format(**bound.arguments)

    return key


class JobLimits(msgspec.Struct, frozen=True):
    """The limits of a task's, or a queue's, jobs as they were asked for; docs/limits.md says what each option means."""

    rate_limit: str | None = None
    concurrency: int | None = None
    limits: tuple[Any, ...] = ()  # names of limiters, or limiters
    limit_key: str | Callable[..., str] | None = None
    cost: int | Callable[..., int] = 1

    @property
    def own(self) -> dict[str, Any]:
        """Options of the limiter that belongs to the task, or queue, alone; none: it has none."""
        options = {"rate": self.rate_limit, "max_concurrent": self.concurrency}
        return {name: value for name, value in options.items() if value is not None}


JOB_LIMITS: Final = JobLimits.__struct_fields__
"""The options that :func:`read_job_limits` knows."""


def _own_rule(limits: JobLimits) -> Rule | None:
    try:
        return read_rule(limits.own) if limits.own else None
    except ConfigError as error:  # in the words of a task's options
        raise ConfigError(
            str(error).replace("max_concurrent=", "concurrency=").replace("rate=", "rate_limit=")
        ) from None


def read_job_limits(given: Mapping[str, Any], signature: inspect.Signature | None = None) -> JobLimits | None:
    """The limits among a task's options; None without any.

    Raises ConfigError.
    """
    options = {name: given[name] for name in JOB_LIMITS if given.get(name) is not None}
    if not options:
        return None
    shared = options.get("limits", ())
    if isinstance(shared, str) or not isinstance(shared, list | tuple):
        raise ConfigError(f"limits={shared!r} must be a list of limiters, or of their names")
    limits = JobLimits(**{**options, "limits": tuple(shared)})
    rule = _own_rule(limits)
    if rule is None and not limits.limits:
        raise ConfigError(
            f"{' and '.join(options)}: there is no limit to apply it to; give rate_limit, concurrency or limits"
        )
    if limits.limit_key is not None and rule is None:
        raise ConfigError(
            f"limit_key={limits.limit_key!r} divides rate_limit and concurrency; "
            'for a shared limiter write limits=["name:{argument}"]'
        )
    if isinstance(limits.limit_key, str):
        if signature is not None:
            key_of_call(limits.limit_key, signature, "the handler")
    elif limits.limit_key is not None and not callable(limits.limit_key):
        raise ConfigError(f"limit_key={limits.limit_key!r} must be a template as 'tenant:{{tenant_id}}', or a function")
    if not callable(limits.cost):
        cost, capacity = limits.cost, rule.terms(0).capacity if rule is not None else 2**62
        if isinstance(cost, bool) or not isinstance(cost, int) or not 0 <= cost <= capacity:
            raise ConfigError(
                f"cost={cost!r} must be a whole number from 0 to what the limit can grant at once, or a function"
            )
    return limits
