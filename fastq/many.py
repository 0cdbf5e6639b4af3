"""Handlers that take many jobs at once: what one job looks like, made from the signature of their list."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from fastq.arguments import hints_of
from fastq.context import JobContext, depends_of, injection, takes_state
from fastq.errors import TaskDefinitionError

__all__ = ["MOST", "Many", "spread"]

MOST = 10_000
"""Most jobs of one call: as many handlers may run in a worker at once."""

_LISTS = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)


class Many:
    """What the handler of a task with ``batch=`` asks for.

    Args:
        task: its name, for messages.
        fn: the handler: its first parameter takes the list of what the jobs were called with. Others may be of
            type ``list[JobContext]``, or ``State()``.

    Raises:
        TaskDefinitionError: it is none that can be called so.
    """

    def __init__(self, task: str, fn: Callable[..., Any]) -> None:
        self.task = task
        hints = hints_of(task, fn)
        self._jobs: list[str] = []
        self._states: list[inspect.Parameter] = []
        items: list[inspect.Parameter] = []
        for parameter in inspect.signature(fn).parameters.values():
            annotation = hints.get(parameter.name, Any)
            if depends_of(parameter, annotation) is not None or annotation is JobContext:
                raise TaskDefinitionError(
                    f"task {task!r}: {parameter.name} is made for each job, and a handler with batch= runs for many: take "
                    "list[fastq.JobContext], and what is needed from the lifespan"
                )
            if _item_of(annotation) is JobContext:
                self._jobs.append(parameter.name)
            elif takes_state([parameter]):
                self._states.append(parameter)
            else:
                items.append(parameter)
        if len(items) != 1 or items[0].kind not in (items[0].POSITIONAL_ONLY, items[0].POSITIONAL_OR_KEYWORD):
            raise TaskDefinitionError(
                f"task {task!r}: a handler with batch= takes one list, of what each job was called with; "
                f"{', '.join(p.name for p in items) or 'nothing'} is none: put several values into a tuple or a dataclass"
            )
        self.name = items[0].name
        self.item = _item_of(hints.get(self.name, Any))
        if self.item is None:
            raise TaskDefinitionError(
                f"task {task!r}: annotate {self.name} as a list, such as list[str], or not at all"
            )
        self.result = _result_of(hints.get("return", Any))

    def shape(self) -> Callable[..., Any]:
        """A function with the signature of one job."""

        def one() -> None: ...

        parameter = inspect.Parameter(self.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=self.item)
        one.__signature__ = inspect.Signature([parameter], return_annotation=self.result)  # type: ignore[attr-defined]
        one.__annotations__ = {self.name: self.item, "return": self.result}
        return one

    def more(self, jobs: Sequence[JobContext]) -> dict[str, Any]:
        """What the handler gets beside the list."""
        found: dict[str, Any] = {name: list(jobs) for name in self._jobs}
        return found | {parameter.name: injection(parameter, jobs[0]) for parameter in self._states}


def _item_of(annotation: Any) -> Any:
    """The type of one item of an annotated list; None: it is no list."""
    if annotation is Any or annotation is list:
        return Any
    if typing.get_origin(annotation) not in _LISTS:
        return None
    return (typing.get_args(annotation) or (Any,))[0]


def _result_of(annotation: Any) -> Any:
    """What one job returns; exceptions in the list are failures."""
    item = _item_of(annotation)
    if item is None:
        return type(None) if annotation in (None, type(None)) else Any
    kinds = typing.get_args(item) if typing.get_origin(item) in (typing.Union, types.UnionType) else (item,)
    kept = [kind for kind in kinds if not (isinstance(kind, type) and issubclass(kind, BaseException))]
    return functools.reduce(operator.or_, kept) if kept else Any


def spread(task: str, returned: Any, count: int) -> Sequence[Any]:
    """What each job's run comes to, by what the handler returned: a result, or an exception that stands for its failure.

    Raises:
        TypeError: it is not None, and no list with an item for each job.

    >>> spread("t", None, 2), spread("t", [1, ValueError("no")], 2)
    ([None, None], [1, ValueError('no')])
    """
    if returned is None:
        return [None] * count
    if isinstance(returned, list | tuple) and len(returned) == count:
        return returned
    told = f"{len(returned)} items" if isinstance(returned, list | tuple) else f"a {type(returned).__name__}"
    raise TypeError(
        f"the handler of task {task!r} was given {count} jobs and returned {told}: return None, or a list with the result or "
        "the exception of each"
    )
