"""The supervisor with real forks and real signals, over the toys of children.py (F-08, F-09, F-11, F-14, F-15)."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastq.board import Board
from fastq.errors import ConfigError
from fastq.supervisor import ChildSpec, Supervisor
from fastq.supervisor.host import PidFile, SourceWatch
from fastq.supervisor.post import BEARABLE, BOOT_CRASHES, SPELL, Child, Losses, Post, restart_delay

pytestmark = pytest.mark.versions

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, or needs PR_SET_PDEATHSIG")

WORKER = {"role": "worker", "entry": "children:worker", "takes_jobs": True}
SCHEDULER = {"role": "scheduler", "entry": "children:worker"}
MONITOR = {"role": "monitor", "entry": "children:monitor", "stop_last": True}
Eventually = Callable[..., Any]


class Host:
    """One supervisor process and what became known of it."""

    def __init__(self, folder: Path, eventually: Eventually) -> None:
        self.folder = folder
        self.eventually = eventually
        self.process: subprocess.Popen[bytes] | None = None
        self.environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}

    def start(self, *specs: dict[str, Any], **plan: Any) -> Host:
        options = {"grace": 5.0, "cancel_grace": 1.0, "backoff": 0.02, **plan.pop("options", {})}
        what = {"folder": str(self.folder), "specs": specs, "options": options, **plan}
        command = [sys.executable, "-W", "error", str(HERE / "children.py"), json.dumps(what)]
        with (self.folder / "out").open("a") as out, (self.folder / "err").open("a") as err:
            # -W error: Python 3.12 warns where a process with threads forks (F-14).
            self.process = subprocess.Popen(
                command, env=self.environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        return self

    def start_running(self, *specs: dict[str, Any], **plan: Any) -> Host:
        self.start(*specs, **plan)
        self.until_running(sum(spec.get("count", 1) for spec in specs))
        return self

    def until_running(self, count: int) -> None:
        self.eventually(lambda: len(self.facts("running")) >= count)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 20) -> int:
        assert self.process is not None
        return self.process.wait(timeout)

    def stop(self) -> int:
        self.send(signal.SIGTERM)
        return self.wait()

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line) for line in whole.splitlines()]

    def facts(self, fact: str, role: str = "") -> list[dict[str, Any]]:
        return [line for line in self.lines("facts") if line["fact"] == fact and role in ("", line.get("role"))]

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines("log") if line["event"] == event]

    def pids(self, role: str = "") -> list[int]:
        """Of those that came to serve, in that order."""
        return [line["pid"] for line in self.facts("running", role)]

    def who(self, fact: str, role: str = "") -> set[int]:
        """The pids of those that said it: a signal may be sent once more than needed."""
        return {line["pid"] for line in self.facts(fact, role)}

    def put(self, name: str, text: str = "") -> None:
        (self.folder / name).write_text(text)

    def drop(self, name: str) -> None:
        (self.folder / name).unlink()

    def close(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()


@pytest.fixture
def host(tmp_path: Path, eventually: Eventually) -> Iterator[Host]:
    made = Host(tmp_path, eventually)
    yield made
    made.close()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def run(script: str) -> subprocess.CompletedProcess[bytes]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, check=False)


def in_order(*facts: dict[str, Any]) -> bool:
    times = [fact["at"] for fact in facts]
    return times == sorted(times)


# -- starting ---------------------------------------------------------------------------------------------------------


def test_the_first_worker_boots_before_anything_else_starts(host: Host) -> None:
    host.start_running(MONITOR, {**WORKER, "count": 3}, SCHEDULER)
    first = host.facts("booted")[0]
    assert (first["role"], first["number"]) == ("worker", 1)
    others = [fact for fact in host.facts("entry") if fact["pid"] != first["pid"]]
    assert len(others) == 4
    assert all(in_order(first, other) for other in others)
    assert host.stop() == 0


@linux
def test_a_child_starts_with_clean_signals_and_descriptors(host: Host) -> None:
    """F-14: nothing of the supervisor's signal handling or pipes is left in a child."""
    host.environ["NOTIFY_SOCKET"] = str(host.folder / "nobody")
    host.start_running(
        {**WORKER, "count": 2}, SCHEDULER, MONITOR, blocked=True, options={"pidfile": str(host.folder / "pid")}
    )
    for fact in host.facts("entry"):
        assert fact["wakeup"] == -1
        assert fact["blocked"] == []
        assert fact["python_handlers"] == []
        ignored = {"SIGINT", "SIGHUP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGUSR1", "SIGUSR2"}
        assert {signal.Signals(n).name for n in fact["ignored"]} - {"SIGPIPE", "SIGXFSZ"} == ignored
        assert fact["notify_socket"] is None
        assert fact["ppid"] == host.pid
        assert fact["dies_by"] == (0 if fact["role"] == "monitor" else signal.SIGKILL)
        assert len(fact["pipes"]) == (1 if fact["role"] == "monitor" else 0), "only the monitor's read end is inherited"
        assert str(host.folder / "pid") not in [os.readlink(p) for p in Path(f"/proc/{fact['pid']}/fd").iterdir()]
    assert host.stop() == 0, "the signals that were blocked when it started are heard"


@linux
def test_processes_are_named(host: Host) -> None:
    pytest.importorskip("setproctitle")
    host.start_running({**WORKER, "count": 2})
    assert [fact["title"] for fact in host.facts("entry")] == ["fastq: worker 1", "fastq: worker 2"]
    assert Path(f"/proc/{host.pid}/cmdline").read_bytes().startswith(b"fastq: supervisor")
    assert host.stop() == 0


def test_threads_forbid_a_fork(host: Host) -> None:
    """F-14"""
    host.start(WORKER, thread=True)
    assert host.wait() == 1
    assert "intruder" in host.logged("supervisor cannot start")[0]["error"]
    assert host.facts("entry") == []


