"""``fastq workflow ID`` as a process: the tree with its states, cancel and retry, and what it says of what is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fastq
from fastq.errors import ExitCode
from tests.process.test_cli import ran
from tests.redis.workshop import working


class Shop:
    def __init__(self, url: str) -> None:
        self.app = fastq.FastQ(url, default_max_attempts=1)
        self.broken = True

        @self.app.task
        async def count(page: int) -> int:
            return page

        @self.app.task
        async def total(numbers: list[int]) -> int:
            if self.broken:
                raise ValueError("no sum")
            return sum(numbers)

        self.chord = fastq.chord([count.s(n) for n in range(3)], total.s())


@pytest.fixture
def shop(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.setenv("FASTQ_URL", redis_url)
    return Shop(redis_url)


async def test_a_workflow_from_its_start_to_its_end(shop: Shop, tmp_path: Path) -> None:
    """F121: its state can be looked at, and a failed one is sent on."""
    flow = await shop.chord.enqueue(name="pages")
    answer = ran(tmp_path, "workflow", flow.id)
    head, *tree, counts = answer.out.splitlines()
    assert (answer.code, head.split()[:3]) == (ExitCode.OK, ["pages", flow.id, "running"])
    assert tree == ["  ├ count ×3  [0-2]  active", "total  [4]  waiting"]
    assert counts == "4 jobs: 3 active, 1 waiting"
    async with working(shop.app):
        await flow.wait(10)
        said = json.loads(ran(tmp_path, "workflow", flow.id, "--json").out)
        assert (said["state"], said["counts"]) == ("failed", {"success": 3, "failed": 1})
        shop.broken = False
        assert "running" in ran(tmp_path, "workflow", flow.id, "--retry").out.splitlines()[0] or (
            await flow.wait(10)
        )  # it may have ended already
        assert await flow.result(10) == 3
    assert ran(tmp_path, "workflow", flow.id, "--queue", "default").out.splitlines()[-1] == "4 jobs: 4 success"


async def test_a_workflow_is_cancelled(shop: Shop, tmp_path: Path) -> None:
    flow = await shop.chord.enqueue()
    lines = ran(tmp_path, "workflow", flow.id, "--cancel").out.splitlines()
    assert (lines[0].split()[2], lines[-1]) == ("cancelled", "4 jobs: 3 cancelled, 1 skipped")
    status: Any = await flow.status()
    assert status.state == "cancelled"
    await shop.app.aclose()


async def test_what_cannot_be_done_with_a_workflow_is_told(shop: Shop, tmp_path: Path) -> None:
    """Exit status 1, and why: on stderr, below the tree."""
    flow = await shop.chord.enqueue()

    def refused(action: str) -> str:
        answer = ran(tmp_path, "workflow", flow.id, action)
        assert (answer.code, flow.id in answer.out) == (ExitCode.CRASH, True)
        return answer.err

    assert refused("--retry") == "fastq: nothing to retry: no job of it has failed\n"
    async with working(shop.app):
        await flow.wait(10)
    assert refused("--cancel") == "fastq: nothing to cancel: it has ended as failed\n"
    explained = ran(tmp_path, "explain", flow.id).out
    assert "dead-letter" not in explained
    assert f"a job of the workflow has failed: 'fastq workflow {flow.id}' shows which one" in explained
    assert ran(tmp_path, "dlq", "purge", "default", "--all", "--yes").code == ExitCode.OK
    assert refused("--retry") == "fastq: nothing to retry: the dead letters of its failed jobs are gone\n"


def test_a_workflow_that_is_not_there(shop: Shop, tmp_path: Path) -> None:
    answer = ran(tmp_path, "workflow", "0" * 24)
    assert answer.code != ExitCode.OK
    assert "no workflow" in answer.err
    assert "Traceback" not in answer.err
    shop.app.close()
