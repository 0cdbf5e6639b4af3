"""The queue that most tests of the scripts look at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.redis.lab import Lab


@pytest.fixture
def lab(redis_url: str, raw: Any) -> Iterator[Lab]:
    lab = Lab(redis_url, raw)
    yield lab
    lab.conn.close()
