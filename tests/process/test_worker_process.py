"""Worker processes with real forks and signals: drain, quiet, roll, recycle, hang, and what they say meanwhile."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process.fleet import Fleet

MakeFleet = Callable[..., Fleet]
READY = "fastq:{default}:ready:5"


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[MakeFleet]:
    """``make_fleet(url, **settings)``: a fleet that is not started yet."""
    with contextlib.ExitStack() as stack:

        def make(url: str, **settings: Any) -> Fleet:
            fleet = Fleet(tmp_path, url, **settings)
            stack.callback(fleet.close)
            return fleet

        yield make


# -- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [3, 10])
def test_sigterm_lets_running_jobs_finish_within_the_grace(
    make_fleet: MakeFleet, redis_url: str, raw: Any, concurrency: int
) -> None:
    """F-11: async and threaded handlers end in peace; nothing new begins; exit 0. With and without free slots."""
    fleet = make_fleet(redis_url, workers=1, concurrency=concurrency).serving()
    running = ["async", "thread", "obedient"]
    for key, task in zip(running, ["gated", "gated_thread", "obedient_thread"], strict=True):
        fleet.enqueue(task, key, str(fleet.gate()))
    fleet.until_started(*running)
    if concurrency == 3:
        fleet.enqueue_many("once", [("new1",), ("new2",)])
    fleet.send(signal.SIGTERM)
    assert fleet.until_logged("worker drains")[0]["running"] == 3
    fleet.gate().touch()
    asked = time.monotonic()
    assert fleet.wait() == 0
    assert time.monotonic() - asked < 1.0, "it waits for nothing else"
    story = fleet.story()
    assert story.done == set(running)
    assert story.starts.keys() == set(running)
    assert raw.llen(READY) == (2 if concurrency == 3 else 0)
    assert fleet.logged("stopped")[0]["killed"] == 0
