"""Another release of fastq, built from this repository's history into a folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.process.fleet import ROOT, Fleet

__all__ = ["BEFORE", "build", "make_old"]

BEFORE = "48dc4887f41309a01f74adf4e1325fb6147928b4"
"""The last commit before anything of the fault suite: the release next to which this one has to work (docs/releases.md)."""


def git(*words: str) -> subprocess.CompletedProcess[bytes]:
    """Run git on this checkout, whoever owns it."""
    return subprocess.run(["git", "-c", "safe.directory=*", "-C", str(ROOT), *words], capture_output=True, check=False)


def build(folder: Path, commit: str = BEFORE) -> Path:
    """The release of a commit, compiled, in a folder below ``folder``; its path.

    Raises:
        AssertionError: this checkout does not have the commit, and cannot fetch it.
    """
    if git("cat-file", "-e", f"{commit}^{{commit}}").returncode:
        git("fetch", "--quiet", "--unshallow")
    archive = git("archive", commit, "fastq", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    assert archive.returncode == 0, f"no {commit[:7]} here, run `git fetch --unshallow`: {archive.stderr.decode()}"
    place = folder / f"release-{commit[:7]}"
    place.mkdir()
    subprocess.run(["tar", "-x", "-C", str(place)], input=archive.stdout, check=True)
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
