"""The test helper for invariant I1: what `fastq check` finds on a server, without its command line."""

from __future__ import annotations

from fastq.broker.checker import Checked, check
from fastq.broker.connection import SyncConnection
from fastq.broker.url import parse_url


def checked(url: str, *queues: str, repair: bool = False, prefix: str = "fastq") -> Checked:
    """Look at a live server, or mend what is there."""
    connection = SyncConnection.to(parse_url(url))
    try:
        return connection.run(check(prefix, queues or None, repair=repair))
    finally:
        connection.close()


def assert_sound(url: str) -> Checked:
    """Every job is in exactly one place, and nothing belongs to nothing."""
    found = checked(url)
    assert found.complete
    assert [str(fault) for fault in found.faults] == []
    return found
