"""What a handler's parameters depend on, made for each run: FastAPI's ``Depends`` for tasks.

A handler with such parameters is wrapped when it is registered; handlers without them never come here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, NamedTuple, get_type_hints

from fastq.context import JobContext, current, depends_of, injection, is_injected
from fastq.errors import FastQError, TaskDefinitionError

__all__ = ["resolved"]


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class _Need(NamedTuple):
    """One dependency: what to call, and where its own parameters come from."""

    call: Callable[..., Any]
    sources: dict[str, _Need | inspect.Parameter]
    kind: str  # "async generator" | "generator" | "coroutine" | "plain"

    @property
    def blocking(self) -> bool:
        """Whether it can be made without an event loop."""
        return self.kind in ("generator", "plain")


def resolved(task: str, fn: Callable[..., Any], *, is_async: bool) -> Callable[..., Any]:
    """The handler, or one that makes what it depends on before it and tidies up after it.

    Raises:
        TaskDefinitionError: a dependency cannot be called, depends on itself, or is async in a plain handler.
    """
    needs = {}
    for name, parameter, annotation in _parameters(fn):
        marker = depends_of(parameter, annotation)
        if marker is not None:
            needs[name] = _need(task, marker.dependency, ())
    if not needs:
        return fn
    if not is_async:
        for need in _all(needs.values()):
            if not need.blocking:
                raise TaskDefinitionError(
                    f"task {task!r} is a plain function and depends on {_shown(need.call)}, which is async: make either the other"
                )
    return _async_handler(fn, needs) if is_async else _plain_handler(fn, needs)


def _parameters(fn: Callable[..., Any]) -> Iterator[tuple[str, inspect.Parameter, Any]]:
    """Name, parameter and resolved annotation."""
    target = fn.__init__ if inspect.isclass(fn) else fn if inspect.isroutine(fn) else getattr(fn, "__call__", fn)  # noqa: B004
    try:
        hints = get_type_hints(target, include_extras=True)
    except Exception:  # noqa: BLE001 - an annotation is an expression; a handler's is told by fastq.arguments
        hints = {}
    for name, parameter in inspect.signature(fn).parameters.items():
        yield name, parameter, hints.get(name, parameter.annotation)


def _need(task: str, call: Any, above: tuple[Any, ...]) -> _Need:
    if not callable(call):
        raise TaskDefinitionError(f"task {task!r}: Depends({call!r:.100}) is not a function")
    if call in above:
        raise TaskDefinitionError(f"task {task!r}: {_shown(call)} depends on itself")
    sources: dict[str, _Need | inspect.Parameter] = {}
    for name, parameter, annotation in _parameters(call):
        marker = depends_of(parameter, annotation)
        if marker is not None:
            sources[name] = _need(task, marker.dependency, (*above, call))
        elif is_injected(parameter, annotation):
            sources[name] = parameter
        elif parameter.default is parameter.empty and parameter.kind not in _VARIADIC:
            raise TaskDefinitionError(
                f"task {task!r}: nothing fills the parameter {name!r} of {_shown(call)}: give it a default, Depends(), State() or JobContext"
            )
    return _Need(call, sources, _kind(call))


def _kind(call: Any) -> str:
    inner: Any = call.func if isinstance(call, functools.partial) else call
    if not inspect.isroutine(inner) and not inspect.isclass(inner):
        inner = inner.__call__  # of an instance: it is looked at as a function is
    if inspect.isasyncgenfunction(inner):
        return "async generator"
    if inspect.isgeneratorfunction(inner):
        return "generator"
    return "coroutine" if inspect.iscoroutinefunction(inner) else "plain"


def _all(needs: Any) -> Iterator[_Need]:
    for need in needs:
        yield need
        yield from _all(source for source in need.sources.values() if isinstance(source, _Need))


def _shown(call: Any) -> str:
    return getattr(call, "__qualname__", repr(call)[:100])


# -- the run ----------------------------------------------------------------------------------


def _async_handler(fn: Callable[..., Any], needs: dict[str, _Need]) -> Callable[..., Any]:
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    async def handler(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(*args, **kwargs)
        known: dict[Any, Any] = {}
        failure = _Failure()
        async with AsyncExitStack() as stack:
            with failure:
                for name, need, job in _missing(bound.arguments, needs):
                    bound.arguments[name] = await _make(need, job, stack, known)
                return await fn(*bound.args, **bound.kwargs)
        raise failure.take()

    return handler


def _plain_handler(fn: Callable[..., Any], needs: dict[str, _Need]) -> Callable[..., Any]:
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def handler(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(*args, **kwargs)
        known: dict[Any, Any] = {}
        failure = _Failure()
        with ExitStack() as stack, failure:
            for name, need, job in _missing(bound.arguments, needs):
                bound.arguments[name] = _make_here(need, job, stack, known)
            return fn(*bound.args, **bound.kwargs)
        raise failure.take()

    return handler


class _Failure:
    """How a run has failed: a generator that it depends on may see that and tidy up, and does not make a success of it."""

    __slots__ = ("_error",)

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._error = error

    def take(self) -> BaseException:
        """The error that was swallowed, to be raised again."""
        error, self._error = self._error, None  # no circle of error, frame and error
        assert error is not None
        return error


def _missing(given: dict[str, Any], needs: dict[str, _Need]) -> list[tuple[str, _Need, JobContext | None]]:
    """The dependencies to make; whoever calls the handler as a function may give their values."""
    running = current.get()
    here = running if isinstance(running, JobContext) else None
    found = []
    for name, need in needs.items():
        value = given.get(name)
        if name not in given or isinstance(value, JobContext):
            found.append((name, need, value or here))
    return found


async def _make(need: _Need, job: JobContext | None, stack: AsyncExitStack, known: dict[Any, Any]) -> Any:
    """The value of a dependency: one per run, however many depend on it."""
    if need.call in known:
        return known[need.call]
    given: dict[str, Any] = {}
    for name, source in need.sources.items():
        made = await _make(source, job, stack, known) if isinstance(source, _Need) else _of_job(need, source, job)
        given[name] = made
    if need.kind == "async generator":
        value = await stack.enter_async_context(asynccontextmanager(need.call)(**given))
    elif need.kind == "generator":
        value = stack.enter_context(contextmanager(need.call)(**given))
    else:
        value = need.call(**given)
        if need.kind == "coroutine":
            value = await value
    known[need.call] = value
    return value


def _make_here(need: _Need, job: JobContext | None, stack: ExitStack, known: dict[Any, Any]) -> Any:
    """:func:`_make` without an event loop."""
    if need.call in known:
        return known[need.call]
    given = {
        name: _make_here(source, job, stack, known) if isinstance(source, _Need) else _of_job(need, source, job)
        for name, source in need.sources.items()
    }
    made = need.call if need.kind == "plain" else contextmanager(need.call)
    value = made(**given)
    known[need.call] = value if need.kind == "plain" else stack.enter_context(value)
    return known[need.call]


def _of_job(need: _Need, parameter: inspect.Parameter, job: JobContext | None) -> Any:
    if job is None:
        raise FastQError(
            f"{_shown(need.call)} needs the running job for {parameter.name!r}: give the handler its value instead"
        )
    return injection(parameter, job)
