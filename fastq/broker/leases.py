"""One pure function per script of leaders and locks: arguments in, a :class:`Command` out, its reply decoded."""

from __future__ import annotations

from typing import NamedTuple

from fastq.broker.command import Command
from fastq.broker.keys import LeaseKeys


class Leased(NamedTuple):
    """``token`` of the holding, 0: somebody else has it or nobody; ``left_ms`` until it ends, 0: it is free."""

    token: int
    left_ms: int


def take_lease(k: LeaseKeys, owner: str, ttl_ms: int) -> Command[Leased]:
    """Take it if it is free. ``owner`` is new for each holding, and the same for a repetition."""
    return Command("lease", (k.lease, k.wake), (owner, "take", ttl_ms), Leased._make)


def renew_lease(k: LeaseKeys, owner: str, ttl_ms: int) -> Command[Leased]:
    """Let it end ``ttl_ms`` from now, unless it has ended."""
    return Command("lease", (k.lease, k.wake), (owner, "renew", ttl_ms), Leased._make)


def release_lease(k: LeaseKeys, owner: str) -> Command[Leased]:
    """Give it up, and wake one that waits."""
    return Command("lease", (k.lease, k.wake), (owner, "release", 0), Leased._make)