def test_a_failed_fork_is_tried_again(host: Host) -> None:
    host.start_running(WORKER, forks=["fail", "fail"])
    assert len(host.logged("fork failed")) == 2
    assert host.stop() == 0


def test_a_signal_in_the_first_moment_of_a_child_is_the_childs(host: Host) -> None:
    """It must not run the supervisor's handler in the child and write into the supervisor's pipe."""
    host.start_running(WORKER, forks=["term"])
    assert host.logged("worker exited")[0]["exit"] == "signal SIGTERM"
    assert host.logged("stopping") == []
    assert host.stop() == 0


def test_a_full_board_is_waited_for(host: Host) -> None:
    host.put("keep-dead")
    host.start_running(WORKER, MONITOR, slots=3)
    os.kill(host.pids("worker")[0], signal.SIGKILL)
    host.until_running(3)
    os.kill(host.pids("worker")[1], signal.SIGKILL)
    host.eventually(lambda: host.logged("no free slot, waiting for one"))
    host.drop("keep-dead")
    host.until_running(4)
    assert len(host.logged("no free slot, waiting for one")) == 1
    assert host.stop() == 0


def test_signals_and_other_children_of_the_process_are_left_as_they_were(host: Host) -> None:
    host.start_running(WORKER, stranger=True)
    assert host.stop() == 0
    assert host.facts("stranger")[0]["code"] == 3, "its status was not taken from it"
    assert host.facts("end")[0]["term"]


def test_specs_must_make_sense() -> None:
    with pytest.raises(ConfigError, match=r"package\.module:function"):
        ChildSpec(role="worker", entry="nonsense")
    with pytest.raises(ConfigError, match="count=0"):
        ChildSpec(role="worker", entry="a:b", count=0)
    with pytest.raises(ConfigError, match="given twice"):
        Supervisor([ChildSpec(role="worker", entry="a:b")] * 2, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="2 processes do not fit on a board of 1 slots"):
        Supervisor([ChildSpec(role="worker", entry="a:b", count=2)], Board(1, cells=1, rows=1))
    with pytest.raises(ConfigError, match="at least one"):
        Supervisor([], None)  # type: ignore[arg-type]


# -- broken starts (F-09) -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["unusable", "refuses", "exits"])
def test_a_worker_that_cannot_work_stops_the_supervisor(host: Host, mode: str) -> None:
    """F-09: exit 2, one fork, one message."""
    host.put("mode", mode)
    host.start({**WORKER, "count": 4}, SCHEDULER, MONITOR)
    assert host.wait() == 2
    assert len(host.logged("worker started")) == 1
    assert host.logged("scheduler started") == host.logged("monitor started") == []
    assert host.logged("stopping")[0]["level"] == "ERROR"
    if mode == "unusable":
        assert (host.folder / "err").read_text() == "cannot import the application\n"
    if mode == "refuses":
        assert [line["error"] for line in host.logged("child refused its configuration")] == [
            "metrics_token is missing"
        ]


def test_a_worker_that_finds_after_boot_that_it_cannot_work(host: Host) -> None:
    """Redis refuses its password, say: waiting does not help either."""
    host.put("mode", "cannot serve")
    host.start({**WORKER, "count": 2})
    assert host.wait() == 2
    host.put("mode", "")


def test_one_that_cannot_work_any_more_is_tried_again(host: Host) -> None:
    """What has served before may serve again; the others go on meanwhile."""
    host.start_running({**WORKER, "count": 2})
    host.put("mode", "cannot serve")
    os.kill(host.pids()[0], signal.SIGKILL)
    host.eventually(lambda: len(host.logged("worker exited")) >= 3)
    host.put("mode", "")
    host.until_running(3)
    assert host.stop() == 0


@pytest.mark.parametrize("entry", ["children:nothing_of_this_name", "no_such_module:main"])
def test_an_entry_that_cannot_be_loaded_stops_the_supervisor(host: Host, entry: str) -> None:
    host.start({**WORKER, "entry": entry})
    assert host.wait() == 2
    assert len(host.logged("child cannot be loaded")) == 1


def test_a_monitor_that_cannot_work_stops_everybody(host: Host) -> None:
    host.put("mode-monitor", "refuses")
    host.start({**WORKER, "count": 2}, MONITOR)
    assert host.wait() == 2
    assert len(host.logged("monitor started")) == 1
    assert len(host.facts("bye")) == len(host.facts("running", "worker")), "those that served left in an orderly way"


@pytest.mark.parametrize("mode", ["crashes", "raises"])
def test_a_crash_loop_at_boot_ends(host: Host, mode: str) -> None:
    """F-09: five starts with growing distances, then exit 1; never a fork storm."""
    host.put("mode", mode)
    host.start({**WORKER, "count": 4}, SCHEDULER, options={"backoff": 0.05})
    assert host.wait() == 1
    starts = [line["at"] for line in host.logged("worker started")]
    assert len(starts) == 5
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert all(gap >= wanted for gap, wanted in zip(gaps, [0, 0.05, 0.1, 0.2], strict=True))
    assert host.logged("stopping")[0]["times"] == 5


def test_boot_crashes_are_forgotten_once_it_has_booted(host: Host) -> None:
    host.put("mode", "crashes 3")
    host.start(WORKER, options={"backoff": 0.01})
    host.until_running(1)
    host.put("mode", "crashes")
    os.kill(host.pids()[0], signal.SIGKILL)
    assert host.wait() == 1
    assert len(host.logged("worker started")) == 3 + 1 + 5


