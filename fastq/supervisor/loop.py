"""The supervisor's loop: signals and deaths come in, forks and kills go out; one turn looks at everything once."""

from __future__ import annotations

import contextlib
import enum
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from fastq.board import SERVING, Board, ChildContext, Slot, SlotState, exit_text
from fastq.errors import ConfigError, ExitCode
from fastq.supervisor.child import ChildSpec, by_role, fork_child, outlast, reap_strangers, refuse_threads
from fastq.supervisor.host import Notifier, PidFile, PidFileHeld, SignalPipe, SourceWatch, set_title
from fastq.supervisor.post import BOOT_CRASHES, QUICK_DEATH, Child, Losses, Post
from fastq.supervisor.reload import Reader, Reload

__all__ = ["Supervisor"]

KEEPER_GRACE = 5.0  # seconds the last child (the monitor) has to hand back what is left
KILL_MARGIN = 1.0  # seconds beyond the child's own deadlines before it is killed
RELOAD_EVERY = 0.5  # seconds between two looks at the source files
BOOT_LOOK, LONG_BOOT_LOOK = 0.02, 0.25  # seconds between two looks at children that are coming up, or at full slots
IDLE = 1.0  # seconds: the longest sleep, so that a lost SIGCHLD is found as well

_COMING = (SlotState.STARTING, SlotState.BOOTED)


class _Phase(enum.Enum):
    SERVING = enum.auto()
    DRAINING = enum.auto()  # everybody but the monitor was told to stop
    LAST = enum.auto()  # so was the monitor
    STOPPED = enum.auto()


