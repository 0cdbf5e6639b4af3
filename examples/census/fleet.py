"""The processes: `fastq supervise` as a user would start it, and its end whatever happens to the demo."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

CONCURRENCY = 4  # handlers at a time in one worker: they are bound by the CPU
GRACE = 3.0  # seconds for handlers that run when Ctrl-C comes

# It reads until the demo's end of the pipe closes, however the demo ends (even by SIGKILL), and kills the supervisor then:
# the others go by themselves when they see that.
WATCHDOG = 'read -r _ || kill -KILL "$1" 2>/dev/null'


class Fleet:
    """A supervisor with its workers, scheduler and monitor, as a context manager. Its log goes to `log`."""

    def __init__(self, app: str, *, workers: int, url: str, journal: Path, log: Path) -> None:
        self.log = log
        self.metrics_port = free_port()
        self._command = [
            *(sys.executable, "-m", "fastq", "supervise", app),
            *("--workers", str(workers), "--concurrency", str(CONCURRENCY)),
            *("--grace", str(GRACE), "--metrics-port", str(self.metrics_port)),
        ]
        self._environment = os.environ | {"FASTQ_REDIS_URL": url, "CENSUS_JOURNAL": str(journal)}
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is for the demo, which then stops the fleet.
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG, "demo-watchdog", str(self._process.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        return self

    @property
    def exit_status(self) -> int | None:
        """The supervisor's; None while it runs."""
        return None if self._process is None else self._process.poll()

    def stop(self) -> int:
        """Drain, and return the supervisor's exit status; it is told more and more firmly."""
        assert self._process is not None
        for number, patience in ((signal.SIGTERM, GRACE + 10.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, None)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.send_signal(number)  # does nothing once it has ended
                self._process.wait(patience)
                break
        if self._watchdog is not None:
            with contextlib.suppress(BrokenPipeError):
                self._watchdog.communicate(b"\n")
            self._watchdog = None
        return self._process.returncode

    def log_tail(self, lines: int = 12) -> str:
        """The last lines that the fleet has logged."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.stop()


def free_port() -> int:
    """A loopback port that nobody has now. Should somebody take it meanwhile, the demo merely shows less."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
