"""Tags: which jobs carry one. Pure.

A tag is a set of job ids in each queue, written before the jobs are (``tag.lua``). Jobs do not know of their tags, and what ends them
does not either: an entry whose job is gone is dropped when it is met. ``tagged.py`` cancels all jobs of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from fastq.broker.command import Command
from fastq.broker.keys import QueueKeys
from fastq.errors import InvalidOption

__all__ = ["CHUNK", "check_tag", "check_tags", "tag", "tagging"]

KEPT_MS = 30 * 86_400_000
"""How long a tag is remembered after the last job with it was due."""

MOST_TAGS = 10
CHUNK = 500
"""Jobs that one call tags, or one round trip cancels."""

_TAG = re.compile(r"[A-Za-z0-9_.:@/=+-]{1,100}\Z")


def check_tag(name: object) -> str:
    """A tag.

    Raises:
        InvalidOption: it is not 1 to 100 characters of A-Z a-z 0-9 _ . : @ / = + -.
    """
    if not isinstance(name, str) or not _TAG.match(name):
        raise InvalidOption(f"tag {name!r:.120} is not 1 to 100 characters of A-Z a-z 0-9 _ . : @ / = + -")
    return name


def check_tags(tags: object) -> tuple[str, ...]:
    """The tags of a call: up to 10, each one once.

    Raises:
        InvalidOption: they are no list of tags.
    """
    if isinstance(tags, str) or not isinstance(tags, Sequence | set | frozenset) or len(tags) > MOST_TAGS:
        raise InvalidOption(f"tags={tags!r:.120} is not a list of up to {MOST_TAGS} tags")
    return tuple(dict.fromkeys(map(check_tag, tags)))


def tag(q: QueueKeys, name: str, ids: Sequence[str], ttl_ms: int) -> Command[int]:
    """Write the tag of up to 500 jobs down, before they are stored. Returns how many entries it has."""
    return Command("tag", (q.jobs, q.tag(name)), (ttl_ms, *ids), int)


def tagging(q: QueueKeys, tagged: Sequence[tuple[str, Sequence[str], int]]) -> Iterator[Command[int]]:
    """The commands for jobs of one queue: id, tags, milliseconds until it is due."""
    by_tag: dict[str, list[tuple[str, int]]] = {}
    for job_id, names, delay_ms in tagged:
        for name in names:
            by_tag.setdefault(name, []).append((job_id, delay_ms))
    for name, jobs in by_tag.items():
        ttl = KEPT_MS + max(0, *(delay for _, delay in jobs))
        for first in range(0, len(jobs), CHUNK):
            yield tag(q, name, [job_id for job_id, _ in jobs[first : first + CHUNK]], ttl)
