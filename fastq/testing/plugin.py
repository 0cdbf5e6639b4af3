"""The pytest plugin: fixtures for applications that run on fastq. It imports nothing until a test asks for one of them.

The application under test is named in pytest's configuration, ``fastq_app = "shop.jobs:app"``; without it every test has a new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fastq.app import FastQ
    from fastq.testing.kit import Kit

__all__ = ["fastq_app", "fastq_kit"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """``fastq_app`` in the configuration file."""
    parser.addini("fastq_app", "the fastq application under test, as package.module:name (default: a new one per test)")


@pytest.fixture
def fastq_kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    """The application under test on an empty private server: drain, assert_enqueued, advance, faults; see fastq.testing.Kit."""
    from fastq.testing.kit import Kit

    named = str(request.config.getini("fastq_app"))
    with Kit(_load(named) if named else None) as kit:
        yield kit


@pytest.fixture
def fastq_app(fastq_kit: Kit) -> FastQ:
    """The application of ``fastq_kit``."""
    return fastq_kit.app


def _load(path: str) -> FastQ:
    from fastq.launch import open_app

    return open_app(path)
