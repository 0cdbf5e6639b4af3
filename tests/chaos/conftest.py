"""What every chaos test has: fleets, a seed that is printed (``CHAOS_SEED`` gives it), figures for the end of the run."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process.fleet import Fleet


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long and has a quicker brother is left to `make chaos`."""
    if "CHAOS_SCALE" not in os.environ:
        lengthy = [item for item in items if item.get_closest_marker("at_length")]
        config.hook.pytest_deselected(items=lengthy)
        items[:] = [item for item in items if item not in lengthy]


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """``make_fleet(url, **settings)``: a fleet that is not started yet."""
    with contextlib.ExitStack() as stack:

        def make(url: str, **settings: Any) -> Fleet:
            folder = tmp_path / f"fleet{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            fleet = Fleet(folder, url, **settings)
            stack.callback(fleet.close)
            return fleet

        yield make


@pytest.fixture
def dice(request: pytest.FixtureRequest, figure: Callable[[str], None]) -> random.Random:
    """Random numbers from a seed that is shown, in a failure and at the end."""
    seed = os.environ.get("CHAOS_SEED") or str(random.SystemRandom().randrange(10**9))
    figure(f"CHAOS_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """``figure("p99 0.1 s")``: shown with the test's name at the end of the run, whichever process runs the test."""

    def say(text: str) -> None:
        print(text)
        request.node.user_properties.append(("figure", text))

    return say


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures of all tests."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                for name, text in report.user_properties:
                    if name == "figure":
                        terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {text}")
