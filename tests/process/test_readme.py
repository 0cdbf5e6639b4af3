"""The README's snippets are run, as they stand there."""

from __future__ import annotations

import asyncio
import re
import textwrap
from pathlib import Path

import pytest

import fastq
from tests.redis.workshop import working

README = (Path(__file__).parent.parent.parent / "README.md").read_text("utf-8")
SNIPPETS = dict(re.findall(r"<!-- test: (\S+) -->\n```python\n(.*?)```", README, re.DOTALL))


def test_every_python_snippet_is_known() -> None:
    """The two at the top show the same code that `calls` runs; the others carry a test mark."""
    assert len(re.findall(r"```python\n", README)) == len(SNIPPETS) + 2
    assert set(SNIPPETS) == {
        "tasks.py",
        "calls",
        "handlers",
        "schedules",
        "schedules-at-run-time",
        "limits",
        "limited",
        "results",
        "once",
        "workflows",
        "batches",
    }


def top_of_readme(url: str) -> dict[str, object]:
    """The application of the first snippet, on the test's Redis."""
    first = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    names: dict[str, object] = {}
    exec(first.replace("redis://localhost:6379/0", url), names)
    return names


async def test_the_calls(redis_url: str) -> None:
    """F060, F061, F067, F073."""
    names = top_of_readme(redis_url)
    code = "async def calls():\n" + textwrap.indent(SNIPPETS["calls"], "    ") + "\n    return job, status\n"
    exec(code, names)
    job, status = await names["calls"]()  # type: ignore[operator]
    assert (status.state, status.task) == ("pending", "send_email")
    assert (await job.status()).queue == "emails"
    app = names["app"]
    assert isinstance(app, fastq.FastQ)
    await app.aclose()


async def test_the_tour_runs(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """tasks.py: the first attempt fails, the second one says hello."""
    monkeypatch.setenv("FASTQ_REDIS_URL", redis_url)
    names: dict[str, object] = {}
    exec(SNIPPETS["tasks.py"].replace("base=1", "base=0.01"), names)
    app, greet = names["app"], names["greet"]
    assert isinstance(app, fastq.FastQ)
    async with working(app) as shop:
        status = await shop.ended(await greet.enqueue("world"))  # type: ignore[attr-defined]
    assert (status.result, status.attempts) == ("hello world", 2)


async def test_the_handlers_do_what_is_said(redis_url: str) -> None:
    app = fastq.FastQ(redis_url)
    names: dict[str, object] = {"app": app, "fastq": fastq}
    exec(SNIPPETS["handlers"], names)
    charge = names["charge"]
    async with working(app) as shop:
        failed = await shop.ended(await charge.enqueue(-1))  # type: ignore[attr-defined]
        snoozed = await charge.enqueue(0)  # type: ignore[attr-defined]
        while (await snoozed.status()).state != "scheduled":
            await asyncio.sleep(0.005)
        status = await snoozed.status()
    assert (failed.state, failed.last_error) == ("failed", "Fail: no such order")
    assert status.attempts == 0
    assert status.due_at - status.enqueued_at > 55


async def test_the_results(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    app = fastq.FastQ(redis_url, log_level="error")

    @app.task
    async def count_words(text: str) -> int:
        return len(text.split())

    names: dict[str, object] = {"app": app, "fastq": fastq, "count_words": count_words}
    exec("async def results():\n" + textwrap.indent(SNIPPETS["results"], "    ") + "\n    return words\n", names)
    async with working(app):
        assert await names["results"]() == 3  # type: ignore[operator]
    assert "'status': 'success'" in capsys.readouterr().out


def test_the_schedule_is_valid(redis_url: str) -> None:
    app = fastq.FastQ(redis_url)
    exec(SNIPPETS["schedules"], {"app": app})
    assert list(app.periodic) == ["report 30 4 * * 1-5"]


async def test_limited_tasks(redis_url: str) -> None:
    app = fastq.FastQ(redis_url, queues="default,emails")
    app.limiter("stripe_api", rate="100/s")
    exec(SNIPPETS["limited"], {"app": app})
    assert [each.limiter.id for each in app.limits_of("charge", "default")] == ["task:charge"]
    assert [each.limiter.id for each in app.limits_of("sync_tenant", "emails")] == [
        "queue:emails",
        "task:sync_tenant",
        "stripe_api",
    ]


async def test_the_schedules_at_run_time(redis_url: str) -> None:
    app = fastq.FastQ(redis_url)
    names: dict[str, object] = {"app": app}
    exec(SNIPPETS["schedules"], names)
    exec("async def life():\n" + textwrap.indent(SNIPPETS["schedules-at-run-time"], "    "), names)
    await names["life"]()  # type: ignore[operator]
    assert await app.list_scheduled() == []
    await app.aclose()


async def test_the_limits(redis_url: str) -> None:
    app = fastq.FastQ(redis_url)
    names: dict[str, object] = {"app": app, "fastq": fastq}
    exec("async def limits():\n" + textwrap.indent(SNIPPETS["limits"], "    ") + "\n    return stripe, pool\n", names)
    stripe, pool = await names["limits"]()  # type: ignore[operator]
    assert stripe.counts.units == 5
    assert (await pool.state()).holders == 0
    await app.aclose()


def test_the_once_snippet_is_valid(redis_url: str) -> None:
    app = fastq.FastQ(redis_url)
    exec(SNIPPETS["once"], {"app": app})
    assert list(app.tasks) == ["sync_account", "charge"]


async def test_the_workflows(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """F116, F118."""
    app = fastq.FastQ(redis_url)
    stored: list[object] = []

    @app.task
    async def download(url: str) -> str:
        return url

    @app.task
    async def parse(text: str) -> list[str]:
        return text.split()

    @app.task
    async def store(words: list[str], table: str) -> None:
        stored.append((words, table))

    @app.task
    async def count(page: str) -> int:
        return len(page)

    @app.task
    async def total(counts: list[int]) -> int:
        return sum(counts)

    @app.task
    async def alert(workflow: str) -> None: ...

    names: dict[str, object] = {**locals(), "url": "a b", "pages": ["x", "yy"]}
    exec("async def flows():\n" + textwrap.indent(SNIPPETS["workflows"], "    ") + "\n    return flow\n", names)
    async with working(app):
        await names["flows"]()  # type: ignore[operator]
        while not stored:
            await asyncio.sleep(0.005)
    assert capsys.readouterr().out == "3\n"
    assert stored == [(["a", "b"], "pages")]


async def test_the_batch(redis_url: str) -> None:
    """F130."""
    app = fastq.FastQ(redis_url)
    told: list[str] = []

    @app.task
    async def resize(image: str) -> None: ...

    @app.task
    async def report(batch: str) -> None:
        told.append(batch)

    names: dict[str, object] = {"app": app, "images": ["a", "b", "c"], "report": report}
    code = textwrap.indent(SNIPPETS["batches"], "    ")
    exec("async def batches():\n" + code + "\n    return batch, status\n", names)
    async with working(app):
        batch, status = await names["batches"]()  # type: ignore[operator]
        while not told:
            await asyncio.sleep(0.005)
    assert (status.state, status.total, status.success, told) == ("success", 3, 3, [batch.id])
