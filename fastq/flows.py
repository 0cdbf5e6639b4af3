"""The part of an application that makes workflows: ``app.chain``, ``app.group``, ``app.chord``, ``app.workflow``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, Unpack, cast

from fastq.arguments import encode_untyped
from fastq.broker.command import Operation
from fastq.errors import InvalidOption, UnknownTask
from fastq.job import TASK_NAME
from fastq.partitions import check_partition
from fastq.registry import Tasks
from fastq.task import Producer, Task, TaskOptions, check_options, make_node
from fastq.values import Durability
from fastq.workflow import Chain, Flow, Group, OnError, Signature, Work, chord, spawning
from fastq.workflow_handle import Home, Workflow

__all__ = ["FlowOptions", "Flows", "Step"]

Step = Work | tuple[Any, ...]
"""A signature, chain, group or chord; or a call by name: ``("task",)``, ``("task", args)``, ``("task", args, kwargs)``."""


class FlowOptions(TypedDict, total=False):
    """See :meth:`fastq.workflow.Work.enqueue`."""

    name: str
    queue: str
    on_error: OnError
    on_failure: Signature
    result_ttl: float
    durability: Durability


class Named:
    """A task by its name; its handler need not be importable here."""

    def __init__(self, app: Producer, name: str) -> None:
        self._app = app
        self.name = name

    def home(self) -> Home:
        """The application."""
        return self._app

    def node(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any], takes: int
    ) -> tuple[str, bytes]:
        """See :class:`fastq.workflow.Source`."""
        return make_node(self.name, encode_untyped(self.name, args, kwargs), TaskOptions(), options, self._app, takes)


class Flows:
    """The part of :class:`fastq.FastQ` that makes workflows."""

    async def chain(self, steps: Iterable[Step], **options: Unpack[FlowOptions]) -> Workflow:
        """Enqueue jobs that run one after the other.

        A call by name gets the arguments that it names and no others; a signature gets what the step before has returned as
        its first argument (``.si(…)``: it does not).

        Raises:
            As :meth:`fastq.workflow.Work.enqueue`.

        Example::

            await app.chain([
                ("validate_order", (), {"order_id": "42"}),
                ("process_payment", (), {"order_id": "42"}),
                ("send_confirmation", (), {"order_id": "42"}),
            ])
        """
        return await Chain(self._steps(steps)).enqueue(**options)

    def chain_sync(self, steps: Iterable[Step], **options: Unpack[FlowOptions]) -> Workflow:
        """:meth:`chain` from blocking code."""
        return Chain(self._steps(steps)).enqueue_sync(**options)

    async def group(self, steps: Iterable[Step], **options: Unpack[FlowOptions]) -> Workflow:
        """Enqueue jobs that run side by side; the workflow's result is the list of theirs."""
        return await Group(self._steps(steps)).enqueue(**options)

    def group_sync(self, steps: Iterable[Step], **options: Unpack[FlowOptions]) -> Workflow:
        """:meth:`group` from blocking code."""
        return Group(self._steps(steps)).enqueue_sync(**options)

    async def chord(self, header: Iterable[Step], callback: Step, **options: Unpack[FlowOptions]) -> Workflow:
        """Enqueue jobs that run side by side, and one that runs once when they have ended."""
        return await chord(self._steps(header), self._step(callback)).enqueue(**options)

    def chord_sync(self, header: Iterable[Step], callback: Step, **options: Unpack[FlowOptions]) -> Workflow:
        """:meth:`chord` from blocking code."""
        return chord(self._steps(header), self._step(callback)).enqueue_sync(**options)

    def workflow(self, name: str = "") -> Flow:
        """A graph of one's own: add work with what it comes after, then ``await wf.enqueue()``.

        Example::

            wf = app.workflow("order")
            paid = wf.add(pay.s(42))
            packed = wf.add(pack.si(42))
            wf.add(ship.s(), after=[paid, packed])
            await wf.enqueue()
        """
        return Flow(name)

    def get_workflow(self, workflow_id: str, *, queue: str | None = None) -> Workflow:
        """A workflow that was started, by its id. ``queue``: default is the setting ``default_queue``."""
        app = cast(Producer, self)
        name = check_partition(app.queue_of("", None) if queue is None else queue)
        return Workflow(app, workflow_id, app.partition(name, workflow_id))

    def spawning(self, job_id: str, queue: str, name: str, work: Work, *, join: bool) -> Operation[list[str]]:
        """What :meth:`fastq.JobContext.spawn` does."""
        if not isinstance(work, Work):
            raise InvalidOption(f"spawn takes task.s(…), a chain, a group or a chord, not {work!r:.100}")
        return spawning(cast(Producer, self).keys(queue), job_id, name, work, join=join)

    def prefix(self) -> str:
        """The first part of every key."""
        return cast(Any, self).settings.prefix  # type: ignore[no-any-return]

    def _steps(self, steps: Iterable[Step]) -> list[Work]:
        return [self._step(step) for step in steps]

    def _step(self, step: Step) -> Work:
        if isinstance(step, Work):
            return step
        if not isinstance(step, tuple) or not 1 <= len(step) <= 3:
            raise InvalidOption(f"a step is task.s(…) or (name, args, kwargs), not {step!r:.100}")
        name = step[0].name if isinstance(step[0], Task) else step[0]
        args = step[1] if len(step) > 1 else ()
        kwargs = step[2] if len(step) > 2 else {}
        if not isinstance(args, tuple | list) or not isinstance(kwargs, Mapping):
            raise InvalidOption(f"a step is (name, args, kwargs), args a tuple and kwargs a mapping, not {step!r:.100}")
        return self.signature(name, tuple(args), kwargs)

    def signature(
        self,
        name: str,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        immutable: bool = True,
    ) -> Signature:
        """A call by its task's name as a part of a workflow.

        Raises:
            UnknownTask: the name cannot be one. InvalidOption: an option is unknown.
        """
        task = cast(Tasks, self).tasks.get(name) if isinstance(name, str) else None
        if task is None and (not isinstance(name, str) or not TASK_NAME.match(name)):
            raise UnknownTask(f"{name!r:.250} is not a task name: 1 to 200 characters of A-Z a-z 0-9 _ . : -")
        source = task or Named(cast(Producer, self), name)
        return Signature(source, args, kwargs or {}, check_options(options or {}), immutable=immutable)
