"""The supervisor's dealings with the machine: signals, pid file, systemd, process titles, changed source files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from fastq.errors import ConfigError

__all__ = ["Notifier", "PidFile", "SignalPipe", "SourceWatch", "set_title"]

_SKIPPED = {"node_modules", "__pycache__", "site-packages"}


def set_title(title: str) -> None:
    """Name this process in ps and top, if the optional ``setproctitle`` is installed."""
    try:
        from setproctitle import setproctitle
    except ImportError:
        return
    setproctitle(title)


class SignalPipe:
    """Turns signals into bytes: the C handler writes the number into a pipe, and the loop acts when it comes to it."""

    def __init__(self) -> None:
        self.fds = (-1, -1)
        self._before: dict[int, signal._HANDLER] = {}
        self._wakeup_before = -1

    def open(self, numbers: Collection[int]) -> None:
        """Take these signals over; main thread only."""
        self.fds = os.pipe()
        os.set_blocking(self.fds[0], False)
        os.set_blocking(self.fds[1], False)
        self._wakeup_before = signal.set_wakeup_fd(self.fds[1], warn_on_full_buffer=False)
        for number in numbers:
            self._before[number] = signal.signal(number, _only_wake) or signal.SIG_DFL
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # whoever started us may have blocked them

    def wait(self, seconds: float) -> bytes:
        """The signals that came in, one byte each; empty when none came within ``seconds``."""
        readable, _, _ = select.select([self.fds[0]], [], [], seconds)
        return os.read(self.fds[0], 4096) if readable else b""

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        if self.fds[0] < 0:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self.fds[0])
        os.close(self.fds[1])
        self.fds = (-1, -1)


def _only_wake(number: int, frame: object) -> None:
    """Do nothing: the number is in the pipe already."""


class PidFileHeld(ConfigError):
    """A live process has the pid file."""


class PidFile:
    """A file that holds the supervisor's pid and, locked, keeps a second one away. An empty path means none.

    The lock, not the number, says whether the file is held: a pid that survived a crash or a reboot blocks nobody.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.fd = -1

    def acquire(self) -> None:
        """PidFileHeld when a live process holds the file; ConfigError when it is no pid file or cannot be written."""
        if not self._path:
            return
        try:
            self.fd = self._lock()
            if os.read(self.fd, 32).strip(b"0123456789\n"):
                raise ConfigError(f"{self._path} exists and is no pid file; it is left alone")
            os.ftruncate(self.fd, 0)
            os.fchmod(self.fd, 0o600)
            os.pwrite(self.fd, b"%d\n" % os.getpid(), 0)
        except OSError as error:
            raise ConfigError(f"pid file {self._path} cannot be written: {error.strerror}") from error

    def release(self) -> None:
        """Remove the file, if it is ours, and unlock it."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                if self._is_current(self.fd) and os.pread(self.fd, 32, 0).strip() == b"%d" % os.getpid():
                    Path(self._path).unlink()  # before the lock goes: nobody else can hold it at this moment
            os.close(self.fd)
            self.fd = -1

    def _lock(self) -> int:
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
                os.close(fd)
                raise PidFileHeld(f"pid file {self._path} is held by the live process {pid}") from None
            if self._is_current(fd):
                return fd
            os.close(fd)  # its owner removed it between our open() and flock(): try the new one

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), Path(self._path).stat())
        except FileNotFoundError:
            return False


class Notifier:
    """Tells systemd how the service is, when it asks to be told (``NOTIFY_SOCKET``); otherwise does nothing."""

    def __init__(self, environ: dict[str, str] | os._Environ[str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        microseconds = environ.get("WATCHDOG_USEC", "")
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_every = 0.0
        """Seconds between two signs of life (half of what systemd allows); 0 = not wanted."""
        if self._address and ours and microseconds.isdigit():
            self.watchdog_every = int(microseconds) / 2_000_000

    def tell(self, *lines: str) -> None:
        """Send ``lines`` (``READY=1`` and the like). Never fails: a deaf systemd must not stop the work."""
        if not self._address:
            return
        import socket  # here only: opened for one message, so no child ever inherits it

        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
            door.setblocking(False)
            door.sendto("\n".join(lines).encode(), address)


class SourceWatch:
    """Notices changed, new and removed ``*.py`` files below some paths (``--reload``; for development)."""

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self._paths = [Path(path) for path in paths]
        self._seen = self._look()

    def __bool__(self) -> bool:
        return bool(self._paths)

    def changed(self) -> list[str]:
        """The files that are not as they were at the last call, sorted."""
        seen, self._seen = self._seen, self._look()
        return sorted({path for path, _ in seen.items() ^ self._seen.items()})

    def _look(self) -> dict[str, tuple[int, int]]:
        return {path: stamp for root in self._paths for path, stamp in _sources(root)}


def _sources(root: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    if root.is_file():
        yield from _stamps([root])
    for name, folders, files in os.walk(root):
        folder = Path(name)
        folders[:] = [inner for inner in folders if not _skipped(folder / inner)]
        yield from _stamps(folder / file for file in files if file.endswith(".py") and file[0] != ".")


def _stamps(paths: Iterable[Path]) -> Iterator[tuple[str, tuple[int, int]]]:
    for path in paths:
        with contextlib.suppress(OSError):  # removed while we look
            found = path.stat()
            yield str(path), (found.st_mtime_ns, found.st_size)


def _skipped(folder: Path) -> bool:
    """Hidden folders, dependencies and virtual environments: thousands of files that nobody edits."""
    return folder.name.startswith(".") or folder.name in _SKIPPED or (folder / "pyvenv.cfg").exists()
