"""A program that runs a real supervisor over toy children, and the toys.

``python children.py '{"folder": …, "specs": […], …}'``: see `main`. Everything that happens becomes a line of JSON in
the folder: ``facts`` holds what the children saw, ``log`` what the supervisor logged. Files steer the toys while they
run: ``mode`` and ``mode-<role>`` are read at their start, ``hold`` keeps them between BOOTED and RUNNING,
``recycle-<pid>`` asks one to recycle itself, ``hang-<pid>`` keeps one from leaving.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastq.board import Board, ChildContext, SlotState
from fastq.errors import ConfigError
from fastq.supervisor import ChildSpec, Supervisor

TICK = 0.005  # seconds
STOPS = {signal.SIGTERM, signal.SIGQUIT}


# -- toys -------------------------------------------------------------------------------------------------------------


class Toy:
    """What all toys have in common: facts, files and signals."""

    def __init__(self, context: ChildContext) -> None:
        self.context = context
        self.slot = context.slot
        self.role = context.slot.role
        self.folder = Path(context.settings["folder"])
        self.signals: list[int] = []
        self.note("entry", **surroundings())

    def note(self, fact: str, **more: Any) -> None:
        line = {
            "fact": fact,
            "role": self.role,
            "number": self.context.number,
            "pid": os.getpid(),
            "slot": self.slot.index,
            "settings": self.context.settings.get("version"),
            "at": time.monotonic(),
            **more,
        }
        append(self.folder / "facts", line)

    def starts(self) -> int:
        """How often one of its role has started, this one included."""
        lines = [json.loads(line) for line in (self.folder / "facts").read_text().splitlines()]
        return sum(line["fact"] == "entry" and line["role"] == self.role for line in lines)

    def said(self, fact: str) -> bool:
        self.note(fact)
        return True

    def mode(self) -> str:
        for name in (f"mode-{self.role}", "mode"):
            if (self.folder / name).exists():
                return (self.folder / name).read_text()
        return str(self.context.settings.get("mode", ""))

    def listen(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            signal.signal(number, lambda number, _: self.signals.append(number))

    def boot(self) -> None:
        self.slot.state = SlotState.BOOTED
        self.note("booted")
        while (self.folder / "hold").exists() and not STOPS.intersection(self.signals):
            time.sleep(TICK)

    def run(self, heard: dict[int, Callable[[], bool]], also: Callable[[], bool] = lambda: False) -> int:
        """Serve until an action says that it was the last."""
        quiet = self.context.board.quiet and self.mode() != "late"
        self.slot.state = SlotState.QUIET if quiet else SlotState.RUNNING
        self.note("running", quiet=self.context.board.quiet, generation=self.slot.generation)
        while True:
            self.slot.ticked_at = time.monotonic()
            while self.signals:
                if heard.get(self.signals.pop(0), lambda: False)():
                    return self.leave()
            if also():
                return self.leave()
            time.sleep(TICK)

    def leave(self) -> int:
        while (self.folder / f"hang-{os.getpid()}").exists():
            time.sleep(TICK)
        self.note("bye")
        return 0


def surroundings() -> dict[str, Any]:
    """What a child finds when it begins: signals, descriptors, environment."""
    found: dict[str, Any] = {
        "wakeup": signal.set_wakeup_fd(-1),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "ignored": sorted(n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN),
        "python_handlers": sorted(n for n in signal.valid_signals() if callable(signal.getsignal(n))),
        "notify_socket": os.environ.get("NOTIFY_SOCKET"),
        "ppid": os.getppid(),
    }
    if sys.platform == "linux":
        number = ctypes.c_int(-1)
        ctypes.CDLL(None).prctl(2, ctypes.byref(number), 0, 0, 0)
        found["dies_by"] = number.value
        found["pipes"] = [link for link in map(link_of, Path("/proc/self/fd").iterdir()) if link.startswith("pipe:")]
        found["title"] = Path("/proc/self/cmdline").read_bytes().rstrip(b"\0 ").decode(errors="replace")
    return found


def link_of(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def worker(context: ChildContext) -> int | None:
    toy = Toy(context)
    mode = toy.mode()
    if mode in BROKEN:
        return BROKEN[mode]()
    if mode.startswith("crashes ") and toy.starts() <= int(mode.split()[1]):
        crash()
    if mode == "never boots":
        signal.pause()
    numbers = (signal.SIGTERM, signal.SIGQUIT, signal.SIGTSTP, signal.SIGCONT, signal.SIGUSR2)
    if mode != "late":
        toy.listen(*numbers)
    if toy.role == "worker":
        context.slot.worker_id = f"toy-{os.getpid()}"
    toy.boot()
    toy.listen(*numbers)
    if mode == "cannot serve":
        return 2

    def become(state: SlotState) -> bool:
        context.slot.state = state
        toy.note(state.name.lower())
        return False

    def told(fact: str, last: bool) -> bool:
        context.slot.state = SlotState.DRAINING
        toy.note(fact)
        return last

    def recycle() -> bool:
        if mode == "dies young":
            toy.note("dying")
            os._exit(7)
        if (toy.folder / f"recycle-{os.getpid()}").exists() and context.board.may_recycle(context.slot):
            return told("recycle", True)
        return False

    return toy.run(
        {
            signal.SIGTERM: lambda: told("term", mode not in {"slow", "stubborn"}),
            signal.SIGQUIT: lambda: told("quit", mode != "stubborn"),
            signal.SIGTSTP: lambda: become(SlotState.QUIET),
            signal.SIGCONT: lambda: become(SlotState.RUNNING),
            signal.SIGUSR2: lambda: not toy.said("dump"),
        },
        recycle,
    )


def unusable() -> int:
    print("cannot import the application", file=sys.stderr)
    return 2


def crash() -> int:
    os._exit(7)


def refuse() -> int:
    raise ConfigError("metrics_token is missing")


def raise_error() -> int:
    raise RuntimeError("oh no")


BROKEN: dict[str, Callable[[], int]] = {
    "unusable": unusable,
    "crashes": crash,
    "refuses": refuse,
    "raises": raise_error,
    "exits": lambda: sys.exit(2),
}


def monitor(context: ChildContext) -> int | None:
    toy = Toy(context)
    if toy.mode() in BROKEN:
        return BROKEN[toy.mode()]()
    toy.listen(signal.SIGTERM)
    toy.boot()

    def hand_back() -> bool:
        for slot in context.board:
            if slot.state == SlotState.DEAD and not (toy.folder / "keep-dead").exists():
                toy.note(
                    "handed back", worker_id=slot.worker_id, status=slot.exit_status, rss=slot.rss, dead=slot.index
                )
                slot.free()
        return False

    def read() -> bool:
        if select.select([context.control_fd], [], [], 0)[0]:
            data = os.read(context.control_fd, 4096)
            toy.note("told of deaths" if data else "end of file", count=len(data))
            return hand_back() or not data
        return hand_back()

    return toy.run({signal.SIGTERM: lambda: hand_back() or toy.said("term")}, read)


# -- the program ------------------------------------------------------------------------------------------------------


def append(path: Path, line: dict[str, Any]) -> None:
    """One write, so that lines of several processes never mix."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, json.dumps(line).encode() + b"\n")
    os.close(fd)


