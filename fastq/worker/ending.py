"""What is made of an error: the words that are kept of it, and whether the job runs again."""

from __future__ import annotations

import asyncio
import inspect
import traceback
import types
from typing import Any, NamedTuple

from fastq.context import JobContext
from fastq.errors import Fail, JobCrashed, JobTimeout, Retry, SoftTimeLimitExceeded, safe_text
from fastq.retry import RetryRule

__all__ = [
    "MESSAGE_LIMIT",
    "NOT_THE_HANDLERS",
    "Ending",
    "ending_of",
    "fields_of",
    "is_retryable",
    "misfit",
    "reason_of",
]

TRACEBACK_LIMIT = 16_000
MESSAGE_LIMIT = 2_000

NOT_THE_HANDLERS: set[str] = set()
"""Files whose frames a traceback begins with, whatever the handler; the modules that call handlers add theirs."""

_NOT_RESULTS = frozenset({types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType})
"""What a handler returns by mistake: its body has not run."""


class Ending(NamedTuple):
    """Why a run ended without a result: the reason class, and what is kept of the error."""

    reason: str
    type: str
    message: str
    traceback: str


def misfit(result: Any) -> TypeError | None:
    """What is wrong with what a handler returned; None when it can be a result."""
    if type(result) not in _NOT_RESULTS:
        return None
    if inspect.iscoroutine(result):
        result.close()
    return TypeError(
        f"the handler returned a {type(result).__name__}, which nobody would run: await it, or return its items"
    )


def reason_of(error: BaseException) -> str:
    """The reason class of a handler's error."""
    if isinstance(error, Fail):
        return "fail"
    if isinstance(error, JobCrashed):
        return "crash"
    return "timeout" if isinstance(error, SoftTimeLimitExceeded) else "exception"


def is_retryable(error: BaseException, rule: RetryRule) -> bool:
    """Whether a job that ended with this error runs again, if it has attempts left."""
    if isinstance(error, SoftTimeLimitExceeded | JobCrashed | asyncio.CancelledError):
        # As the hard limit, unless the task has a word on it. Nobody has stopped the job: what it waited for was cancelled.
        return not isinstance(error, rule.never_on)
    return isinstance(error, JobTimeout) or rule.retryable(error)


def ending_of(error: BaseException, reason: str) -> Ending:
    """What is kept of an error: plain text that can be stored, whatever its class makes of itself."""
    text = "" if isinstance(error, Fail | Retry | JobTimeout | JobCrashed) else _traceback(error)
    try:
        message = str.__str__(str(error))  # and not a subclass, which msgspec does not take
    except Exception as broken:  # noqa: BLE001 - the user's own __str__
        message = f"<its message cannot be shown: {type(broken).__name__}>"
    return Ending(reason, type(error).__name__, safe_text(message, MESSAGE_LIMIT), text)


def _traceback(error: BaseException) -> str:
    """The traceback from the handler's own first frame on, cut in the middle to a bounded size."""
    tb = error.__traceback__
    while tb is not None and tb.tb_frame.f_code.co_filename in NOT_THE_HANDLERS:
        tb = tb.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, tb, limit=50))
    except Exception:  # noqa: BLE001 - the user's own __str__ or __notes__
        text = "".join(traceback.format_tb(tb, limit=50))
    text = text.encode("utf-8", "backslashreplace").decode()  # a file's name, say, may have bytes that are no text
    if len(text) <= TRACEBACK_LIMIT:
        return text
    half = TRACEBACK_LIMIT // 2
    return f"{text[:half]}\n[… {len(text) - TRACEBACK_LIMIT} characters left out …]\n{text[-half:]}"


def fields_of(job: JobContext) -> dict[str, Any]:
    """How a log line names a job."""
    return {"job": job.id, "task": job.task, "queue": job.queue, "attempt": job.attempt}
