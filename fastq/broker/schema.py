"""Which version of the keys in Redis this release works with (docs/releases.md, docs/adr/0017-releases.md).

The version lies in one key per prefix. Workers, consumers, schedulers and the command line look at it before they touch
anything; who finds one that it does not know refuses to start. A producer asks for it with the first words of each connection
(greeting.py), so that it costs no job anything. Additions do not change it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastq.broker.command import Command, Operation, raw
from fastq.broker.keys import GlobalKeys
from fastq.errors import SchemaMismatch, safe_text

__all__ = ["KNOWN", "SCHEMA", "agree", "known", "look"]

SCHEMA = 1
"""The version that this release writes down where there is none."""

KNOWN: Sequence[int] = (SCHEMA,)
"""The versions that it can work with."""


def agree(prefix: str) -> Operation[None]:
    """Write the version down, or agree with the one that is there.

    Raises:
        SchemaMismatch: this release does not know it.
    """
    keys = GlobalKeys(prefix)
    found: bytes = yield Command("agree", (keys.schema,), (SCHEMA,), bytes)
    known(found, prefix)


def look(prefix: str) -> Operation[None]:
    """The same, without writing anything.

    Raises:
        SchemaMismatch: see :func:`agree`.
    """
    found: bytes | None = yield raw("GET", GlobalKeys(prefix).schema)
    if found is not None:
        known(found, prefix)


def known(found: bytes, prefix: str) -> None:
    """Return if this release knows the version that was found under this prefix.

    Raises:
        SchemaMismatch: it does not.
    """
    if found in [b"%d" % version for version in KNOWN]:
        return
    shown = safe_text(found.decode("utf-8", "replace"), 20)
    newer = not found.isdigit() or int(found[:20]) > max(KNOWN)
    wanted = " or ".join(map(str, KNOWN))
    what = (
        "a newer release has changed it: upgrade this one"
        if newer
        else "it is too old for this release: see docs/releases.md"
    )
    raise SchemaMismatch(
        f"the keys under {prefix!r} have version {shown}, this fastq works with {wanted}; {what}, or use another prefix"
    )
