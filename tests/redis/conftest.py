"""The queue that most tests of the scripts look at, and the event loops that the async mover runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop

from tests.redis.lab import Lab
from tests.redis.movers import Run


@pytest.fixture
def lab(redis_url: str, raw: Any) -> Iterator[Lab]:
    lab = Lab(redis_url, raw)
    yield lab
    lab.conn.close()


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs coroutines on the one event loop or the other."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner.run
