"""What is said of a task, a lifespan or a call where it is written, rather than when it runs."""

from __future__ import annotations

from typing import Any

import pytest

import fastq
from fastq.arguments import Arguments
from fastq.errors import InvalidArguments, TaskDefinitionError
from fastq.limits import Rule, read_rule


def handler(user_id: int, reason: str = "") -> None: ...


def anything(user_id: int, **more: Any) -> None: ...


@pytest.mark.parametrize("by", ["user", ["user_id", "user"]])
@pytest.mark.parametrize("until", ["until_executed", "while_running"])
def test_a_unique_key_of_what_is_no_parameter(until: Any, by: str | list[str]) -> None:
    with pytest.raises(TaskDefinitionError, match=r"unique by 'user': .* no such parameter - did you mean 'user_id'\?"):
        fastq.Tasks().task(unique=fastq.Unique(until, by=by))(handler)
    fastq.Tasks().task(unique=fastq.Unique(until, by=by))(anything)
    fastq.Tasks().task(unique=fastq.Unique(until, by="user_id"))(handler)


def test_a_class_is_no_task() -> None:
    with pytest.raises(TaskDefinitionError, match="@task decorates a function, not <class 'int'>"):
        fastq.Tasks().task(int)


def test_a_lifespan_is_an_async_generator() -> None:
    def plain() -> Any:
        yield {}

    async def returns() -> Any:
        return {}

    for wrong in (plain, returns, None):
        with pytest.raises(TaskDefinitionError, match="is no async generator: 'async def' with one 'yield'"):
            fastq.FastQ("redis://127.0.0.1:1").lifespan(wrong)  # type: ignore[arg-type]  # what is tested


def test_a_misspelt_argument_is_named() -> None:
    arguments = Arguments("send", handler, lambda parameter, annotation: False)
    with pytest.raises(
        InvalidArguments, match=r"task 'send': no argument 'usr_id' - did you mean 'user_id'\?; its sig"
    ):
        arguments.encode((), {"usr_id": 1})
    with pytest.raises(InvalidArguments, match="missing a required argument: 'user_id'; its"):
        arguments.encode((), {})


def test_the_burst_of_a_rate_stays_when_the_rate_changes() -> None:
    rule = read_rule({"rate_per_second": 20, "burst": 20})
    assert str(rule.changed(read_rule({"rate": "5/s"}))) == "5/s burst 20"
    assert str(rule.changed(read_rule({"rate_per_second": 5, "burst": 7}))) == "5/s burst 7"
    assert str(read_rule({"rate": "20/s"}).changed(read_rule({"rate": "5/s"}))) == "5/s"
    assert str(rule.changed(read_rule({"limit": 5, "window_seconds": 60}))) == "5 in any 60 s"
    assert rule.changed(Rule(max_concurrent=3)).rate == rule.rate
