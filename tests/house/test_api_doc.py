"""docs/api.md is what the docstrings say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fastq

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "api.md"


def test_the_document_is_current() -> None:
    words = [sys.executable, str(ROOT / "tools" / "api_doc.py")]
    made = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    assert DOC.read_text("utf-8") == made, "run: python tools/api_doc.py > docs/api.md"


def test_every_public_name_has_a_chapter() -> None:
    headings = {line.removeprefix("### ") for line in DOC.read_text("utf-8").splitlines() if line.startswith("### ")}
    assert headings == set(fastq.__all__)