def test_a_crash_loop_at_boot_does_not_end_those_that_serve(host: Host) -> None:
    """A broken release lies on the disk, say, and a worker of the old one was killed: the others do its work."""
    host.start_running({**WORKER, "count": 2}, options={"backoff": 0.01})
    host.put("mode", "crashes")
    os.kill(host.pids()[0], signal.SIGKILL)
    host.eventually(lambda: len(host.facts("entry")) >= 2 + BOOT_CRASHES + 2)
    assert host.logged("stopping") == []
    host.put("mode", "")
    host.until_running(3)
    host.put("mode", "crashes")
    for pid in host.pids()[1:]:
        os.kill(pid, signal.SIGKILL)
    assert host.wait() == 1, "nobody serves any more"


def test_the_default_delays_are_bounded() -> None:
    """F-09: 0, 1, 2, 4 … 30 s: at most two forks a minute in the long run."""
    assert [restart_delay(n) for n in range(9)] == [0, 0, 1, 2, 4, 8, 16, 30, 30]
    assert restart_delay(10_000) == 30
    assert restart_delay(3, base=0.25) == 0.5


def test_a_serving_worker_that_dies_is_replaced_at_once(host: Host) -> None:
    """F-01: however young it was; with any back-off this test would take minutes."""
    host.start_running({**WORKER, "count": 2}, MONITOR, options={"backoff": 60.0})
    for killed in range(2, 8):
        os.kill(host.pids("worker")[-1], signal.SIGKILL)
        host.until_running(killed + 2)
    assert host.stop() == 0


def test_endless_deaths_after_boot_are_replaced_with_back_off(host: Host) -> None:
    """F-07: a job that kills every worker that takes it."""
    host.put("mode", "dies young")
    host.start(WORKER, options={"backoff": 0.1})
    host.eventually(lambda: len(host.logged("worker started")) == BEARABLE + 5)
    starts = [line["at"] for line in host.logged("worker started")][BEARABLE:]
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert all(gap >= wanted for gap, wanted in zip(gaps, [0, 0.1, 0.2, 0.4], strict=True))
    assert host.stop() == 0, "deaths after boot never end the supervisor"


@pytest.mark.parametrize(
    ("child", "booted", "recycled", "delay", "deaths_after"),
    [
        ({"lived": 6.0}, True, False, 0.0, 0),
        ({"lived": 4.0}, True, False, 2.0, 4),
        ({"lived": 60.0}, False, False, 2.0, 4),
        ({"lived": 0.1, "served": True}, True, False, 0.0, 0),
        ({"lived": 0.25}, True, True, 0.75, 3),
        ({"lived": 60.0}, True, True, 0.0, 3),
    ],
    ids=["long life", "short life", "slow broken start", "served", "recycled soon", "recycled"],
)
def test_when_a_successor_may_start(
    child: dict[str, Any], booted: bool, recycled: bool, delay: float, deaths_after: int
) -> None:
    post = Post("worker", 1, quick_deaths=3)
    slot, spec, now = Board(1, cells=1, rows=1)[0], ChildSpec(role="worker", entry="a:b"), time.monotonic()
    dead = Child(1, slot, spec, post, 0, now - child["lived"], served=child.get("served", False))
    post.follow(dead, Losses(), booted=booted, recycled=recycled, base=0.5)
    assert max(0.0, post.not_before - now) == pytest.approx(delay, abs=0.1)
    assert post.quick_deaths == deaths_after


def test_how_many_deaths_are_borne() -> None:
    losses = Losses()
    assert all(losses.bear(at / 10) for at in range(BEARABLE))
    assert not losses.bear(SPELL), "the eleventh within ten seconds"
    assert losses.bear(SPELL + 0.11), "the second of them was more than ten seconds ago"
    assert losses.bear(5 * SPELL)


def test_sigterm_during_startup(host: Host) -> None:
    """F-11"""
    host.put("mode", "never boots")
    host.start({**WORKER, "count": 2}, MONITOR)
    host.eventually(lambda: host.facts("entry"))
    assert host.stop() == 0
    assert len(host.logged("worker started")) == 1


def test_sigterm_while_the_workers_wait_for_redis(host: Host) -> None:
    """F-11: BOOTED is no state to be killed in."""
    host.put("hold")
    host.start({**WORKER, "count": 2}, MONITOR)
    host.eventually(lambda: len(host.facts("booted")) == 3)
    host.send(signal.SIGTERM)
    assert host.wait() == 0
    assert host.logged("stopped")[0]["killed"] == 0


# -- deaths -----------------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_and_the_monitor_told(host: Host) -> None:
    """F-01: the monitor knows at once, and what the worker was doing is still on the board."""
    host.start_running({**WORKER, "count": 2}, MONITOR)
    victim = host.facts("running", "worker")[0]
    killed_at = time.monotonic()
    os.kill(victim["pid"], signal.SIGKILL)
    (handed,) = host.eventually(lambda: host.facts("handed back"))
    assert handed["worker_id"] == f"toy-{victim['pid']}"
    assert handed["dead"] == victim["slot"]
    assert handed["status"] == signal.SIGKILL
    assert handed["rss"] > 1_000_000, "its peak in bytes, from the kernel"
    assert handed["at"] - killed_at < 1
    assert [told["count"] for told in host.facts("told of deaths")] == [1]
    host.until_running(4)
    (successor,) = host.facts("running", "worker")[2:]
    assert successor["number"] == victim["number"]
    (exited,) = host.logged("worker exited")
    assert (exited["exit"], exited["level"]) == ("signal SIGKILL", "WARNING")
    assert host.stop() == 0


def test_without_a_monitor_the_supervisor_frees_the_slot(host: Host) -> None:
    host.start_running(WORKER, slots=2)
    for deaths in range(1, 4):
        os.kill(host.pids()[-1], signal.SIGKILL)
        host.until_running(deaths + 1)
    assert host.logged("no free slot, waiting for one") == []
    assert host.stop() == 0


