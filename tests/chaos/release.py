"""Another release of fastq, built into a folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.process.fleet import Fleet

__all__ = ["build", "make_old"]

BEFORE = Path(__file__).with_name("release_before.tar.gz")
"""Commit 48dc488, the last one before anything of the fault suite: the release next to which this one has to work
(docs/releases.md). It is kept as an archive, so that a checkout without history can be tested, too.
"""


def build(folder: Path) -> Path:
    """The release, compiled, in a folder below ``folder``; its path."""
    place = folder / "release-48dc488"
    place.mkdir()
    subprocess.run(["tar", "-xzf", str(BEFORE), "-C", str(place)], check=True)
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=place, capture_output=True, check=False
    )
    assert built.returncode == 0, built.stderr.decode()
    shutil.rmtree(place / "build")
    return place


def make_old(fleet: Fleet, release: Path) -> Fleet:
    """Let a fleet that is not started yet run another release."""
    fleet.environ["PYTHONPATH"] = f"{release}{os.pathsep}{fleet.environ['PYTHONPATH']}"
    return fleet
