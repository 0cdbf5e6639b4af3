"""The private server behind every kit lives as long as the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastq.broker.embedded import shared_server
from tests.conftest import LASTING, children


@pytest.fixture(scope="session", autouse=True)
def server_of_all_kits(pytestconfig: pytest.Config) -> Iterator[None]:
    before = children()
    server = shared_server()
    pytestconfig.stash[LASTING] |= children() - before
    yield
    server.stop()
