"""Where the processes of ``isolation="process"`` come from: forked by a process that never had a thread or an event loop.

A worker forks the nursery before it imports anything of the application, and tells it once whether it is needed::

    worker ── nursery ── template (imports the application) ── one process per isolated handler that runs

The template imports the application and forks: a new process is there in milliseconds and shares its memory. If importing
starts threads (OpenBLAS does, and many agents), a fork of the template would copy their locks: it leaves, and the nursery
forks processes that import the application themselves, which takes as long as that takes.

Every one of them is killed by the kernel when its parent dies (Linux), and leaves at end of file on its socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

from fastq.app import FastQ

__all__ = ["ENDED", "FORK", "KILL", "RECORD", "STARTED", "Nursery"]

RECORD = struct.Struct("<cqqq")
"""One message: what, a pid, an exit status, bytes of memory."""

FORK, KILL, NEEDED = b"F", b"K", b"N"  # to the nursery; FORK carries the new process's socket
STARTED, ENDED = b"S", b"E"  # from it; STARTED in the order of FORK, ENDED as waitpid() said it
_UNFIT = 75  # exit code of a template that has threads


class Nursery:
    """A worker's side of it. Make it while the process has one thread, and before the application is imported.

    Args:
        load: imports the application; called in the other process.
        live: what a new process does with the application and its socket; its return ends it.
    """

    def __init__(self, load: Callable[[], FastQ], live: Callable[[FastQ, socket.socket], None]) -> None:
        self.control, theirs = socket.socketpair()
        parent = os.getpid()
        self._pid = _split()
        if self._pid == 0:
            self.control.close()
            _nurse(parent, theirs, load, live)
        theirs.close()
        self.closed = False

    def open(self) -> None:
        """It is needed: prepare."""
        self.control.sendall(RECORD.pack(NEEDED, 0, 0, 0))

    def close(self) -> None:
        """End every process that came from it, and wait for that."""
        self.closed = True
        self.control.close()
        patience = time.monotonic() + 0.5  # it may be importing the application
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(self._pid, os.WNOHANG)[0] == 0:
                if time.monotonic() > patience:
                    os.kill(self._pid, signal.SIGKILL)  # its family is killed with it
                time.sleep(0.001)


def _nurse(
    parent: int, control: socket.socket, load: Callable[[], FastQ], live: Callable[[FastQ, socket.socket], None]
) -> NoReturn:
    try:
        _die_with(parent)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
            signal.signal(number, signal.SIG_IGN)  # what the worker does about them, it tells by its socket
        if control.recv(RECORD.size):
            me = os.getpid()
            template = _split()
            if template == 0:
                _die_with(me)
                app = load()
                if _threads() > 1:
                    os._exit(_UNFIT)
                _serve(control, lambda: app, live)
            if os.waitstatus_to_exitcode(os.waitpid(template, 0)[1]) == _UNFIT:
                _serve(control, load, live)
    finally:
        os._exit(0)


def _serve(control: socket.socket, load: Callable[[], FastQ], live: Callable[[FastQ, socket.socket], None]) -> None:
    """Fork, kill and bury, as told; at end of file, or if anything fails, kill all and leave."""
    children: set[int] = set()
    bell, ring = os.pipe()
    for end in (bell, ring):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        while True:
            readable = select.select([control.fileno(), bell], [], [])[0]
            if bell in readable:
                os.read(bell, 4_096)
                _bury(control, children)
            if control.fileno() in readable:
                data, fds, _, _ = socket.recv_fds(control, RECORD.size, 1)
                if not data:
                    return
                what, pid, _, _ = RECORD.unpack(data)
                if what == FORK:
                    children.add(_fork(control, bell, ring, fds[0], load, live))
                elif what == KILL and pid in children:
                    _kill(pid)
    finally:
        for pid in children:
            _kill(pid)
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        os._exit(0)


def _fork(
    control: socket.socket,
    bell: int,
    ring: int,
    fd: int,
    load: Callable[[], FastQ],
    live: Callable[[FastQ, socket.socket], None],
) -> int:
    parent = os.getpid()
    pid = _split()
    if pid == 0:
        try:
            os.setpgid(0, 0)  # what its handler starts is killed with it
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
                signal.signal(number, signal.SIG_DFL)
            _die_with(parent)
            control.close()
            os.close(bell)
            os.close(ring)
            live(load(), socket.socket(fileno=fd))
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(0)
    os.close(fd)
    control.sendall(RECORD.pack(STARTED, pid, 0, 0))
    return pid


def _split() -> int:
    """``os.fork()`` without the warning that Python 3.12 and 3.13 give by mistake: they look for the number of threads in
    /proc/self/stat by counting spaces, and the title of this process has some. There is one thread here, see above.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _bury(control: socket.socket, children: set[int]) -> None:
    for pid in list(children):
        with contextlib.suppress(ChildProcessError):
            found, status, usage = os.wait4(pid, os.WNOHANG)
            if found:
                children.discard(pid)
                control.sendall(RECORD.pack(ENDED, pid, status, usage.ru_maxrss << 10))


def _kill(pid: int) -> None:
    """It is our child and not waited for: the number is nobody else's."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _threads() -> int:
    """Threads of this process, those that C code started included."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()
