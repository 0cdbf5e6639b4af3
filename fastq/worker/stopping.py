"""Deadlines, and the ends of runs before their time."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from fastq.context import JobContext
from fastq.errors import JobTimeout
from fastq.worker.ending import fields_of
from fastq.worker.soft import exceed, exceed_thread

if TYPE_CHECKING:
    from fastq.worker.executor import Executor

__all__ = ["CANCEL_GRACE", "Stops"]

log = logging.getLogger("fastq.worker")

CANCEL_GRACE = 5.0
"""Seconds between asking a handler to stop and giving it up."""


class Stops:
    """Who has to stop, and who does not; one wheel for all jobs of a worker."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._running = executor.running
        self._abandoned: set[JobContext] = set()

    @property
    def stuck(self) -> int:
        """Abandoned handlers that still occupy a thread or a task."""
        return len(self._abandoned)

    def sweep(self, now: float) -> None:
        """Stop what is over its time; give up what does not stop."""
        for job, asked in list(self._running.items()):
            if not asked:
                if job.deadline and now > job.deadline:
                    self._overdue(job)
            elif now > asked + CANCEL_GRACE:
                log.error("handler does not stop", extra={"fields": fields_of(job) | {"why": job.stopping}})
                self._give_up(job)

    def _overdue(self, job: JobContext) -> None:
        if not job.soft:
            self.stop(job, "timeout")
            return
        log.warning("soft time limit exceeded", extra={"fields": fields_of(job) | {"seconds": job.soft}})
        job.deadline += job.timeout - job.soft
        job.soft = 0.0
        if not self._executor.plans[job.task].is_async:
            exceed_thread(job)
        elif job.runner is not None:
            exceed(job)

    def stop(self, job: JobContext, why: str) -> None:
        """Ask a running handler to stop: an async one is cancelled, one in a thread sees ``job.cancelled``.

        ``why`` is "cancel" (it is told, and not interrupted), "terminate", "timeout", "drain", "stop" or "lost".
        """
        plan, isolation = self._executor.plans[job.task], self._executor.isolation
        if job not in self._running or job.stopping not in ("", "cancel") or why == job.stopping:
            return
        job.stopping = why
        told = isolation is not None and isolation.interrupt(job, why)
        if why == "cancel":
            return
        job.exceeded = False  # a cancellation is one now
        self._running[job] = time.monotonic()
        if why != "lost":
            log.warning("stopping job", extra={"fields": fields_of(job) | {"why": why}})
        if told:
            return  # its process is being killed, which ends the run
        waits_only = not (plan.is_async or plan.isolated)  # for a thread, which cannot be interrupted
        if waits_only and job.deadline and why in ("timeout", "terminate"):  # it has begun
            return
        if job.runner is not None:
            job.runner.cancel()
        elif waits_only:
            asyncio.get_running_loop().call_soon(self._leave, job)

    def _leave(self, job: JobContext) -> None:
        """Wait no longer for a thread: it ends with the process."""
        if job in self._running:  # it has not just ended
            self._give_up(job)

    def _give_up(self, job: JobContext) -> None:
        """Record the outcome, free the slot; what is left of the handler dies with the process."""
        plan, permits, begun = self._executor.plans[job.task], job.permits, bool(job.deadline)
        if begun:
            job.permits = None  # it still runs: it keeps its slots
            self._abandoned.add(job)
        error = JobTimeout("") if job.stopping == "timeout" else asyncio.CancelledError()
        self._executor.raised(job, plan, error)
        job.abandoned = True
        job.permits = permits if begun else None

    def over(self, job: JobContext) -> None:
        """An abandoned handler has ended after all, or was taken out of the line for a thread."""
        if job not in self._abandoned:
            return
        self._abandoned.remove(job)
        if job.permits:
            self._executor.give_back(job)
        log.warning("abandoned handler ended", extra={"fields": fields_of(job)})
