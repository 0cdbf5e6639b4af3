"""fastq.Depends: what a handler needs, made for each run; a handler without it is the user's own function."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Annotated

import pytest

import fastq
from fastq.testing import Kit

steps: list[str] = []


class Session:
    def __init__(self, name: str) -> None:
        self.name = name


def settings() -> str:
    steps.append("settings")
    return "db"


async def session(name: str = fastq.Depends(settings), pool: str = fastq.State("pool")) -> AsyncIterator[Session]:
    steps.append("open")
    try:
        yield Session(f"{name}@{pool}")
    except ValueError:
        steps.append("rollback")
        raise
    finally:
        steps.append("close")


SessionDep = Annotated[Session, fastq.Depends(session)]


def opened(job: fastq.JobContext, name: str = fastq.Depends(settings)) -> Iterator[str]:
    steps.append(f"begin {job.task}")
    yield f"{name} for {job.task}"
    steps.append("end")


def make_app() -> fastq.FastQ:
    steps.clear()
    app = fastq.FastQ("memory://")

    @app.lifespan
    async def resources() -> AsyncIterator[dict[str, str]]:
        yield {"pool": "pool"}

    return app


async def test_what_a_handler_depends_on_is_made_once_per_run_and_tidied_up():
    app = make_app()

    @app.task
    async def save(row: int, db: SessionDep, name: str = fastq.Depends(settings)) -> str:
        steps.append("run")
        return f"{row} {db.name} {name}"

    async with Kit(app) as kit:
        first, second = await save.enqueue(1), await save.enqueue(row=2)
        await kit.drain()
        assert (await first.result(), await second.result()) == ("1 db@pool db", "2 db@pool db")
    assert sorted(steps) == sorted(["settings", "open", "run", "close"] * 2)
    with pytest.raises(fastq.InvalidArguments):
        await save.enqueue(1, db="x")  # type: ignore[arg-type]


async def test_a_generator_sees_how_the_handler_ended():
    app = make_app()

    @app.task(max_attempts=1)
    async def broken(db: SessionDep) -> None:
        raise ValueError(db.name)

    async with Kit(app) as kit:
        job = await broken.enqueue()
        assert (await kit.drain()).failed == 1
        with pytest.raises(fastq.JobFailed, match="db@pool"):
            await job.result()
    assert steps == ["settings", "open", "rollback", "close"]


async def test_plain_handlers_depend_on_plain_functions():
    app = make_app()

    @app.task
    def sync(n: int, name: str = fastq.Depends(opened)) -> str:
        return f"{n} {name}"

    async with Kit(app) as kit:
        job = await sync.enqueue(7)
        await kit.drain()
        assert await job.result() == "7 db for sync"
    assert steps == ["settings", "begin sync", "end"]


async def test_a_handler_is_a_function_that_takes_the_value_as_an_argument():
    """F383: no queue, no patching."""
    app = make_app()

    @app.task
    async def save(row: int, db: SessionDep) -> str:
        return f"{row} {db.name}"

    @app.task
    async def named(name: str = fastq.Depends(settings)) -> str:
        return name

    assert await save(1, Session("fake")) == "1 fake"
    assert await save(1, db=Session("fake")) == "1 fake"
    assert await named() == "db"
    with pytest.raises(fastq.FastQError, match="session needs the running job for 'pool'"):
        await save(1)  # type: ignore[call-arg]


def test_a_handler_without_is_the_users_own_function():
    """It costs nothing: there is nothing between the worker and the function."""
    app = make_app()

    async def plain(n: int, job: fastq.JobContext) -> None: ...

    assert app.task(plain).fn is plain


def needy(unfilled: int) -> None: ...


@pytest.mark.parametrize(
    ("dependency", "words"),
    [
        (needy, "nothing fills the parameter 'unfilled' of needy"),
        (session, "is a plain function and depends on session, which is async"),
        ("text", "Depends\\('text'\\) is not a function"),
    ],
)
def test_what_cannot_work_is_told_at_the_definition(dependency: object, words: str):
    app = make_app()

    def handler(x: object = fastq.Depends(dependency)) -> None: ...  # type: ignore[arg-type]

    with pytest.raises(fastq.TaskDefinitionError, match=words):
        app.task(handler)


def test_a_circle_is_told():
    def around(x: object = None) -> None: ...

    around.__defaults__ = (fastq.Depends(around),)

    def handler(x: object = fastq.Depends(around)) -> None: ...

    with pytest.raises(fastq.TaskDefinitionError, match="around depends on itself"):
        make_app().task(handler)


async def forgiving() -> AsyncIterator[str]:
    try:
        yield "session"
    except BaseException as error:
        steps.append(f"rollback for {type(error).__name__}")


def forgiving_too() -> Iterator[str]:
    try:
        yield "session"
    except BaseException as error:
        steps.append(f"rollback for {type(error).__name__}")


def away() -> str:
    raise ConnectionError("the mail server is away")


async def test_a_dependency_that_swallows_the_error_makes_no_success_of_it():
    app = make_app()

    @app.task(max_attempts=1)
    async def broken(db: str = fastq.Depends(forgiving)) -> None:
        raise ValueError(db)

    @app.task(max_attempts=1)
    def broken_too(db: str = fastq.Depends(forgiving_too)) -> None:
        raise fastq.Fail(db)

    @app.task(max_attempts=1)
    async def never_run(db: str = fastq.Depends(forgiving), mail: str = fastq.Depends(away)) -> None:
        steps.append("run")

    async with Kit(app) as kit:
        jobs = [await broken.enqueue(), await broken_too.enqueue(), await never_run.enqueue()]
        assert (await kit.drain()).failed == 3
        for job, words in zip(jobs, ("ValueError: session", "Fail: session", "the mail server is away"), strict=True):
            with pytest.raises(fastq.JobFailed, match=words):
                await job.result()
    assert sorted(steps) == ["rollback for ConnectionError", "rollback for Fail", "rollback for ValueError"]


class Opened:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> Iterator[str]:
        yield self.name
        steps.append(f"close {self.name}")


class OpenedLater(Opened):
    async def __call__(self) -> AsyncIterator[str]:  # type: ignore[override]
        yield self.name
        steps.append(f"close {self.name}")


async def test_an_instance_is_called_as_the_function_that_it_is():
    app = make_app()

    @app.task
    async def save(one: str = fastq.Depends(Opened("one")), two: str = fastq.Depends(OpenedLater("two"))) -> str:
        return f"{one} {two}"

    async with Kit(app) as kit:
        job = await save.enqueue()
        await kit.drain()
        assert await job.result() == "one two"
    assert steps == ["close two", "close one"]
