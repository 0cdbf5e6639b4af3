"""One queue on a real server: the scripts called through the mover, the keys read through redis-py."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from fastq import job
from fastq.broker import commands
from fastq.broker.command import Command
from fastq.broker.commands import Batch, NewJob, Recovered, Refused, Reserved, Settled
from fastq.broker.connection import SyncConnection
from fastq.broker.keys import PAD, QueueKeys
from fastq.broker.url import parse_url

LEASE = 60_000  # ms: no lease runs out in a test by itself
FAR = 1_000_000_000  # ms: never due in a test
LEVELS = [f"ready:{priority}" for priority in range(11)]


def envelope(priority: int = 5, tag: str = "t") -> bytes:
    """The same bytes for the same arguments."""
    return job.encode(job.Envelope(priority, 1, tag, b"\x90", 0))


class Near:
    """Equal to any time in ms from the lab's start to now, both moved by `delay`."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, lab: Lab, delay: int = 0) -> None:
        self.lab = lab
        self.delay = delay

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and self.lab.started <= other - self.delay - self.lab.skew <= self.lab.now()

    def __repr__(self) -> str:
        return f"<{self.lab.started} to now, plus {self.delay}>"


class Lab:
    """Calls with short arguments, and `keys()`: everything that the queue has in Redis."""

    def __init__(self, url: str, raw: Any, queue: str = "default") -> None:
        self.url = url
        self.raw = raw
        self.conn = SyncConnection.to(parse_url(url))
        self.q = QueueKeys("fastq", queue)
        self.skew = 0  # ms by which a test has moved the clock of the scripts
        self.started = self.now()
        self._sequence = itertools.count(1)

    # -- calls ------------------------------------------------------------------------------------

    def call(self, command: Command[Any]) -> Any:
        return self.conn.call(command)

    def enqueue(
        self, *jobs: str | NewJob, priority: int = 5, producer: str = "p", sequence: int | None = None
    ) -> list[Refused]:
        """A job given as a string has that id and the envelope of `envelope(priority)`."""
        return self.call(self.enqueue_command(*jobs, priority=priority, producer=producer, sequence=sequence))

    def enqueue_command(
        self, *jobs: str | NewJob, priority: int = 5, producer: str = "p", sequence: int | None = None
    ) -> Command[list[Refused]]:
        new = [NewJob(j, envelope(priority)) if isinstance(j, str) else j for j in jobs]
        number = next(self._sequence) if sequence is None else sequence
        return commands.enqueue(self.q, priority, producer, number, new)

    def register(self, worker: str = "w", lease: int = LEASE) -> int:
        return self.call(commands.register(self.q, worker, lease, b"info"))

    def reserve(self, want: int = 10, worker: str = "w") -> Reserved:
        return self.call(commands.reserve(self.q, worker, want))

    def take(self, *ids: str, worker: str = "w") -> None:
        """Enqueue these jobs and let the worker, registered if need be, reserve them."""
        if not self.raw.exists(self.q.running(worker)):
            self.register(worker)
        self.enqueue(*ids)
        assert [i.decode() for i in self.reserve(len(ids), worker).ids] == list(ids)

    def settle(self, worker: str = "w", dead_max: int = 100, **sections: list[Any]) -> Settled:
        return self.call(self.settle_command(worker, dead_max, **sections))

    def settle_command(self, worker: str = "w", dead_max: int = 100, **sections: list[Any]) -> Command[Settled]:
        return commands.settle(self.q, worker, batch(**sections), dead_max)

    def recover(self, worker: str = "w", **options: Any) -> Recovered:
        return self.call(self.recover_command(worker, **options))

    def recover_command(self, worker: str = "w", **options: Any) -> Command[Recovered]:
        defaults = {"expired": False, "charge": "none", "max_deliveries": 3, "dead_max": 100, "error": b"lost"}
        return commands.recover(self.q, worker, **(defaults | options))

    def twice(self, command: Command[Any]) -> tuple[Any, Any]:
        """Send it, send it again as after a lost reply: the second call changes no key. Both replies."""
        first = self.call(command)
        before = self.keys()
        second = self.call(command)
        assert self.keys() == before
        return first, second

    # -- what is there, read with redis-py -------------------------------------------------------

    def now(self) -> int:
        seconds, micros = self.raw.time()
        return seconds * 1_000 + micros // 1_000

    def near(self, delay: int = 0) -> Near:
        return Near(self, delay)

    def key(self, name: str) -> str:
        return self.q.base + name

    def value(self, name: str) -> Any:
        """A hash as dict, a list as list, a set as set, a sorted set as list of (member, score), a string as bytes."""
        key = self.key(name)
        match self.raw.type(key):
            case b"hash":
                return {field.decode(): value for field, value in self.raw.hgetall(key).items()}
            case b"list":
                return [item.decode() for item in self.raw.lrange(key, 0, -1)]
            case b"set":
                return {member.decode() for member in self.raw.smembers(key)}
            case b"zset":
                return [(member.decode(), int(score)) for member, score in self.raw.zrange(key, 0, -1, withscores=True)]
            case b"string":
                return self.raw.get(key)
        return None

    def keys(self, *ignored: str) -> dict[str, Any]:
        """Every key of the server, without the queue's prefix; `ignored` names are left out."""
        names = (key.decode().removeprefix(self.q.base) for key in self.raw.keys("*"))
        return {name: self.value(name) for name in names if name not in ignored}

    def worker_keys(self, *ids: str, worker: str = "w") -> dict[str, Any]:
        """What the keys of one worker with a valid lease look like."""
        return {
            "workers": [(worker, self.near(LEASE))],
            "info": {worker: b"info"},
            f"running:{worker}": {PAD, *ids},
        }

    def ready(self) -> list[str]:
        """The pending ids as they lie in the lists, highest priority first."""
        return [item for name in reversed(LEVELS) for item in self.value(name) or ()]

    def jobs(self) -> set[str]:
        return set(self.value("jobs") or ()) - {PAD}


def batch(**sections: Iterable[Any]) -> Batch:
    """A Batch with these sections."""
    filled = Batch()
    for name, rows in sections.items():
        setattr(filled, name, list(rows))
    return filled


def texts(ids: Iterable[bytes]) -> list[str]:
    return [i.decode() for i in ids]