def test_a_killed_monitor_is_replaced_and_finds_the_dead(host: Host) -> None:
    host.put("keep-dead")
    host.start_running(WORKER, MONITOR)
    os.kill(host.pids("worker")[0], signal.SIGKILL)
    host.until_running(3)
    os.kill(host.pids("monitor")[0], signal.SIGKILL)
    host.drop("keep-dead")
    host.eventually(lambda: host.facts("handed back"))
    assert host.facts("handed back")[0]["pid"] != host.pids("monitor")[0]
    assert host.stop() == 0


def test_a_recycled_worker_is_replaced_without_back_off(host: Host) -> None:
    """F-15: as often as it likes, but one fork a second; not counted as a death."""
    host.start_running(WORKER, MONITOR, options={"backoff": 100.0})
    for turn in range(1, 4):
        pid = host.pids("worker")[-1]
        host.put(f"recycle-{pid}")
        host.eventually(lambda turn=turn: len(host.pids("worker")) == turn + 1)
    starts = [line["at"] for line in host.logged("worker started")]
    assert all(later - earlier > 0.9 for earlier, later in itertools.pairwise(starts))
    assert {line["level"] for line in host.logged("worker exited")} == {"INFO"}
    assert host.stop() == 0


def test_workers_recycle_one_at_a_time(host: Host) -> None:
    """F-15: staggered, by the board alone; none waits for the last jobs of the one before, whose successor serves."""
    host.start_running({**WORKER, "count": 3}, MONITOR)
    old = host.pids("worker")
    for pid in old:
        host.put(f"hang-{pid}")
        host.put(f"recycle-{pid}")
    host.eventually(lambda: len(host.facts("recycle")) == 3 and len(host.pids("worker")) == 6)
    assert host.facts("bye", "worker") == []
    told, serving = host.facts("recycle"), host.facts("running", "worker")[3:]
    for leaver, successor, following in zip(told, serving, [*told[1:], serving[-1]], strict=True):
        assert in_order(leaver, successor, following)
    assert [fact["number"] for fact in serving] == [fact["number"] for fact in told]
    for pid in old:
        host.drop(f"hang-{pid}")
    host.eventually(lambda: len(host.facts("bye", "worker")) == 3)
    assert len(host.logged("worker started")) == 6, "they had their successors"
    assert host.stop() == 0


def test_a_stop_waits_for_one_that_recycles(host: Host) -> None:
    """Its place is taken, and it is a child all the same."""
    host.start_running(WORKER, MONITOR)
    (old,) = host.pids("worker")
    host.put(f"hang-{old}")
    host.put(f"recycle-{old}")
    host.eventually(lambda: len(host.pids("worker")) == 2)
    host.send(signal.SIGTERM)
    host.eventually(lambda: host.who("term", "worker"))
    host.drop(f"hang-{old}")
    assert host.wait() == 0
    assert host.who("bye", "worker") == {*host.pids("worker")}


# -- the supervisor's own death (F-08) --------------------------------------------------------------------------------


@linux
def test_no_orphans_one_second_after_the_supervisor_was_killed(host: Host) -> None:
    """F-08: the kernel kills workers and scheduler, the monitor sees the end of the control pipe and leaves by itself."""
    host.start_running({**WORKER, "count": 3}, SCHEDULER, MONITOR)
    pids = host.pids()
    host.send(signal.SIGKILL)
    killed_at = time.monotonic()
    host.eventually(lambda: not any(running(pid) for pid in pids))
    assert time.monotonic() - killed_at < 1
    assert len(host.facts("end of file", "monitor")) == 1
    assert host.facts("bye", "worker") == []


@linux
def test_a_blocked_child_dies_with_the_supervisor(host: Host) -> None:
    """F-08: also one that would never look."""
    host.put("mode", "never boots")
    host.start(WORKER)
    (entry,) = host.eventually(lambda: host.facts("entry"))
    host.send(signal.SIGKILL)
    host.eventually(lambda: not running(entry["pid"]), timeout=1)


def test_a_fault_of_the_supervisor_kills_the_children(host: Host) -> None:
    host.put("new-specs", "bug")
    host.start_running({**WORKER, "count": 2}, SCHEDULER, MONITOR, reload=True)
    host.send(signal.SIGHUP)
    assert host.wait() == 1
    assert "a fault of our own" in host.logged("supervisor crashed")[0]["error"]
    assert host.facts("term") == []
    assert len(host.facts("handed back")) == 2
    assert len(host.facts("end of file", "monitor")) == 1


def test_elsewhere_children_ask_whether_they_are_orphans(tmp_path: Path) -> None:
    """macOS has no PR_SET_PDEATHSIG: nothing is asked of the kernel, and a child that is late leaves at once."""
    script = """
import ctypes, os, sys
from fastq.board import Board, ChildContext
from fastq.supervisor.child import die_with_parent, prepare_prctl
die_with_parent(os.getppid(), "darwin")
assert prepare_prctl.cache_info().misses == 0, "the C library was not asked"
context = ChildContext(slot=None, board=None, settings=None, supervisor_pid=os.getppid())
assert not context.orphaned()
assert ChildContext(slot=None, board=None, settings=None, supervisor_pid=1 << 22).orphaned()
die_with_parent(1 << 22, "darwin")
print("still here")
"""
    done = run(script)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_process_one_reaps_strangers() -> None:
    """In a container the supervisor inherits every orphan; its own children are left to the loop."""
    script = """
import os, time
from fastq.supervisor.child import reap_strangers
stranger = os.fork() or os._exit(3)
os.waitid(os.P_PID, stranger, os.WEXITED | os.WNOWAIT)
reap_strangers({})
try:
    os.waitpid(stranger, 0)
except ChildProcessError:
    print("reaped")
ours = os.fork() or os._exit(3)
os.waitid(os.P_PID, ours, os.WEXITED | os.WNOWAIT)
reap_strangers({ours})
print(os.waitpid(ours, 0)[1] >> 8)
"""
    done = run(script)
    assert done.stdout.split() == [b"reaped", b"3"], done.stderr


