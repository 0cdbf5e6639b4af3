"""Paused tasks: what a pause is, and the commands that begin, list and end it. Pure.

A pause is an entry in a hash of each queue; its name is that of a limit which nothing passes. Workers read the hash once a
second and park the jobs that it means under that name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from fastq.broker.command import Command, raw
from fastq.broker.keys import QueueKeys
from fastq.errors import InvalidOption
from fastq.job import encode
from fastq.limits import partition_name

__all__ = ["Pause", "paused", "suspend_queue", "suspend_task", "unpause"]


class Pause(msgspec.Struct, frozen=True):
    """A task that is paused; with ``where``: only its calls with these arguments."""

    task: str
    where: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The limit under which its jobs are parked."""
        if not self.where:
            return "~paused/" + partition_name(self.task)
        return "~paused/~" + hashlib.sha256(encode([self.task, sorted(self.where.items())])).hexdigest()[:32]

    def holds(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments, by name, is meant."""
        return all(name in arguments and plain(arguments[name]) == value for name, value in self.where.items())

    def __str__(self) -> str:
        chosen = ", ".join(f"{name}={value!r:.100}" for name, value in self.where.items())
        return f"task {self.task}" + (f" where {chosen}" if chosen else "")


def plain(value: Any) -> Any:
    """A value as it looks after a journey: what arguments are compared as. Raises InvalidOption."""
    try:
        return msgspec.msgpack.decode(encode(value))
    except (TypeError, ValueError) as error:
        raise InvalidOption(f"{value!r:.100} cannot be compared with arguments: {error}") from None


def suspend_queue(q: QueueKeys) -> Command[bool]:
    """Pause all of a queue, whatever the memory. False: it was paused."""
    return Command("pause", (q.paused, q.paused_tasks), ("", ""), bool)


def suspend_task(q: QueueKeys, pause: Pause) -> Command[bool]:
    """Begin a pause, whatever the memory. False: it had begun."""
    return Command("pause", (q.paused, q.paused_tasks), (pause.name, encode(pause)), bool)


def paused(q: QueueKeys) -> Command[list[Pause]]:
    """All pauses of a queue; what cannot be read is left out."""
    return raw("HVALS", q.paused_tasks, decode=_pauses)


def unpause(q: QueueKeys, pause: Pause, want: int = 500) -> Command[tuple[bool, int, int]]:
    """End a pause. Returns whether there was one, how many jobs went back to their ready lists, how many are left."""
    keys = (q.paused_tasks, q.parked, q.parked_of, q.jobs, q.wake, *q.levels, q.parked_by(pause.name))
    return Command("unpause", keys, (pause.name, want), lambda reply: (reply[0] == 1, reply[1], reply[2]))


def _pauses(values: list[bytes]) -> list[Pause]:
    found = []
    for value in values:
        try:
            found.append(msgspec.msgpack.decode(value, type=Pause))
        except msgspec.MsgspecError:
            continue  # of another release, or somebody else's
    return sorted(found, key=str)
