"""The Lua scripts: read from the package, includes expanded, addressed by SHA-1.

EVALSHA and not FUNCTION LOAD: two releases of fastq may run side by side on one Redis, each with its own scripts.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

__all__ = ["Script", "load", "names"]

FOLDER = Path(__file__).parent.parent / "lua"
_INCLUDE = re.compile(r'^--- @include "([a-z_]+)"\n', re.MULTILINE)


class Script:
    """One expanded script: ``name``, ``text`` and ``sha`` (40 hex characters as bytes)."""

    __slots__ = ("name", "sha", "text")

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text.encode()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()


def expand(name: str) -> str:
    """The text of a script with each ``--- @include "x"`` line replaced by ``lua/include/x.lua``."""
    text = (FOLDER / f"{name}.lua").read_text("utf-8")
    return _INCLUDE.sub(lambda match: (FOLDER / "include" / f"{match[1]}.lua").read_text("utf-8"), text)


def names() -> list[str]:
    """The names of all scripts: there is one for each file."""
    return sorted(path.stem for path in FOLDER.glob("*.lua"))


@functools.cache
def load(name: str) -> Script:
    """The script of this name, read once per process."""
    return Script(name, expand(name))
