"""One fork: what a child is made of, and what it does before its entry point is called."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from fastq.board import ChildContext, run_exit_functions
from fastq.errors import ConfigError, ExitCode
from fastq.supervisor.host import set_title

__all__ = ["ChildSpec", "by_role", "die_with_parent", "fork_child", "outlast", "reap_strangers", "refuse_threads"]

log = logging.getLogger("fastq.supervisor")

# Ctrl-C, a closed terminal and Ctrl-Z reach the whole process group, but the supervisor decides what they mean; the
# others may be forwarded before the child has set its handler, and their default action is to kill or to stop it.
_IGNORED = (
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_SYSTEMD = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """One kind of child. The supervisor knows children only by these fields, never by their names.

    ``entry`` is ``"package.module:function"``, imported in the child after the fork and called with a
    :class:`fastq.board.ChildContext`. What must be new after a rolling restart (the application) must not have been
    imported by the supervisor's process.
    """

    role: str
    entry: str
    count: int = 1
    settings: Any = None
    """Passed through to the child untouched."""
    takes_jobs: bool = False
    """It reserves jobs: the first one must boot before anything else starts; it is quieted, dumped, added and removed
    by signals; when it dies with a worker id, its slot stays DEAD until the monitor has handed its jobs back."""
    stop_last: bool = False
    """It looks after the others (the monitor): gets the read end of the control pipe, outlives a killed supervisor, is
    replaced even during a drain and stopped when everybody else is gone; a rolling restart leaves it alone unless its
    spec has changed."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count={self.count} of {self.role!r} must be at least 1")
        if ":" not in self.entry:
            raise ConfigError(f"entry={self.entry!r} of {self.role!r} must look like package.module:function")


def by_role(specs: Iterable[ChildSpec]) -> dict[str, ChildSpec]:
    """The specs by role. Raises ConfigError: one is given twice, or there is none."""
    found: dict[str, ChildSpec] = {}
    for spec in specs:
        if spec.role in found:
            raise ConfigError(f"role {spec.role!r} is given twice")
        found[spec.role] = spec
    if not found:
        raise ConfigError("a supervisor needs at least one child")
    return found


def refuse_threads() -> None:
    """RuntimeError if this process has threads: a fork would copy their locks, held, without the threads."""
    if threading.active_count() > 1:
        names = ", ".join(t.name for t in threading.enumerate() if t is not threading.main_thread())
        raise RuntimeError(f"refusing to fork: this process has other threads ({names}); start them in the children")


def fork_child(spec: ChildSpec, context: ChildContext, title: str, unwanted: Iterable[int]) -> int:
    """Start a child and return its pid; OSError when the machine has no room for it.

    ``unwanted`` are the file descriptors that are not the child's: while it held the write end of the control pipe,
    the monitor would never see its end.
    """
    refuse_threads()
    prepare_prctl()
    _flush()  # else what is still buffered would be printed twice
    # A signal between fork() and the reset below would run the supervisor's handler in the child, and write into the
    # pipe of the supervisor.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _live(spec, context, title, unwanted)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _live(spec: ChildSpec, context: ChildContext, title: str, unwanted: Iterable[int]) -> NoReturn:
    code = int(ExitCode.CRASH)
    try:
        context.slot.pid = os.getpid()
        _reset_signals()
        atexit._clear()  # the supervisor's
        for fd in unwanted:
            os.close(fd)
        if not spec.stop_last:
            die_with_parent(context.supervisor_pid)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for name in _SYSTEMD:
            os.environ.pop(name, None)
        set_title(title)
        code = _run(spec.entry, context)
        run_exit_functions(code & 0xFF)
    finally:  # whatever happens, the child must not return into the supervisor's frames
        with contextlib.suppress(BaseException):
            _flush()
        os._exit(code & 0xFF)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent(parent: int, platform: str = sys.platform) -> None:
    """Have the kernel kill this process when its parent dies (Linux); leave at once if that has happened already.

    Other systems have no such call: their children ask ``ChildContext.orphaned()`` instead.
    """
    if platform.startswith("linux") and (prctl := prepare_prctl()) is not None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died between the fork and the line above
        os._exit(ExitCode.CRASH)


@functools.cache
def prepare_prctl() -> Callable[..., int] | None:
    """The C library's prctl(), looked up in the parent so that a child need not load anything to be safe."""
    import ctypes

    try:
        return ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None


def _run(entry: str, context: ChildContext) -> int:
    try:
        main = _load(entry)
    except Exception:
        log.exception("child cannot be loaded", extra={"fields": {"entry": entry}})
        return ExitCode.USAGE
    try:
        return int(main(context) or ExitCode.OK)
    except ConfigError as error:
        log.error("child refused its configuration", extra={"fields": {"entry": entry, "error": str(error)}})
        return ExitCode.USAGE
    except SystemExit as error:
        return _exit_code(error)
    except BaseException:
        log.exception("child crashed", extra={"fields": {"entry": entry}})
        return ExitCode.CRASH


def _load(entry: str) -> Callable[[ChildContext], int | None]:
    importlib.invalidate_caches()  # a rolling restart must see files that are newer than the supervisor
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or ExitCode.OK
    sys.stderr.write(f"{error.code}\n")
    return ExitCode.CRASH


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def reap_strangers(ours: Container[int]) -> None:
    """As process 1 of a container we inherit every orphan; unreaped, they would fill the process table."""
    with contextlib.suppress(ChildProcessError):
        while True:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None or found.si_pid in ours:  # ours are buried in the next turn
                return
            os.waitpid(found.si_pid, 0)


def outlast(pid: int, deadline: float) -> None:
    """Wait for a child's end; at ``deadline`` (monotonic seconds) bring it about."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                deadline = math.inf
            time.sleep(0.01)
