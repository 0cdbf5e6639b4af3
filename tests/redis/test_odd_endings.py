"""Jobs whose end is out of the ordinary: errors that cannot be stored as they are, threads that never come free."""

from __future__ import annotations

import os
from typing import Any

import pytest

import fastq
from fastq import FastQ
from tests.redis.workshop import working

NOT_TEXT = os.fsdecode(b"caf\xe9.txt")
"""A file's name that is not UTF-8: Python has a lone surrogate in it, which no encoder takes."""


class Markup(str):
    __slots__ = ()


class Fancy(Exception):
    def __str__(self) -> str:
        return Markup("of a subclass of str")


class Never(fastq.RetryPolicy):
    def plain(self, attempt: int) -> float:
        return float("nan")


class OwnRetry(fastq.Retry):
    def __init__(self, why: str) -> None:
        Exception.__init__(self, why)


class OwnSnooze(fastq.Snooze):
    def __init__(self, why: str) -> None:
        Exception.__init__(self, why)


ODD: dict[str, Any] = {
    "bytes": (lambda: ValueError(f"cannot read {NOT_TEXT}"), 0, "ValueError: cannot read caf\\udce9.txt"),
    "subclass": (Fancy, 0, "Fancy: of a subclass of str"),
    "nan": (lambda: ValueError("x"), Never(), "ValueError: cannot convert float NaN to integer"),
    "retry": (lambda: OwnRetry("not yet"), 0, "OwnRetry: not yet"),
    "snooze": (
        lambda: OwnSnooze("not yet"),
        0,
        "OwnSnooze: not yet (what follows could not be found out: AttributeError:",
    ),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("threaded", [False, True], ids=["async", "thread"])
async def test_an_error_that_cannot_be_stored_as_it_is_ends_its_job(redis_url: str, odd: str, threaded: bool) -> None:
    """Such a job stayed `running` until its timeout, and in threads its neighbours, whose ends were told with it."""
    app = FastQ(redis_url, result_ttl=60, concurrency=4, default_max_attempts=2)
    make, policy, told = ODD[odd]

    def break_off(n: int) -> int:
        if n:
            return n
        raise make()

    async def break_off_async(n: int) -> int:
        return break_off(n)

    task = app.task(name="odd", retry=policy)(break_off if threaded else break_off_async)
    async with working(app) as shop:
        bulk = await task.enqueue_many([(n,) for n in range(4)], ids=True)
        statuses = [await shop.ended(fastq.JobHandle(app, job_id, "default")) for job_id in bulk.ids]
        [letter] = await app.dead.list()
    assert [status.result for status in statuses] == [None, 1, 2, 3]
    assert statuses[0].last_error.startswith(told)
    assert letter.attempts == (1 if odd in ("nan", "snooze") else 2)