# -- stopping (F-11) --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain(host: Host, number: signal.Signals) -> None:
    """F-11: workers and scheduler first, the monitor when all of them are gone."""
    host.start_running({**WORKER, "count": 2}, SCHEDULER, MONITOR)
    host.send(number)
    assert host.wait() == 0
    leavers = [fact for fact in host.facts("bye") if fact["role"] != "monitor"]
    assert len(leavers) == 3
    assert len(host.facts("term")) == 4
    (last,) = host.facts("term", "monitor")
    assert all(in_order(leaver, last) for leaver in leavers)
    (summary,) = host.logged("stopped")
    assert (summary["workers"], summary["killed"], summary["code"]) == (2, 0, 0)
    assert summary["seconds"] < 1
    assert (host.folder / "err").read_text() == ""


def test_ctrl_c_reaches_the_whole_group_but_only_the_supervisor_acts(host: Host) -> None:
    host.start_running({**WORKER, "count": 2}, MONITOR)
    os.killpg(host.pid, signal.SIGINT)
    assert host.wait() == 0
    assert len(host.facts("bye")) == 3
    assert (host.folder / "err").read_text() == "", "no traceback"


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT), (signal.SIGTERM, signal.SIGQUIT)],
    ids=["INT INT", "TERM INT", "TERM QUIT"],
)
def test_asking_again_stops_now(host: Host, numbers: tuple[signal.Signals, signal.Signals]) -> None:
    host.put("mode", "slow")
    host.start_running({**WORKER, "count": 2}, MONITOR)
    host.send(numbers[0])
    host.eventually(lambda: len(host.who("term")) == 2)
    host.send(numbers[1])
    assert host.wait() == 0
    assert len(host.who("quit")) == 2
    assert host.logged("stopped")[0]["killed"] == 0


def test_a_second_sigterm_changes_nothing(host: Host) -> None:
    host.put("mode", "slow")
    host.start_running(WORKER)
    host.send(signal.SIGTERM)
    host.eventually(lambda: host.facts("term"))
    host.send(signal.SIGTERM)
    host.send(signal.SIGUSR2)  # a witness: it is acted on after the one before
    host.eventually(lambda: host.facts("dump"))
    assert host.facts("quit") == []
    assert len(host.facts("term")) == 1
    host.send(signal.SIGQUIT)
    assert host.wait() == 0


def test_quit_stops_now(host: Host) -> None:
    host.put("mode", "slow")
    host.start_running({**WORKER, "count": 2}, SCHEDULER, MONITOR)
    host.send(signal.SIGQUIT)
    assert host.wait() == 0
    assert len(host.who("quit")) == 3
    assert len(host.facts("term", "monitor")) == 1


def test_a_third_word_kills(host: Host) -> None:
    host.put("mode", "stubborn")
    host.start_running({**WORKER, "count": 2}, MONITOR, options={"cancel_grace": 1000.0})
    host.send(signal.SIGINT)
    host.eventually(lambda: len(host.who("term")) == 2)
    host.send(signal.SIGINT)
    host.eventually(lambda: len(host.who("quit")) == 2)
    host.send(signal.SIGINT)
    assert host.wait() == 0
    assert host.logged("stopped")[0]["killed"] == 2
    assert len(host.facts("handed back")) == 2, "the monitor is there until the jobs of the killed are handed back"


def test_who_does_not_leave_in_time_is_killed(host: Host) -> None:
    """F-11: grace + cancel_grace + 1 s."""
    host.put("mode", "stubborn")
    host.start_running({**WORKER, "count": 2}, MONITOR, options={"grace": 0.2, "cancel_grace": 0.1})
    told_at = time.monotonic()
    assert host.stop() == 0
    assert 1.3 <= time.monotonic() - told_at < 3
    assert host.logged("stopped")[0]["killed"] == 2
    assert len(host.facts("handed back")) == 2
    assert {fact["status"] for fact in host.facts("handed back")} == {signal.SIGKILL}


def test_the_monitor_is_replaced_even_during_a_drain(host: Host) -> None:
    host.put("mode-worker", "slow")
    host.start_running(WORKER, MONITOR)
    host.send(signal.SIGTERM)
    host.eventually(lambda: host.facts("term"))
    os.kill(host.pids("monitor")[0], signal.SIGKILL)
    host.eventually(lambda: len(host.pids("monitor")) == 2)
    os.kill(host.pids("worker")[0], signal.SIGKILL)
    assert host.wait() == 0
    assert len(host.facts("handed back")) == 1
    assert len(host.logged("worker started")) == 1, "workers are not"


# -- quiet, resume, dump, more, fewer ---------------------------------------------------------------------------------


def test_quiet_and_resume(host: Host) -> None:
    host.start_running({**WORKER, "count": 2}, SCHEDULER, MONITOR)
    host.send(signal.SIGTSTP)
    host.eventually(lambda: len(host.who("quiet", "worker")) == 2)
    host.send(signal.SIGTTIN)
    host.until_running(5)
    assert host.facts("running", "worker")[-1]["quiet"], "one that comes meanwhile is quiet from its first moment"
    host.send(signal.SIGCONT)
    host.eventually(lambda: len(host.facts("running", "worker")) >= 6)
    assert host.facts("quiet", "scheduler") == []
    assert host.stop() == 0


def test_a_worker_that_starts_while_the_others_are_quiet_is_told_again(host: Host) -> None:
    """The signal may come before the handler; it is repeated when the worker serves."""
    host.put("mode", "late")
    host.put("hold")
    host.start(WORKER)
    host.eventually(lambda: host.facts("booted"))
    host.send(signal.SIGTSTP)
    host.eventually(lambda: host.logged("quiet: taking nothing new"))
    host.drop("hold")
    host.eventually(lambda: len(host.facts("quiet", "worker")) >= 1)
    assert host.stop() == 0


