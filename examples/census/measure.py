"""The work: what is counted of one file. Knows nothing of queues."""

from __future__ import annotations

import hashlib
import io
import os
import tokenize
from pathlib import Path

LIBRARY = Path(os.__file__).parent

Measures = dict[str, int | str | None]


def files(limit: int | None = None) -> list[str]:
    """The library's Python files as paths relative to it, sorted; `limit` takes so many of them, evenly spread."""
    names = []
    for folder, inner, found in os.walk(LIBRARY):
        inner[:] = [name for name in inner if name not in {"site-packages", "dist-packages", "__pycache__"}]
        names += [os.path.relpath(os.path.join(folder, name), LIBRARY) for name in found if name.endswith(".py")]
    names.sort()
    if limit is None or limit >= len(names):
        return names
    return [names[i * len(names) // limit] for i in range(limit)]


def measure(name: str) -> Measures:
    """Size, SHA-256, line and token counts of one file."""
    data = (LIBRARY / name).read_bytes()
    return {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "lines": data.count(b"\n"),
        "tokens": tokens(data),
    }


def tokens(data: bytes) -> int | None:
    """How many tokens; None for the files that are wrong on purpose (the tests of Python's own tokenizer)."""
    try:
        return sum(1 for _ in tokenize.tokenize(io.BytesIO(data).readline))
    except (SyntaxError, tokenize.TokenError):
        return None
