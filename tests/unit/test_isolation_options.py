"""What may be asked of an isolated task, and what is said of the rest where it is defined."""

from __future__ import annotations

from typing import Any

import pytest

import fastq
from fastq.errors import JobCrashed, TaskDefinitionError
from fastq.retry import RetryRule
from fastq.worker.ending import is_retryable, reason_of

tasks = fastq.Tasks()


def nothing() -> None: ...


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"isolation": "thread"}, "isolation='thread' must be 'process'"),
        ({"max_memory": "1GB"}, "max_memory needs isolation='process'"),
        ({"isolation": "process", "max_memory": "much"}, "'much' is no size"),
        ({"soft_timeout": -1}, "soft_timeout=-1 must be"),
        ({"isolatoin": "process"}, "did you mean 'isolation'"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskDefinitionError, match=said):
        tasks.task(**options)(nothing)


def test_state_is_not_there() -> None:
    """The lifespan runs in the worker: better told at the definition than found out at the first job."""
    with pytest.raises(TaskDefinitionError, match=r"pool=State\(\) needs the lifespan"):

        @tasks.task(isolation="process")
        def handler(pool: str = fastq.State("pool")) -> None: ...


def test_sizes_are_read() -> None:
    @tasks.task(isolation="process", max_memory="512MB")
    def sized() -> None: ...

    assert sized.defaults.max_memory == 512 * 2**20
    assert sized.defaults.isolation == "process"


def test_a_crash_is_retried_unless_the_task_says_otherwise() -> None:
    assert is_retryable(JobCrashed("signal SIGSEGV"), RetryRule(retry_on=ValueError))
    assert not is_retryable(JobCrashed("signal SIGSEGV"), RetryRule(never_on=JobCrashed))
    assert reason_of(JobCrashed("")) == "crash"