def test_dump_is_forwarded(host: Host) -> None:
    host.start_running({**WORKER, "count": 2}, MONITOR)
    host.send(signal.SIGUSR2)
    host.eventually(lambda: len(host.facts("dump")) == 2)
    host.send(signal.SIGUSR1)  # meant for workers: harmless here
    assert host.stop() == 0


def test_more_and_fewer(host: Host) -> None:
    host.start_running({**WORKER, "count": 2}, SCHEDULER, MONITOR)
    host.send(signal.SIGTTIN)
    host.until_running(5)
    assert host.facts("running")[-1]["number"] == 3
    for left in (2, 1):
        host.send(signal.SIGTTOU)
        host.eventually(lambda left=left: len(host.facts("bye", "worker")) == 3 - left)
    assert [fact["number"] for fact in host.facts("bye")] == [3, 2], "the last one first"
    host.send(signal.SIGTTOU)
    host.eventually(lambda: host.logged("the last one stays"))
    assert host.stop() == 0
    assert len(host.logged("worker started")) == 3, "nobody followed those that were removed"


def test_no_more_than_the_board_holds(host: Host) -> None:
    host.start_running(WORKER, slots=2)
    host.send(signal.SIGTTIN)
    host.eventually(lambda: host.logged("no room for one more"))
    assert host.stop() == 0


# -- rolling restart --------------------------------------------------------------------------------------------------


def test_rolling_restart_one_by_one(host: Host) -> None:
    host.start_running({**WORKER, "count": 3}, SCHEDULER, MONITOR)
    running = sorted(host.facts("running"), key=lambda fact: (fact["role"] == "scheduler", fact["number"]))
    old = {fact["pid"]: fact for fact in running if fact["role"] != "monitor"}
    first = running[0]["pid"]
    host.put(f"hang-{first}")
    host.send(signal.SIGHUP)
    host.eventually(lambda: first in host.who("term"))
    host.send(signal.SIGUSR2)
    host.eventually(lambda: len(host.who("dump")) == 3)  # turns of the loop later
    assert len(host.facts("entry")) == 6, "while one leaves, no other is started"
    host.drop(f"hang-{first}")
    host.eventually(lambda: host.logged("rolling restart done"))
    new = [fact for fact in host.facts("running") if fact["pid"] not in old and fact["role"] != "monitor"]
    assert [(fact["role"], fact["number"]) for fact in new] == [(f["role"], f["number"]) for f in old.values()]
    assert {fact["generation"] for fact in new} == {1}
    gone: dict[str, Any] | None = None
    for was, now in zip(old.values(), new, strict=True):
        (term,) = [fact for fact in host.facts("term") if fact["pid"] == was["pid"]]
        (bye,) = [fact for fact in host.facts("bye") if fact["pid"] == was["pid"]]
        (entry,) = [fact for fact in host.facts("entry") if fact["pid"] == now["pid"]]
        assert in_order(entry, now, term, bye), "the old one is told to go when its replacement serves"
        assert gone is None or in_order(gone, entry), "the next one starts when the one before is gone"
        gone = bye
    assert len(host.pids("monitor")) == 1, "it has nothing new to run"
    assert host.stop() == 0


def test_the_old_one_serves_until_the_replacement_has_reached_redis(host: Host) -> None:
    host.start_running(WORKER, MONITOR)
    host.put("hold")
    host.send(signal.SIGHUP)
    host.eventually(lambda: len(host.facts("booted", "worker")) == 2)
    host.send(signal.SIGUSR2)
    host.eventually(lambda: host.facts("dump"))  # a turn of the loop later
    assert host.facts("term") == []
    host.drop("hold")
    host.eventually(lambda: host.logged("rolling restart done"))
    assert [fact["pid"] for fact in host.facts("term")] == host.pids("worker")[:1]
    assert host.stop() == 0


@pytest.mark.parametrize("mode", ["unusable", "crashes", "refuses"])
def test_a_broken_release_leaves_the_old_workers_alone(host: Host, mode: str) -> None:
    host.start_running({**WORKER, "count": 2}, MONITOR)
    host.put("mode", mode)
    for attempt in range(1, 7):  # more often than a crash loop may last
        host.send(signal.SIGHUP)
        host.eventually(lambda attempt=attempt: len(host.logged("rolling restart abandoned")) == attempt)
    assert host.facts("term") == []
    host.put("mode", "")
    host.send(signal.SIGHUP)
    host.eventually(lambda: host.logged("rolling restart done"))
    assert len(host.facts("bye", "worker")) == 2
    assert host.stop() == 0


def test_a_second_hangup_rolls_those_of_the_first(host: Host) -> None:
    host.start_running({**WORKER, "count": 2})
    host.put("hold")
    host.send(signal.SIGHUP)
    host.eventually(lambda: len(host.facts("booted")) == 3)
    host.send(signal.SIGHUP)
    host.eventually(lambda: len(host.logged("rolling restart")) == 2)
    host.drop("hold")
    host.eventually(lambda: host.logged("rolling restart done"))
    gone = {fact["pid"] for fact in host.facts("bye")}
    assert [fact["generation"] for fact in host.facts("running") if fact["pid"] not in gone] == [2, 2]
    assert host.stop() == 0


def test_the_old_one_dies_while_its_replacement_boots(host: Host) -> None:
    host.start_running(WORKER, MONITOR)
    host.put("hold")
    host.send(signal.SIGHUP)
    host.eventually(lambda: len(host.facts("booted", "worker")) == 2)
    os.kill(host.pids("worker")[0], signal.SIGKILL)
    host.eventually(lambda: host.facts("handed back"))
    host.drop("hold")
    host.eventually(lambda: host.logged("rolling restart done"))
    assert len(host.logged("worker started")) == 2, "the replacement is the successor"
    assert host.stop() == 0


