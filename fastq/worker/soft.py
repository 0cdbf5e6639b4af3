"""Soft time limits: ``SoftTimeLimitExceeded`` raised inside a handler while it runs, so that it can tidy up.

Nothing here watches the time: the executor's sweep does, for hard and soft limits alike.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from fastq.context import JobContext
from fastq.errors import SoftTimeLimitExceeded

__all__ = ["exceed", "exceed_thread", "interruptible", "softly"]


class _Exceeded(SoftTimeLimitExceeded, asyncio.CancelledError):
    """What an async handler sees: also a CancelledError, so that task groups take their children along, as they do
    for a cancellation, and let it through.
    """


_Exceeded.__name__ = _Exceeded.__qualname__ = SoftTimeLimitExceeded.__name__
_Exceeded.__module__ = SoftTimeLimitExceeded.__module__
_lock = threading.Lock()
_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc


def exceed(job: JobContext) -> None:
    """Raise it in an async handler that runs under :func:`softly`, at its next await."""
    job.exceeded = True
    job.runner.cancel()


@types.coroutine
def softly(job: JobContext, handler: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Run a handler; the cancellation that :func:`exceed` sends arrives in it as SoftTimeLimitExceeded."""
    step: Callable[[Any], Any] = handler.send
    value: Any = None
    while True:
        try:
            waits_for = step(value)
        except StopIteration as end:
            return end.value
        try:
            value = yield waits_for
            step = handler.send
        except asyncio.CancelledError as error:
            step, value = handler.throw, error
            if job.exceeded:
                job.exceeded = False
                job.runner.uncancel()
                value = _Exceeded()
        except GeneratorExit:
            handler.close()
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it waited for has raised it: it is the handler's
            step, value = handler.throw, error


def exceed_thread(job: JobContext) -> None:
    """Raise it in the thread of a handler that runs under :func:`interruptible`; C code first has to return."""
    with _lock:
        if job.thread:
            job.exceeded = True
            _raise_in(ctypes.c_ulong(job.thread), ctypes.py_object(SoftTimeLimitExceeded))


def interruptible(job: JobContext, call: Callable[[], Any]) -> Any:
    """Call a handler in this thread so that :func:`exceed_thread` reaches it, and nothing that the thread does later."""
    ident = threading.get_ident()
    job.thread = ident
    try:
        return call()
    finally:
        over = False
        while not over:
            try:
                with _lock:
                    job.thread = 0
                    _raise_in(ctypes.c_ulong(ident), None)  # sent and not raised yet: take it back
                over = True
            except SoftTimeLimitExceeded:
                pass  # it came between the handler's end and here: too late
