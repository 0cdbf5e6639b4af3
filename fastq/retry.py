"""When a failed job runs again: retry policies, as pure functions of (attempt, random).

A policy answers one question, :meth:`RetryPolicy.delay`: how many seconds after the ``attempt``-th failed run the
next one starts; ``attempt`` is 1 after the first failure. :class:`RetryRule` adds how often, and after which errors.
"""

from __future__ import annotations

import datetime as dt
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal, TypeAlias, cast

from fastq.errors import ConfigError, Fail, Retry, TaskDefinitionError, safe_text

__all__ = [
    "DEFAULT",
    "MAX_DELAY",
    "Additive",
    "Custom",
    "Exponential",
    "Fixed",
    "Jitter",
    "Linear",
    "RetryPolicy",
    "RetryRule",
    "Steps",
    "as_policy",
    "attempts_in_all",
]

#: No policy waits longer, whatever it computes; seconds. ``Retry(delay=…)`` and ``Snooze`` have the same bound.
MAX_DELAY = 366 * 86_400.0

#: A task may ask for this many runs; in effect for ever, but said explicitly.
MAX_ATTEMPTS = 1_000_000

Seconds: TypeAlias = float | dt.timedelta
ErrorTypes: TypeAlias = type[BaseException] | Iterable[type[BaseException]]


# -- checks -----------------------------------------------------------------------------------


def _number(what: str, value: object) -> float:
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{what}={_quoted(value)} must be a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _seconds(what: str, value: object) -> float:
    seconds = _number(what, value)
    if not 0 <= seconds <= MAX_DELAY:
        raise ConfigError(f"{what}={_quoted(value)} must be between 0 seconds and 366 days")
    return seconds


def _cap(what: str, value: object) -> float:
    return MAX_DELAY if value is None else _seconds(f"{what} max_delay", value)


def _list(value: object) -> tuple[float, ...]:
    delays = cast("Sequence[object]", value) if isinstance(value, (list, tuple)) else ()
    if not 1 <= len(delays) <= 1_000:
        raise ConfigError(f"Steps takes a list of 1 to 1000 delays, not {_quoted(value)}")
    return tuple(_seconds("a delay of Steps", delay) for delay in delays)


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, type)


def _jitter(value: object) -> Jitter:
    if value is None or isinstance(value, Additive):
        return value
    if value in ("none", "full", "equal"):
        return cast("Jitter", value)
    raise ConfigError(f"jitter={_quoted(value)} must be 'none', 'full', 'equal', or Additive(low, high)")


def _error_types(what: str, value: object) -> tuple[type[BaseException], ...]:
    types: tuple[Any, ...] = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in types):
        raise TaskDefinitionError(f"{what}={_quoted(value)} must be exception types")
    return types


def _bounded(plain: Callable[[int], float], attempt: int) -> float:
    """``plain(attempt)``, with everything beyond the bound, and beyond floats, at the bound."""
    try:
        return min(float(plain(attempt)), MAX_DELAY)
    except OverflowError:
        return MAX_DELAY


def _quoted(value: object) -> str:
    """For messages: short and on one line, whatever came in."""
    try:
        return safe_text(repr(value), 120)
    except ValueError:  # an integer of more digits than Python prints
        return "a huge number"


# -- policies ---------------------------------------------------------------------------------


class _Value:
    """Compared, hashed and printed by its public attributes, which never change."""

    __slots__ = ()

    def _items(self) -> list[tuple[str, Any]]:
        names = [name for cls in type(self).__mro__ for name in getattr(cls, "__slots__", ())]
        names += getattr(self, "__dict__", ())  # a subclass need not name its slots
        return [(name, getattr(self, name)) for name in names]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._items())})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._items() == other._items()

    def __hash__(self) -> int:
        return hash((type(self), *self._items()))


class Additive(_Value):
    """Jitter that adds between ``low`` and ``high`` seconds to the delay.

    ``delay + uniform(low, high)``. Source: Celery guides, ``60 + random.uniform(0, 10)``.

    >>> Fixed(60, jitter=Additive(0, 10)).bounds(1)
    (60.0, 70.0)
    """

    __slots__ = ("high", "low")

    def __init__(self, low: Seconds, high: Seconds) -> None:
        self.low: Final = _seconds("Additive low", low)
        self.high: Final = _seconds("Additive high", high)
        if self.low > self.high:
            raise ConfigError(f"Additive({low!r}, {high!r}): low must not exceed high")


Jitter: TypeAlias = Literal["none", "full", "equal"] | Additive | None


