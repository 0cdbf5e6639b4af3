"""Routes: which queue a task's jobs go to, by its name; and how a file may write them, and the queues of a worker. Pure."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping
from typing import Any

from fastq.errors import ConfigError, safe_text

__all__ = ["parse_routes", "queues_text", "route", "routes_text"]


@functools.lru_cache(64)
def parse_routes(text: str) -> tuple[tuple[str, str], ...]:
    """Patterns of task names (``*``, ``?``, ``[…]``) and their queues, the first that matches wins.

    >>> parse_routes("tasks.send_email=emails, report*=reports")
    (('tasks.send_email', 'emails'), ('report*', 'reports'))

    Raises ConfigError.
    """
    routes = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        pattern, equals, queue = (word.strip() for word in part.partition("="))
        if not pattern or not equals:
            raise ConfigError(f"routes={safe_text(repr(text), 120)}: write 'tasks.send_email=emails,report*=reports'")
        routes.append((pattern, queue))
    return tuple(routes)


def route(text: str, task: str) -> str | None:
    """The queue that the routes have for a task; None when no pattern matches."""
    return next((queue for pattern, queue in parse_routes(text) if fnmatch.fnmatchcase(task, pattern)), None)


def routes_text(raw: Any) -> str:
    """A file or an argument may also hold a table, Celery's ``{"task": {"queue": "name"}}`` included."""
    if isinstance(raw, Mapping):
        pairs = ((name, to.get("queue", "") if isinstance(to, Mapping) else to) for name, to in raw.items())
        raw = ",".join(f"{name}={to}" for name, to in pairs)
    if not isinstance(raw, str):
        raise ConfigError(f"{safe_text(repr(raw), 120)} is no table of routes: write {{'tasks.send_email': 'emails'}}")
    return raw


def queues_text(raw: Any) -> str:
    """A file may also hold a list of names, or a table of weights."""
    if isinstance(raw, Mapping):
        raw = ",".join(f"{name}={weight}" for name, weight in raw.items())
    elif isinstance(raw, (list, tuple)):
        raw = ",".join(map(str, raw))
    if not isinstance(raw, str):
        raise ConfigError(
            f"{safe_text(repr(raw), 120)} is no list of queues: write 'critical,default' or 'critical=6,default=3'"
        )
    return raw
