"""The witness: a file to which every worker appends what its handlers do, so that the queue need not be believed."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import NamedTuple, Self


class Event(NamedTuple):
    """One line. `at` is `time.monotonic()`, one clock for all processes of the machine."""

    what: str  # up: a worker serves; start, stumble, end: of a handler
    pid: int
    at: float
    job: str
    attempt: int


class Journal:
    """The writer of one process. A line is one write(2) at the end of the file: a killed process leaves whole lines."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, what: str, job: str = "-", attempt: int = 0) -> None:
        os.write(self._fd, f"{what} {os.getpid()} {time.monotonic():.6f} {job} {attempt}\n".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


class Reader:
    """Reads the journal as it grows; `events` holds all that was read."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._at = 0
        self.events: list[Event] = []

    def read_on(self) -> list[Event]:
        """The events since the last call."""
        if not os.path.exists(self._path):
            return []
        with open(self._path, "rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        new = [_event(line) for line in whole.decode().splitlines()]
        self.events += new
        return new


def _event(line: str) -> Event:
    what, pid, at, job, attempt = line.split()
    return Event(what, int(pid), float(at), job, int(attempt))