class RetryPolicy(_Value):
    """The base of all policies: subclass it and give ``plain(attempt)``.

    Jitter, with ``d`` the plain delay: ``none`` = d; ``full`` = uniform(0, d); ``equal`` = d/2 + uniform(0, d/2);
    ``Additive(a, b)`` = d + uniform(a, b). (The names are those of the AWS article "Exponential Backoff and Jitter".)
    """

    __slots__ = ()
    jitter: Jitter = None

    def plain(self, attempt: int) -> float:
        """The delay without jitter, in seconds; ``attempt`` is at least 1."""
        raise NotImplementedError

    def delay(self, attempt: int, rng: random.Random | None = None) -> float:
        """Seconds to wait after the ``attempt``-th failed run: 0 to MAX_DELAY (366 days).

        Without ``rng`` the draw is the process's own (Python reseeds it in a forked child, so workers differ).
        """
        low, high = self.bounds(attempt)
        if low == high:
            return low
        draw = random.random() if rng is None else rng.random()  # spreads load, guards nothing
        return low + (high - low) * draw

    def bounds(self, attempt: int) -> tuple[float, float]:
        """The shortest and the longest delay that can come out of :meth:`delay`."""
        plain = _bounded(self.plain, max(1, attempt))
        jitter = self.jitter
        if jitter == "full":
            return 0.0, plain
        if jitter == "equal":
            return plain / 2, plain
        if isinstance(jitter, Additive):
            return min(plain + jitter.low, MAX_DELAY), min(plain + jitter.high, MAX_DELAY)
        return plain, plain


class Fixed(RetryPolicy):
    """The same delay after every failure.

    ``delay``. Source: ``default_retry_delay=60`` of Celery.

    >>> [Fixed(60).delay(n) for n in (1, 2, 3)]
    [60.0, 60.0, 60.0]
    """

    __slots__ = ("jitter", "seconds")

    def __init__(self, delay: Seconds, jitter: Jitter = None) -> None:
        self.seconds: Final = _seconds("Fixed delay", delay)
        self.jitter: Jitter = _jitter(jitter)

    def plain(self, attempt: int) -> float:  # noqa: ARG002, D102
        return self.seconds


class Linear(RetryPolicy):
    """A delay that grows by the same step.

    ``min(base + step * (attempt - 1), max_delay)``; ``step`` is ``base`` unless given, ``max_delay=None`` leaves only
    the 366 days that bound every delay. Source: ``backoff_seconds * attempt`` of svc-infra.

    >>> [Linear(60).delay(n) for n in (1, 2, 3, 4)]
    [60.0, 120.0, 180.0, 240.0]
    """

    __slots__ = ("base", "jitter", "max_delay", "step")

    def __init__(
        self, base: Seconds, step: Seconds | None = None, max_delay: Seconds | None = None, jitter: Jitter = None
    ) -> None:
        self.base: Final = _seconds("Linear base", base)
        self.step: Final = self.base if step is None else _seconds("Linear step", step)
        self.max_delay: Final = _cap("Linear", max_delay)
        self.jitter: Jitter = _jitter(jitter)

    def plain(self, attempt: int) -> float:  # noqa: D102
        return min(self.base + self.step * (attempt - 1), self.max_delay)


class Exponential(RetryPolicy):
    """A delay that is multiplied after every failure.

    ``min(base * factor ** (attempt - 1), max_delay)``; ``max_delay=None`` leaves only the 366 days that bound every
    delay. Source: Celery's ``retry_backoff``, ``retry_backoff_max=600``, ``retry_jitter``, with the same defaults.

    >>> [Exponential(jitter=None).delay(n) for n in (1, 2, 3, 20)]
    [1.0, 2.0, 4.0, 600.0]
    >>> Exponential(base=60, max_delay=3600).bounds(4)
    (0.0, 480.0)
    """

    __slots__ = ("base", "factor", "jitter", "max_delay")

    def __init__(
        self,
        base: Seconds = 1.0,
        factor: float = 2.0,
        max_delay: Seconds | None = 600.0,
        jitter: Jitter = "full",
    ) -> None:
        self.base: Final = _seconds("Exponential base", base)
        self.factor: Final = _number("Exponential factor", factor)
        if not 1 <= self.factor <= 1_000:
            raise ConfigError(f"Exponential factor={_quoted(factor)} must be between 1 and 1000")
        self.max_delay: Final = _cap("Exponential", max_delay)
        self.jitter: Jitter = _jitter(jitter)

    def plain(self, attempt: int) -> float:  # noqa: D102
        if self.base == 0:
            return 0.0
        try:
            # factor is a float: as an integer its power of a large attempt would fill the memory instead of raising.
            return min(self.base * self.factor ** (attempt - 1), self.max_delay)
        except OverflowError:
            return self.max_delay


class Steps(RetryPolicy):
    """A list of delays; the last one repeats.

    ``delays[min(attempt, len(delays)) - 1]``. Source: ``[10, 60, 300][self.request.retries]`` of the Celery guides.

    >>> [Steps([10, 60, 300]).delay(n) for n in (1, 2, 3, 4)]
    [10.0, 60.0, 300.0, 300.0]
    """

    __slots__ = ("delays", "jitter")

    def __init__(self, delays: Sequence[Seconds], jitter: Jitter = None) -> None:
        self.delays: Final = _list(delays)
        self.jitter: Jitter = _jitter(jitter)

    def plain(self, attempt: int) -> float:  # noqa: D102
        return self.delays[min(attempt, len(self.delays)) - 1]


