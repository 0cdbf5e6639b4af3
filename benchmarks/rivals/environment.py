"""Each rival in a virtual environment of its own, outside the checkout; a new pin makes a new one."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class Missing(RuntimeError):
    """This machine has no such rival, and why."""


def cache() -> Path:
    """Where environments are kept: ``FASTQ_BENCH_CACHE``, or a folder in the user's cache."""
    chosen = os.environ.get("FASTQ_BENCH_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fastq-benchmarks"


def interpreter(least: tuple[int, int]) -> str:
    """This interpreter, or for a rival that needs a newer one the oldest that is new enough.

    Raises:
        Missing: there is none.
    """
    if sys.version_info >= least:
        return sys.executable
    for minor in range(least[1], least[1] + 4):
        candidates = [f"python3.{minor}", *map(str, Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))]
        for name in candidates:
            if shutil.which(name) and not _run(name, "-c", "import venv").returncode:
                return name
    raise Missing(f"needs Python {least[0]}.{least[1]} or newer, and none was found")


def python(name: str, packages: Sequence[str], least: tuple[int, int] = (3, 11)) -> str:
    """The interpreter of the environment that holds exactly these pins, made when it is not there yet.

    Raises:
        Missing: the packages cannot be installed here.
    """
    base = interpreter(least)
    mark = hashlib.sha256(repr((sorted(packages), base)).encode()).hexdigest()[:10]
    folder = cache() / f"{name}-{mark}"
    binary = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        made = _run(base, "-m", "venv", str(folder))
        if not made.returncode:
            made = _run(str(binary), "-m", "pip", "install", "-q", *packages)
        if made.returncode:
            raise Missing(f"cannot be installed here: {made.stderr.strip().splitlines()[-1:]}")
        (folder / ".ready").touch()
    return str(binary)


def node(packages: Sequence[str]) -> Path:
    """A folder whose node_modules holds these pins.

    Raises:
        Missing: no node or npm, or the packages cannot be installed.
    """
    if not shutil.which("node") or not shutil.which("npm"):
        raise Missing("needs node and npm, and they are not on this machine")
    folder = cache() / f"node-{hashlib.sha256(repr(packages).encode()).hexdigest()[:10]}"
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        made = _run("npm", "install", "--silent", "--prefix", str(folder), *packages)
        if made.returncode:
            raise Missing(f"cannot be installed here: {made.stderr.strip().splitlines()[-1:]}")
        (folder / ".ready").touch()
    return folder


def ruby(library: str) -> None:
    """Ask the system's Ruby for a library.

    Raises:
        Missing: there is no Ruby, or it does not know the library.
    """
    if not shutil.which("ruby"):
        raise Missing("needs ruby, and it is not on this machine")
    if _run("ruby", "-e", f"require {library!r}").returncode:
        raise Missing(f"ruby has no {library} here (Debian: apt-get install ruby-{library})")


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)
