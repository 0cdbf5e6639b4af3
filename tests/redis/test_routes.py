"""Routes: the queue of a job by its task's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastq import FastQ
from fastq.config import load
from fastq.errors import ConfigError
from fastq.routes import parse_routes, route


@pytest.mark.parametrize(
    "routes",
    [
        "tasks.send_email=emails, report*=reports",
        {"tasks.send_email": "emails", "report*": "reports"},
        {"tasks.send_email": {"queue": "emails"}, "report*": {"queue": "reports"}},
    ],
)
async def test_the_table_decides_before_the_task_and_after_the_call(redis_url: str, routes: Any) -> None:
    """F143: by exact name and by pattern; a call that names a queue is right."""
    app = FastQ(redis_url, routes=routes)

    @app.task(name="tasks.send_email", queue="mail")
    async def send_email() -> None: ...

    @app.task
    def report_daily() -> None: ...

    @app.task(queue="own")
    async def other() -> None: ...

    assert (await send_email.enqueue()).queue == "emails"
    assert (await send_email.options(priority=8).enqueue()).queue == "emails"
    assert (await send_email.options(queue="now").enqueue()).queue == "now"
    assert report_daily.enqueue_sync().queue == "reports"
    assert (await other.enqueue()).queue == "own"
    assert (await app.enqueue("reports.of_another_service")).queue == "reports"
    assert (await app.enqueue("unheard_of")).queue == "default"
    assert set(await app.run(app.inspector.queues())) == {"emails", "now", "reports", "own", "default"}
    await app.aclose()
    app.close()


def test_the_first_pattern_that_matches_wins() -> None:
    routes = "a.b=exact,a.*=any_a,*=rest"
    assert [route(routes, task) for task in ("a.b", "a.c", "b")] == ["exact", "any_a", "rest"]
    assert route("A*=x", "a") is None, "names are as they are written"
    assert parse_routes("") == ()


def test_routes_in_the_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "fastq.toml"
    file.write_text('[routes]\n"tasks.*" = "bulk"\n')
    assert route(load(arguments={}, file=file, environ={}).settings.routes, "tasks.x") == "bulk"
    assert load(arguments={}, environ={"FASTQ_ROUTES": "a=b"}).settings.routes == "a=b"


@pytest.mark.parametrize("routes", ["emails", "a=not a queue", "=b", 7, {"a": 3.5}])
def test_a_table_that_cannot_be_read(routes: Any) -> None:
    with pytest.raises(ConfigError, match="routes"):
        FastQ("redis://localhost", routes=routes)