class Supervisor:
    """Keeps the children of ``specs`` running until it is told to stop.

    ``grace`` and ``cancel_grace`` (seconds) are the children's own deadlines after TERM: to finish, then to interrupt
    and hand back; whoever is there a second later is killed. ``reload`` is called at each SIGHUP and begins
    to read the new specs (the same roles); asked for them later, it may raise ConfigError to keep the old ones. Changed files below ``reload_paths`` cause a
    rolling restart. ``pidfile`` is a path, or empty. ``title`` begins the processes' names. ``backoff`` is the second
    delay of :func:`restart_delay`.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        board: Board,
        *,
        grace: float = 25.0,
        cancel_grace: float = 5.0,
        log: logging.Logger | None = None,
        reload: Callable[[], Reload] | None = None,
        reload_paths: Sequence[str | os.PathLike[str]] = (),
        pidfile: str = "",
        title: str = "fastq",
        backoff: float = 1.0,
    ) -> None:
        self._specs = self._old_specs = by_role(specs)
        self._board = board
        if (children := sum(spec.count for spec in specs)) > len(board):
            raise ConfigError(f"{children} processes do not fit on a board of {len(board)} slots")
        self._stop_within = cancel_grace + KILL_MARGIN
        self._leave_within = grace + self._stop_within
        self._logger = log or logging.getLogger("fastq.supervisor")
        self._reader = Reader(reload)
        self._sources = SourceWatch(reload_paths)
        self._pidfile = PidFile(pidfile)
        self._title = title
        self._backoff = backoff

        self._pid = 0
        self._notifier = Notifier()
        self._phase = _Phase.SERVING
        self._code = ExitCode.OK
        self._posts: list[Post] = []
        self._children: dict[int, Child] = {}
        self._losses = Losses()
        self._booted: set[str] = set()  # roles of which a child has ever booted
        self._served: set[str] = set()  # … has ever served
        self._ready = False
        self._hurried = False
        self._generation = 0
        self._rolling = False
        self._leaving: Child | None = None  # the rolling restart waits for its end
        self._killed = 0
        self._stopping_since = 0.0
        self._short_of_slots = False
        self._turned_at = -math.inf
        self._control = (-1, -1)  # read end, write end: a byte per dead worker, for the monitor
        self._signals = SignalPipe()
        self._sources_at = self._watchdog_at = math.inf
        self._actions: dict[int, Callable[[], None]] = {
            signal.SIGTERM: self._on_term,
            signal.SIGINT: self._on_interrupt,
            signal.SIGQUIT: self._stop_now,
            signal.SIGHUP: self._on_hangup,
            signal.SIGTSTP: self._on_quiet,
            signal.SIGCONT: self._on_resume,
            signal.SIGTTIN: self._on_more,
            signal.SIGTTOU: self._on_fewer,
            signal.SIGUSR2: self._on_dump,
            signal.SIGUSR1: lambda: None,  # means something to workers only, and must not kill us
            signal.SIGCHLD: lambda: None,  # wakes the loop, which looks at every child in each turn anyway
        }

    def run(self) -> ExitCode:
        """Fork the children and look after them; returns when all of them are gone.

        OK after an orderly stop; USAGE when a child said, before any of its role had served, that it cannot work like
        this; CRASH when one kept dying before it had booted, or on a fault of the supervisor's own (the children are
        killed then); PIDFILE when the pid file is held. Main thread only, and of a process without other threads.
        """
        if (refusal := self._refusal()) is not None:
            self._pidfile.release()
            return refusal
        try:
            self._open()
            while self._phase is not _Phase.STOPPED:
                self._turn()
            return self._code
        except BaseException:
            self._logger.exception("supervisor crashed")
            self._abandon()
            return ExitCode.CRASH
        finally:
            self._close()

    def _refusal(self) -> ExitCode | None:
        try:
            refuse_threads()
            self._pidfile.acquire()
        except (RuntimeError, ConfigError) as error:
            self._log(logging.ERROR, "supervisor cannot start", error=str(error))
            if isinstance(error, PidFileHeld):
                return ExitCode.PIDFILE
            return ExitCode.USAGE if isinstance(error, ConfigError) else ExitCode.CRASH
        return None

    # -- one turn ---------------------------------------------------------------------------------

    def _turn(self) -> None:
        for number in self._signals.wait(self._patience(time.monotonic())):
            self._actions.get(number, lambda: None)()
        self._reap()
        self._observe()
        self._read_on()
        self._turned_at = now = time.monotonic()
        self._kill_overdue(now)
        if self._phase is _Phase.SERVING:
            self._watch_sources(now)
            self._roll_on(now)
        else:
            self._stop_on(now)
        self._fill(now)
        self._feed_watchdog(now)

    def _patience(self, now: float) -> float:
        due = [now + IDLE, self._watchdog_at, self._sources_at]
        due += [child.kill_at for child in self._children.values() if not child.killed]
        due += [post.not_before for post in self._posts if post.vacant and post.not_before > self._turned_at]
        # A child says nothing when it has booted: look often while one has just started, and less when it takes longer.
        ages = [now - child.started_at for child in self._children.values() if child.slot.state in _COMING]
        due += [now + (BOOT_LOOK if age < QUICK_DEATH else LONG_BOOT_LOOK) for age in ages]
        if self._short_of_slots:
            due.append(now + LONG_BOOT_LOOK)
        return max(0.0, min(due) - now)

    def _observe(self) -> None:
        for child in self._children.values():
            state = child.slot.state
            if state == child.seen:
                continue
            if child.seen in _COMING and state in SERVING:
                self._on_serving(child)
            if child.seen == SlotState.STARTING:
                self._on_booted(child)
            if state == SlotState.DRAINING and child.slot.recycling and child.post is not None:
                child.post.let_go(child)
            child.seen = state

    def _on_booted(self, child: Child) -> None:
        self._booted.add(child.spec.role)
        if child.post is not None:
            child.post.boot_crashes = 0

    def _on_serving(self, child: Child) -> None:
        child.served = True
        self._served.add(child.spec.role)
        self._event("running", child, seconds=round(time.monotonic() - child.started_at, 3))
        if self._board.quiet and child.spec.takes_jobs:
            child.send(signal.SIGTSTP)  # the first one came before its handler was there
        if not self._ready and (child.spec.takes_jobs or not self._jobs_wanted):
            self._ready = True
            self._notifier.tell("READY=1", "STATUS=serving")

    # -- starting ---------------------------------------------------------------------------------

    def _fill(self, now: float) -> None:
        for post in self._posts:
            if post.vacant and now >= post.not_before and self._may_start(post):
                post.child = self._start(post)

    def _may_start(self, post: Post) -> bool:
        spec = self._specs[post.role]
        if self._phase is not _Phase.SERVING:
            return spec.stop_last and self._phase is _Phase.DRAINING and post.role in self._booted
        first = next((p for p in self._posts if self._specs[p.role].takes_jobs), post)
        return post is first or first.role in self._booted or not self._jobs_wanted

    def _start(self, post: Post) -> Child | None:
        spec = self._specs[post.role]
        slot = self._board.claim(spec.role)
        if slot is None:
            if not self._short_of_slots:
                self._log(logging.WARNING, "no free slot, waiting for one", role=spec.role, slots=len(self._board))
            self._short_of_slots = True
            return None
        self._short_of_slots = False
        slot.generation = self._generation
        slot.peers = self._count(spec.role)
        try:
            slot.pid = pid = fork_child(spec, self._context(spec, slot, post), self._name(post), self._unwanted(spec))
        except (OSError, RuntimeError) as error:
            slot.free()
            post.penalise(self._backoff)
            self._log(logging.ERROR, "fork failed", role=spec.role, error=str(error))
            return None
        child = Child(pid, slot, spec, post, self._generation, time.monotonic())
        self._children[pid] = child
        self._event("started", child)
        return child

    def _context(self, spec: ChildSpec, slot: Slot, post: Post) -> ChildContext:
        return ChildContext(
            slot=slot,
            board=self._board,
            settings=spec.settings,
            supervisor_pid=self._pid,
            number=post.number,
            control_fd=self._control[0] if spec.stop_last else -1,
        )

    def _name(self, post: Post) -> str:
        return f"{self._title}: {post.role} {post.number}"

    def _unwanted(self, spec: ChildSpec) -> list[int]:
        kept = self._control[0] if spec.stop_last else -1
        fds = [*self._signals.fds, *self._control, self._pidfile.fd]
        return [fd for fd in fds if fd >= 0 and fd != kept]

    # -- deaths -----------------------------------------------------------------------------------

    def _reap(self) -> None:
        for child in list(self._children.values()):
            # Not waitpid(-1): whoever runs a supervisor may have other children, whose status is theirs to read.
            try:
                pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            except ChildProcessError:  # somebody took it from us
                pid, status, usage = child.pid, ExitCode.CRASH << 8, None
            if pid:
                self._bury(child, status, usage.ru_maxrss if usage else 0)
        if self._pid == 1:
            reap_strangers(self._children)

    def _bury(self, child: Child, status: int, peak: int) -> None:
        self._observe()  # it may have booted since the last look
        slot, post = child.slot, child.post
        died_in, told, recycled = slot.state, slot.stopping, slot.recycling
        slot.rss = peak * (1 if sys.platform == "darwin" else 1024) or slot.rss
        expected = told or self._phase is not _Phase.SERVING or (recycled and status == 0)
        self._event("exited", child, logging.INFO if expected else logging.WARNING, exit=exit_text(status))
        self._strike_off(child, status)
        if post is None:
            return
        if post.replacement is child:
            post.replacement = None
            self._abandon_roll(child, status)
        else:
            post.child = None
        if told or post.child is not None:  # the old one still serves: nothing is missing
            return
        booted = died_in != SlotState.STARTING
        recycled = recycled and status == 0
        post.follow(child, self._losses, booted=booted, recycled=recycled, base=self._backoff)
        if not child.served and self._phase is _Phase.SERVING:
            self._judge_start(post, status, booted=booted)

    def _judge_start(self, post: Post, status: int, *, booted: bool) -> None:
        """A start that came to nothing: hopeless when it says so itself, or has failed too often and no other one serves."""
        post.boot_crashes += not booted
        unusable = os.waitstatus_to_exitcode(status) == ExitCode.USAGE
        if unusable and post.role not in self._served:
            self._begin_stop(ExitCode.USAGE, "cannot work like this", role=post.role)
        elif post.boot_crashes >= BOOT_CRASHES and not self._serves(post.role):
            code = ExitCode.USAGE if unusable else ExitCode.CRASH
            self._begin_stop(code, "dies before it has booted", role=post.role, times=post.boot_crashes)

    def _serves(self, role: str) -> bool:
        return any(child.spec.role == role and child.slot.state in SERVING for child in self._children.values())

    def _strike_off(self, child: Child, status: int) -> None:
        del self._children[child.pid]
        slot = child.slot
        slot.exit_status = status
        if not (child.spec.takes_jobs and slot.worker_id and self._keeper_wanted):
            slot.free()  # without an id it had no lease: there is nothing to hand back
            return
        slot.state = SlotState.DEAD
        # A full pipe holds thousands of unread deaths; the monitor looks at the board anyway.
        with contextlib.suppress(BlockingIOError):
            os.write(self._control[1], b"d")

    # -- stopping ---------------------------------------------------------------------------------

    def _on_term(self) -> None:
        self._begin_stop(ExitCode.OK, "SIGTERM")

    def _on_interrupt(self) -> None:
        if self._phase is _Phase.SERVING:
            self._begin_stop(ExitCode.OK, "SIGINT")
        else:
            self._stop_now()

    def _begin_stop(self, code: ExitCode, reason: str, **fields: object) -> None:
        if self._phase is not _Phase.SERVING:
            return
        self._phase = _Phase.DRAINING
        self._code = code
        self._stopping_since = time.monotonic()
        self._board.stopping = True
        self._notifier.tell("STOPPING=1", "STATUS=stopping")
        level = logging.ERROR if code else logging.INFO
        self._log(level, "stopping", reason=reason, children=len(self._children), **fields)
        for child in self._children.values():
            if not child.spec.stop_last:
                child.dismiss(self._leave_within)

    def _stop_now(self) -> None:
        """The children are to leave within ``cancel_grace``, handing their jobs back; asked again, they are killed."""
        self._begin_stop(ExitCode.OK, "SIGQUIT")
        again, self._hurried = self._hurried, True
        deadline = time.monotonic() + (0.0 if again else self._stop_within)
        for child in self._children.values():
            if not child.spec.stop_last:
                child.kill_at = min(child.kill_at, deadline)
                child.send(signal.SIGQUIT)
            elif (
                again and self._phase is _Phase.LAST
            ):  # until then it is needed: it hands back what the others could not
                child.kill_at = deadline

    def _kill_overdue(self, now: float) -> None:
        for child in self._children.values():
            if now >= child.kill_at and not child.killed:
                child.kill()
                self._killed += 1
                self._event("killed", child, logging.WARNING)

    def _stop_on(self, now: float) -> None:
        if self._phase is _Phase.DRAINING and all(c.spec.stop_last for c in self._children.values()):
            self._phase = _Phase.LAST
            for child in self._children.values():
                child.dismiss(KEEPER_GRACE)
        if self._phase is _Phase.LAST and not self._children:
            self._phase = _Phase.STOPPED
            workers = sum(self._specs[post.role].takes_jobs for post in self._posts)
            seconds = round(now - self._stopping_since, 1)
            self._log(
                logging.INFO, "stopped", workers=workers, killed=self._killed, seconds=seconds, code=int(self._code)
            )

    def _abandon(self) -> None:
        """After a fault of our own: no child may stay; the monitor hands back what it can in a few seconds."""
        for child in self._children.values():
            if not child.spec.stop_last:
                child.send(signal.SIGKILL)
        for child in [c for c in self._children.values() if not c.spec.stop_last]:
            status = int(signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                _, status = os.waitpid(child.pid, 0)
            self._strike_off(child, status)
        self._close_control()  # end of file: for the monitor we are gone
        deadline = time.monotonic() + KEEPER_GRACE
        for child in self._children.values():
            outlast(child.pid, deadline)

    # -- rolling restart --------------------------------------------------------------------------

    def _on_hangup(self) -> None:
        if self._phase is _Phase.SERVING and not self._reader.begin():
            self._begin_roll("SIGHUP")

    def _read_on(self) -> None:
        """Take new specs when they are there."""
        if self._phase is not _Phase.SERVING:
            return
        try:
            specs = self._reader.poll()
            if specs is not None:
                self._adopt(by_role(specs))
                self._begin_roll("SIGHUP")
        except ConfigError as error:
            self._log(logging.ERROR, "reload refused, going on as before", error=str(error))

    def _adopt(self, specs: dict[str, ChildSpec]) -> None:
        if specs.keys() != self._specs.keys():
            raise ConfigError(f"a reload cannot change the roles {sorted(self._specs)} to {sorted(specs)}")
        children = len(self._posts) + sum(spec.count - self._specs[role].count for role, spec in specs.items())
        if children >= len(self._board):  # a rolling restart needs one slot more
            raise ConfigError(f"{children} processes do not fit on a board of {len(self._board)} slots: start anew")
        before, self._specs = self._specs, specs
        if not self._rolling:  # those of an unfinished roll are not proven: go back behind them
            self._old_specs = before
        for role, spec in specs.items():
            self._resize(role, self._count(role) + spec.count - before[role].count)

    def _begin_roll(self, reason: str, **fields: object) -> None:
        self._generation += 1
        self._rolling = True
        self._log(logging.INFO, "rolling restart", reason=reason, generation=self._generation, **fields)
        self._notifier.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def _roll_on(self, now: float) -> None:
        """One step at a time: start a replacement, wait until it serves, dismiss the old one, wait until it is gone."""
        if not self._rolling or (self._leaving is not None and self._leaving.pid in self._children):
            return
        self._leaving = None
        for post in self._posts:
            if post.replacement is not None and (post.replacement.slot.state not in SERVING or self._hand_over(post)):
                return
        outdated = next((post for post in self._posts if self._is_outdated(post)), None)
        if outdated is None:
            self._end_roll("rolling restart done")
        elif self._specs[outdated.role].stop_last:
            self._leaving = outdated.child  # there can be only one of it: its successor starts when it has gone
            if outdated.child is not None:
                outdated.child.dismiss(KEEPER_GRACE)
        elif now >= outdated.not_before:
            outdated.replacement = self._start(outdated)

    def _is_outdated(self, post: Post) -> bool:
        child, spec = post.child, self._specs[post.role]
        if child is None:
            return False
        return child.spec != spec if spec.stop_last else child.generation < self._generation

    def _hand_over(self, post: Post) -> bool:
        """The replacement takes the place; whether there is an old one whose end must be waited for."""
        old, post.child, post.replacement = post.child, post.replacement, None
        if old is not None:
            old.post = None
            self._leaving = old
            old.dismiss(self._leave_within)
        return old is not None

    def _abandon_roll(self, child: Child, status: int) -> None:
        """What is new does not start: those that run the old code and settings stay, and so do their settings."""
        if self._rolling and self._phase is _Phase.SERVING:
            self._specs = {r: replace(old, count=self._specs[r].count) for r, old in self._old_specs.items()}
            self._end_roll("rolling restart abandoned", logging.ERROR, role=child.spec.role, exit=exit_text(status))

    def _end_roll(self, message: str, level: int = logging.INFO, **fields: object) -> None:
        self._rolling = False
        self._old_specs = self._specs
        self._notifier.tell("READY=1", f"STATUS={message}")
        self._log(level, message, generation=self._generation, **fields)

    def _watch_sources(self, now: float) -> None:
        if now >= self._sources_at:
            self._sources_at = now + RELOAD_EVERY
            if changed := self._sources.changed():
                self._begin_roll("changed files", files=", ".join(changed[:3]), count=len(changed))

    # -- quiet, more, fewer, dump -----------------------------------------------------------------

    def _on_quiet(self) -> None:
        self._be_quiet("quiet: taking nothing new", signal.SIGTSTP, quiet=True)

    def _on_resume(self) -> None:
        if self._board.quiet:  # the kernel sends SIGCONT for other reasons, too
            self._be_quiet("resumed", signal.SIGCONT, quiet=False)

    def _be_quiet(self, message: str, number: signal.Signals, *, quiet: bool) -> None:
        if self._phase is _Phase.SERVING:
            self._board.quiet = quiet
            self._log(logging.INFO, message)
            self._forward(number)

    def _on_dump(self) -> None:
        self._forward(signal.SIGUSR2)

    def _forward(self, number: signal.Signals) -> None:
        for child in self._children.values():
            if child.spec.takes_jobs:
                child.send(number)

    def _on_more(self) -> None:
        for role in self._scalable():
            # One slot stays free: a rolling restart needs it.
            if len(self._posts) + 1 < len(self._board):
                self._add_post(role)
            else:
                self._log(logging.WARNING, "no room for one more", role=role, slots=len(self._board))

    def _on_fewer(self) -> None:
        for role in self._scalable():
            if self._count(role) > 1:
                self._remove_post(role)
            else:
                self._log(logging.WARNING, "the last one stays", role=role)

    def _scalable(self) -> list[str]:
        serving = self._phase is _Phase.SERVING
        return [spec.role for spec in self._specs.values() if spec.takes_jobs and serving]

    def _count(self, role: str) -> int:
        return sum(post.role == role for post in self._posts)

    def _resize(self, role: str, count: int) -> None:
        while self._count(role) < count:
            self._add_post(role)
        while self._count(role) > max(count, 1):
            self._remove_post(role)

    def _add_post(self, role: str) -> None:
        self._posts.append(Post(role, self._count(role) + 1))
        self._tell_peers(role)
        self._log(logging.INFO, "one more", role=role, count=self._count(role))

    def _remove_post(self, role: str) -> None:
        post = max((p for p in self._posts if p.role == role), key=lambda p: p.number)
        self._posts.remove(post)
        self._tell_peers(role)
        self._log(logging.INFO, "one fewer", role=role, count=self._count(role))
        for child in (post.child, post.replacement):
            if child is not None:
                child.post = None
                child.dismiss(self._leave_within)

    def _tell_peers(self, role: str) -> None:
        for child in self._children.values():
            if child.spec.role == role:
                child.slot.peers = self._count(role)

    # -- opening and closing ----------------------------------------------------------------------

    def _open(self) -> None:
        self._pid = os.getpid()
        set_title(f"{self._title}: supervisor")
        self._control = os.pipe()
        os.set_blocking(self._control[0], False)
        os.set_blocking(self._control[1], False)
        self._signals.open(self._actions)
        self._watchdog_at = time.monotonic() if self._notifier.watchdog_every else math.inf
        self._sources_at = time.monotonic() + RELOAD_EVERY if self._sources else math.inf
        self._jobs_wanted = any(spec.takes_jobs for spec in self._specs.values())
        self._keeper_wanted = any(spec.stop_last for spec in self._specs.values())
        self._posts = [Post(spec.role, n) for spec in self._specs.values() for n in range(1, spec.count + 1)]
        self._log(logging.INFO, "supervisor started", pid=self._pid, children=len(self._posts))

    def _close(self) -> None:
        self._reader.close()
        self._signals.close()
        self._close_control()
        self._pidfile.release()

    def _close_control(self) -> None:
        ends, self._control = self._control, (-1, -1)
        for fd in ends:
            if fd >= 0:
                os.close(fd)

    def _feed_watchdog(self, now: float) -> None:
        if now >= self._watchdog_at:
            self._watchdog_at = now + self._notifier.watchdog_every
            self._notifier.tell("WATCHDOG=1")

    def _event(self, what: str, child: Child, level: int = logging.INFO, **fields: object) -> None:
        number = child.post.number if child.post else "-"
        self._log(level, f"{child.spec.role} {what}", slot=child.slot.index, number=number, pid=child.pid, **fields)

    def _log(self, level: int, message: str, **fields: object) -> None:
        self._logger.log(level, message, extra={"fields": fields})
