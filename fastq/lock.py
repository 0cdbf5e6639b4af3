"""Locks: a name that one block of code at a time may hold, under a lease (:mod:`fastq.lease`)."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Any

from fastq.errors import ConfigError, JobAlreadyRunning, LeaseTimeout
from fastq.lease import Lease, SyncTerm, Term

__all__ = ["Lock"]


class Lock:
    """See :meth:`fastq.FastQ.lock`. ``async with lock as term:``, or ``with lock as term:`` in blocking code.

    The lease is renewed while the block runs. Should it be lost all the same, an asynchronous block is cancelled and
    LeaseLost raised from it; blocking code calls ``term.check()``. ``term.token`` grows with each holding (a fencing token).

    Args:
        lease: the name, and how long it outlives a holder that was killed.
        wait: seconds to wait for the holder before it.
    """

    def __init__(self, lease: Lease, wait: float) -> None:
        if isinstance(wait, bool) or not isinstance(wait, int | float) or not 0 <= wait <= 86_400:
            raise ConfigError(f"wait={wait!r} of {lease.label} must be a number of seconds from 0 to 86400")
        self._lease = lease
        self._wait = float(wait)
        self._async: dict[asyncio.Task[Any] | None, list[Term]] = {}
        self._sync = threading.local()

    @property
    def name(self) -> str:
        """What is locked."""
        return self._lease.name

    async def __aenter__(self) -> Term:
        try:
            term = await (self._lease.acquire(self._wait) if self._wait else self._lease.try_acquire())
        except LeaseTimeout:
            term = None
        if term is None:
            raise JobAlreadyRunning(self.name, self._wait)
        await term.__aenter__()
        self._async.setdefault(asyncio.current_task(), []).append(term)
        return term

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task = asyncio.current_task()
        terms = self._async[task]
        term = terms.pop()
        if not terms:
            del self._async[task]
        await term.__aexit__(kind, error, trace)

    def __enter__(self) -> SyncTerm:
        lease = self._lease.sync
        try:
            term = lease.acquire(self._wait) if self._wait else lease.try_acquire()
        except LeaseTimeout:
            term = None
        if term is None:
            raise JobAlreadyRunning(self.name, self._wait)
        self._sync.terms = [*getattr(self._sync, "terms", ()), term.__enter__()]
        return term

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sync.terms.pop().__exit__(kind, error, trace)

    def __repr__(self) -> str:
        return f"<Lock {self.name!r} timeout={self._lease.ttl:g}>"
