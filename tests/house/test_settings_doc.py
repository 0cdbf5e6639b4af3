"""docs/settings.md is what the code says."""

from __future__ import annotations

from pathlib import Path

from fastq.config import Settings, document

DOC = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_document_is_current() -> None:
    assert DOC.read_text("utf-8") == document(), "run: python -m fastq.config > docs/settings.md"


def test_every_setting_has_a_line() -> None:
    lines = DOC.read_text("utf-8").splitlines()
    for name in Settings.__struct_fields__:
        (line,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        meaning = line.split("|")[-2].strip()
        assert len(meaning) > 15
        assert meaning.endswith(".")
