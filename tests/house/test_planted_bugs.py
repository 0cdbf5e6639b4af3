"""The fault suite can fail: each of its files is also run against a planted bug, and every plant is used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.chaos.planted import PLANTS

TESTS = Path(__file__).parents[1]
FILES = sorted((TESTS / "chaos").glob("test_*.py"))
FINDS = re.compile(r"^(?:async )?def test_\w+_(?:is|are)_found\(", re.MULTILINE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_part_meets_a_planted_bug(file: Path) -> None:
    """A test that nothing turns red proves nothing: by convention the one that shows it is named `…_is_found`."""
    assert FINDS.search(file.read_text()), f"{file.name} is not run against any planted bug"


def test_every_plant_is_used() -> None:
    """Names in quotes, alone or in a list with commas, outside the file that plants them."""
    words: set[str] = set()
    for path in TESTS.rglob("*.py"):
        if path.name != "planted.py":
            for text in re.findall(r'"([a-z_,]+)"', path.read_text()):
                words.update(text.split(","))
    assert set(PLANTS) <= words