class Custom(RetryPolicy):
    """A delay computed by your own function of the attempt (1, 2, …).

    ``fn(attempt)``. What it raises comes out of :meth:`~RetryPolicy.delay`; what is no duration becomes ConfigError.
    Example: Bull's old formula, ``(2 ** attempt - 1) * 2`` seconds.

    >>> [Custom(lambda n: (2**n - 1) * 2).delay(n) for n in (1, 2, 3)]
    [2.0, 6.0, 14.0]
    """

    __slots__ = ("fn", "jitter")

    def __init__(self, fn: Callable[[int], Seconds], jitter: Jitter = None) -> None:
        if not _is_function(fn):
            raise ConfigError(f"Custom takes a function of the attempt, not {_quoted(fn)}")
        self.fn: Final = fn
        self.jitter: Jitter = _jitter(jitter)

    def plain(self, attempt: int) -> float:  # noqa: D102
        seconds: object = self.fn(attempt)
        if isinstance(seconds, dt.timedelta):
            seconds = seconds.total_seconds()
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
            raise ConfigError(f"retry function {_quoted(self.fn)} returned {_quoted(seconds)} for attempt {attempt}")
        return seconds


#: Celery's defaults for automatic retries, which spread a storm of failures best: uniform(0, min(600, 2 ** (attempt - 1))).
DEFAULT = Exponential(base=1.0, factor=2.0, max_delay=600.0, jitter="full")


def as_policy(value: object) -> RetryPolicy:
    """What may be given as ``retry=``: a policy, seconds, a list of seconds, a function of the attempt, or None (DEFAULT).

    >>> as_policy([10, 60, 300]).delay(2), as_policy(5).delay(9), as_policy(lambda n: n * 2.0).delay(3)
    (60.0, 5.0, 6.0)

    Raises ConfigError for anything else.
    """
    if value is None:
        return DEFAULT
    if isinstance(value, RetryPolicy):
        return value
    if isinstance(value, type):
        raise ConfigError(f"retry={value.__name__} is a class: write {value.__name__}(…)")
    if isinstance(value, (list, tuple)):
        return Steps(value)
    if isinstance(value, (int, float, dt.timedelta)) and not isinstance(value, bool):
        return Fixed(value)
    if callable(value):
        return Custom(cast("Callable[[int], Seconds]", value))
    raise ConfigError(
        f"retry={_quoted(value)} must be a policy, seconds, a list of seconds, or a function of the attempt"
    )


def attempts_in_all(max_attempts: int | None = None, max_retries: int | None = None, *, default: int = 5) -> int:
    """How often a job is run in all: ``max_attempts``, or ``max_retries + 1``, or the default.

    >>> attempts_in_all(max_retries=3), attempts_in_all(5), attempts_in_all()
    (4, 5, 5)

    Raises TaskDefinitionError when both are given, or a value is no integer from 1 to 1,000,000 runs.
    """
    if max_attempts is not None and max_retries is not None:
        raise TaskDefinitionError(f"give max_attempts={max_attempts!r} or max_retries={max_retries!r}, not both")
    if max_retries is not None:
        return _runs("max_retries", max_retries, 0) + 1
    return _runs("max_attempts", default if max_attempts is None else max_attempts, 1)


def _runs(name: str, value: object, least: int) -> int:
    most = MAX_ATTEMPTS - 1 + least
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise TaskDefinitionError(f"{name}={_quoted(value)} must be an integer from {least} to {most}")
    return value


class RetryRule(_Value):
    """Whether and when a job runs again after an error: a policy, a number of runs, and classes of errors.

    An error is retried when it is an instance of ``retry_on`` and not of ``never_on``. A handler's own word goes first:
    ``Fail`` is never retried, ``Retry`` always, after its own delay if it has one; the number of runs bounds both.

    >>> rule = RetryRule([10, 60], max_attempts=3, never_on=PermissionError)
    >>> [rule.decide(OSError(), attempt) for attempt in (1, 2, 3)], rule.decide(PermissionError(), 1)
    ([10.0, 60.0, None], None)
    """

    __slots__ = ("max_attempts", "never_on", "policy", "retry_on")

    def __init__(
        self,
        retry: object = None,
        *,
        max_attempts: int = 5,
        retry_on: ErrorTypes = Exception,
        never_on: ErrorTypes = (),
    ) -> None:
        self.policy: Final = as_policy(retry)
        self.max_attempts: Final = attempts_in_all(max_attempts)
        self.retry_on: Final = _error_types("retry_on", retry_on)
        self.never_on: Final = _error_types("never_on", never_on)

    def decide(self, error: BaseException, attempt: int, rng: random.Random | None = None) -> float | None:
        """Seconds until the next run after the ``attempt``-th failed one; None = no more runs."""
        if attempt >= self.max_attempts or not self.retryable(error):
            return None
        if isinstance(error, Retry) and error.delay is not None:
            return error.delay
        return self.policy.delay(attempt, rng)

    def retryable(self, error: BaseException) -> bool:
        """Whether errors of this kind are retried at all, whatever attempts are left."""
        if isinstance(error, (Fail, Retry)):
            return isinstance(error, Retry)
        return isinstance(error, self.retry_on) and not isinstance(error, self.never_on)