def test_hangup_brings_new_settings(host: Host) -> None:
    host.start_running({**WORKER, "count": 3}, MONITOR, reload=True)
    host.put(
        "new-specs",
        json.dumps([{**WORKER, "count": 2, "settings": {"version": 2}}, {**MONITOR, "settings": {"version": 2}}]),
    )
    host.send(signal.SIGHUP)
    host.eventually(lambda: host.logged("rolling restart done"))
    host.eventually(lambda: len(host.pids("monitor")) == 2)
    new = [fact for fact in host.facts("running") if fact["settings"] == 2]
    assert sorted((fact["role"], fact["number"]) for fact in new) == [("monitor", 1), ("worker", 1), ("worker", 2)]
    (old_monitor,) = host.facts("bye", "monitor")
    (new_monitor,) = [fact for fact in host.facts("entry", "monitor") if fact["settings"] == 2]
    assert in_order(old_monitor, new_monitor), "there is one at a time: it holds a port"
    assert host.stop() == 0
    assert host.logged("stopped")[0]["workers"] == 2


def test_a_reload_that_takes_long_stops_nothing(host: Host) -> None:
    """While the application is asked for its settings, a dead worker is replaced; a second SIGHUP asks anew."""
    host.start_running({**WORKER, "count": 2}, reload=True)
    host.send(signal.SIGHUP)
    host.eventually(lambda: host.facts("reading"))
    os.kill(host.pids()[0], signal.SIGKILL)
    host.until_running(3)
    host.send(signal.SIGHUP)
    host.eventually(lambda: len(host.facts("reading closed")) == 1)
    assert host.logged("rolling restart") == []
    host.put("new-specs", json.dumps([{**WORKER, "count": 2, "settings": {"version": 2}}]))
    host.send(signal.SIGCHLD)  # as its process would
    host.eventually(lambda: host.logged("rolling restart done"))
    assert len(host.facts("reading closed")) == 2
    assert host.facts("running")[-1]["settings"] == 2
    assert host.stop() == 0


def test_a_stop_does_not_wait_for_a_reload(host: Host) -> None:
    host.start_running(WORKER, reload=True)
    host.send(signal.SIGHUP)
    host.eventually(lambda: host.facts("reading"))
    assert host.stop() == 0
    assert len(host.facts("reading closed")) == 1


def test_bad_new_settings_are_refused(host: Host) -> None:
    host.put("new-specs", "bad")
    host.start_running(WORKER, MONITOR, reload=True)
    host.send(signal.SIGHUP)
    host.eventually(lambda: host.logged("reload refused, going on as before"))
    for count, specs in enumerate([[WORKER], [{**WORKER, "count": 15}, MONITOR]], start=2):  # roles, room
        host.put("new-specs", json.dumps(specs))
        host.send(signal.SIGHUP)
        host.eventually(lambda count=count: len(host.logged("reload refused, going on as before")) == count)
    assert host.facts("term") == host.logged("rolling restart") == []
    assert host.stop() == 0


def test_new_settings_that_do_not_start_are_taken_back(host: Host) -> None:
    host.start_running({**WORKER, "count": 2}, reload=True)
    broken = {**WORKER, "count": 2, "settings": {"mode": "unusable", "version": 2}}
    host.put("new-specs", json.dumps([broken]))
    host.send(signal.SIGHUP)
    host.eventually(lambda: host.logged("rolling restart abandoned"))
    os.kill(host.pids()[0], signal.SIGKILL)
    host.until_running(3)
    assert host.facts("running")[-1]["settings"] is None
    assert host.stop() == 0


def test_stop_during_a_rolling_restart(host: Host) -> None:
    host.start_running({**WORKER, "count": 2}, MONITOR)
    host.put("hold")
    host.send(signal.SIGHUP)
    host.eventually(lambda: len(host.facts("booted", "worker")) == 3)
    assert host.stop() == 0
    assert host.logged("stopped")[0]["killed"] == 0
    assert host.logged("rolling restart abandoned") == []


def test_one_that_leaves_already_is_not_told_again(host: Host) -> None:
    """It would begin its grace anew."""
    host.put("mode", "slow")
    host.start_running({**WORKER, "count": 2})
    leaver = host.facts("running")[0]["pid"]
    host.send(signal.SIGHUP)
    host.eventually(lambda: leaver in host.who("term"))
    host.send(signal.SIGTERM)
    host.eventually(lambda: len(host.who("term")) == 3)
    host.send(signal.SIGUSR2)
    host.eventually(lambda: leaver in host.who("dump"))
    assert [fact["pid"] for fact in host.facts("term")].count(leaver) == 1
    host.send(signal.SIGQUIT)
    assert host.wait() == 0


def test_hangup_during_a_drain_is_ignored(host: Host) -> None:
    host.put("mode-worker", "slow")
    host.start_running(WORKER)
    host.send(signal.SIGTERM)
    host.eventually(lambda: host.facts("term"))
    for number in (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGTSTP, signal.SIGCONT):
        host.send(number)
    host.send(signal.SIGQUIT)
    assert host.wait() == 0
    assert len(host.logged("worker started")) == 1
    assert host.logged("rolling restart") == [] == host.logged("quiet: taking nothing new")


def test_changed_files_roll_the_workers(host: Host, tmp_path: Path) -> None:
    source = tmp_path / "app"
    source.mkdir()
    (source / "tasks.py").write_text("one = 1")
    host.start_running(WORKER, options={"reload_paths": [str(source)]})
    (source / "tasks.py").write_text("three = 3")
    host.eventually(lambda: host.logged("rolling restart done"))
    assert host.logged("rolling restart")[0]["files"] == str(source / "tasks.py")
    assert host.stop() == 0