class JsonLog(logging.Handler):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        line = {"event": record.getMessage(), "level": record.levelname, "by": os.getpid(), "at": time.monotonic()}
        if record.exc_info:
            line["error"] = repr(record.exc_info[1])
        append(self.path, {**line, **getattr(record, "fields", {})})


def specs_of(folder: Path, plan: list[dict[str, Any]]) -> list[ChildSpec]:
    return [ChildSpec(**{**one, "settings": {"folder": str(folder), **one.get("settings", {})}}) for one in plan]


class Reading:
    """The new specs of a reload, from the file ``new-specs``, which may come later."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        append(folder / "facts", {"fact": "reading"})

    def poll(self) -> list[ChildSpec] | None:
        if not (self.folder / "new-specs").exists():
            return None
        text = (self.folder / "new-specs").read_text()
        if text == "bad":
            raise ConfigError("workers = -1")
        if text == "bug":
            raise ZeroDivisionError("a fault of our own")
        return specs_of(self.folder, json.loads(text))

    def close(self) -> None:
        append(self.folder / "facts", {"fact": "reading closed"})


def main() -> int:
    plan = json.loads(sys.argv[1])
    folder = Path(plan["folder"])
    logger = logging.getLogger("fastq.supervisor")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(JsonLog(folder / "log"))
    if plan.get("thread"):
        threading.Thread(target=threading.Event().wait, name="intruder", daemon=True).start()
    if plan.get("forks"):
        change_forks(plan["forks"])
    if plan.get("blocked"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM})
    stranger = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(3)"]) if plan.get("stranger") else None
    options = plan.get("options", {})
    if plan.get("reload"):
        options["reload"] = lambda: Reading(folder)
    supervisor = Supervisor(specs_of(folder, plan["specs"]), Board(plan.get("slots", 16), cells=8, rows=8), **options)
    code = supervisor.run()
    if stranger is not None:
        append(folder / "facts", {"fact": "stranger", "code": stranger.wait()})
    append(folder / "facts", {"fact": "end", "term": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL})
    return code


def change_forks(changes: list[str]) -> None:
    """What happens at the next forks: ``fail``, or ``term`` = the child has a SIGTERM in its very first moment."""
    real = os.fork

    def fork() -> int:
        change = changes.pop(0) if changes else ""
        if change == "fail":
            raise OSError(11, "Resource temporarily unavailable")
        pid = real()
        if change == "term" and pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return pid

    os.fork = fork


if __name__ == "__main__":
    sys.exit(main())