def test_which_files_are_watched(tmp_path: Path) -> None:
    for name in ("app", "app/deep", ".git", "node_modules", "env", "app/__pycache__"):
        (tmp_path / name).mkdir()
    (tmp_path / "env" / "pyvenv.cfg").touch()
    watch = SourceWatch([tmp_path])
    assert [bool(watch), bool(SourceWatch([]))] == [True, False]
    assert watch.changed() == []
    for name in (".git/a.py", "node_modules/a.py", "env/a.py", "app/__pycache__/a.py", "app/a.txt", "app/.#a.py"):
        (tmp_path / name).touch()
    assert watch.changed() == []
    (tmp_path / "app/deep/a.py").touch()
    assert watch.changed() == [str(tmp_path / "app/deep/a.py")]
    (tmp_path / "app/deep/a.py").write_text("longer")
    assert watch.changed() == [str(tmp_path / "app/deep/a.py")]
    (tmp_path / "app/deep/a.py").unlink()
    assert watch.changed() == [str(tmp_path / "app/deep/a.py")]
    assert watch.changed() == []
    assert SourceWatch([tmp_path / "missing"]).changed() == []


# -- pid file ---------------------------------------------------------------------------------------------------------


def test_pid_file(host: Host, tmp_path: Path) -> None:
    """A-17: nobody else may read or write it."""
    path = tmp_path / "fastq.pid"
    host.start_running(WORKER, MONITOR, options={"pidfile": str(path)})
    assert path.read_text() == f"{host.pid}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "second").mkdir()
    second = Host(tmp_path / "second", host.eventually).start(WORKER, options={"pidfile": str(path)})
    assert second.wait() == 4
    assert f"held by the live process {host.pid}" in second.logged("supervisor cannot start")[0]["error"]
    assert path.read_text() == f"{host.pid}\n"
    assert host.stop() == 0
    assert not path.exists()


@linux
def test_the_pid_file_of_a_killed_supervisor_blocks_nobody(host: Host, tmp_path: Path) -> None:
    """Even when its number is in use again."""
    path = tmp_path / "fastq.pid"
    host.start_running(WORKER, MONITOR, options={"pidfile": str(path)})
    host.send(signal.SIGKILL)
    host.wait()
    path.write_text(f"{os.getpid()}\n")
    (tmp_path / "second").mkdir()
    second = Host(tmp_path / "second", host.eventually).start_running(WORKER, options={"pidfile": str(path)})
    assert path.read_text() == f"{second.pid}\n"
    assert second.stop() == 0


@pytest.mark.parametrize("what", ["text", "folder", "link", "missing folder"])
def test_what_is_no_pid_file_is_left_alone(host: Host, tmp_path: Path, what: str) -> None:
    path = tmp_path / "precious"
    if what == "text":
        path.write_text("my diary")
    elif what == "folder":
        path.mkdir()
    elif what == "link":
        (tmp_path / "target").touch()
        path.symlink_to(tmp_path / "target")
    else:
        path = path / "fastq.pid"
    host.start(WORKER, options={"pidfile": str(path)})
    assert host.wait() == 2, "a mistake in the settings, not a process in the way"
    assert str(path) in host.logged("supervisor cannot start")[0]["error"]
    if what == "text":
        assert path.read_text() == "my diary"


def test_a_pid_file_that_was_replaced_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "fastq.pid"
    ours = PidFile(str(path))
    ours.acquire()
    path.unlink()
    path.write_text("1\n")
    ours.release()
    assert path.read_text() == "1\n"


def test_a_pid_file_that_is_removed_while_we_lock_it_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fastq.pid"
    path.touch()
    ours, lock, calls = PidFile(str(path)), fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            path.unlink()  # its owner was about to leave
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    ours.acquire()
    assert path.read_text() == f"{os.getpid()}\n"
    assert len(calls) == 2
    ours.release()
    assert not path.exists()


# -- systemd ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def systemd(host: Host, tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
        door.bind(str(tmp_path / "notify"))
        door.settimeout(10)
        host.environ["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        yield door


def hear(door: socket.socket, wanted: str) -> list[str]:
    """The next message that is not a sign of life, as lines."""
    while True:
        lines = door.recv(4096).decode().splitlines()
        if lines != ["WATCHDOG=1"] or wanted == "WATCHDOG=1":
            assert lines[0] == wanted
            return lines


def test_systemd_is_told(host: Host, systemd: socket.socket) -> None:
    host.put("hold")
    host.start({**WORKER, "count": 2}, MONITOR)
    host.eventually(lambda: len(host.facts("booted")) == 3)
    systemd.setblocking(False)
    with pytest.raises(BlockingIOError):
        systemd.recv(4096)  # ready means that a worker serves
    systemd.settimeout(10)
    host.drop("hold")
    hear(systemd, "READY=1")
    host.until_running(3)
    host.send(signal.SIGHUP)
    assert hear(systemd, "RELOADING=1")[1].startswith("MONOTONIC_USEC=")
    hear(systemd, "READY=1")
    host.send(signal.SIGTERM)
    hear(systemd, "STOPPING=1")
    assert host.wait() == 0


def test_the_watchdog_is_fed(host: Host, systemd: socket.socket) -> None:
    host.environ["WATCHDOG_USEC"] = "200000"
    host.start_running(WORKER)
    for _ in range(3):
        while systemd.recv(4096) != b"WATCHDOG=1":
            pass
    assert host.stop() == 0


def test_the_watchdog_of_another_process_is_not(host: Host, systemd: socket.socket) -> None:
    host.environ.update(WATCHDOG_USEC="1000", WATCHDOG_PID="1")
    host.start(WORKER)
    hear(systemd, "READY=1")
    assert host.stop() == 0
    assert systemd.recv(4096).splitlines()[0] == b"STOPPING=1"


@linux
def test_an_abstract_socket_of_systemd(host: Host, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
        door.bind("\0" + tmp_path.name + str(os.getpid()))
        door.settimeout(10)
        host.environ["NOTIFY_SOCKET"] = "@" + tmp_path.name + str(os.getpid())
        host.start_running(WORKER)
        hear(door, "READY=1")
        assert host.stop() == 0
