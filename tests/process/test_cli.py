"""The command line: its answers, its errors in one line, its exit statuses, its start."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
import pytest

from fastq.broker.command import raw
from fastq.broker.views import QueueInfo
from fastq.cli import root, session, table, top
from fastq.job import Extra, decode_envelope
from tests.conftest import eventually
from tests.redis.desk import NOT_MSGPACK, Bench

ROOT = Path(__file__).parents[2]
CLOSED = "redis://app:s3cret@127.0.0.1:1/0"
"""Nothing listens on port 1."""

APP = """
import os
import fastq

app = fastq.FastQ(metrics_port=0)

@app.task
async def add(a: int, b: int = 2) -> int:
    return a + b

@app.task(max_attempts=1)
def boom(why: str = "no") -> None:
    raise ValueError(why)

@app.cron("30 4 * * *", tz="Europe/Berlin", name="nightly")
@app.task
async def report() -> None: ...

@app.every(30, name="pulse")
@app.task
async def beat() -> None: ...
"""


class Answer(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self
        return json.loads(self.out)


class Call:
    """A command line in this process: `call("jobs", "ls")`."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Answer:
        self._capsys.readouterr()
        code = root.run(arguments)
        said = self._capsys.readouterr()
        return Answer(code, said.out, said.err)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.chdir(tmp_path)  # no settings file but a test's own
    return Call(capsys)


@pytest.fixture
def bench(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("FASTQ_REDIS_URL", redis_url)
    made = Bench(redis_url)
    yield made
    made.connection.close()


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **more}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fastq", *arguments]


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start("worker", FASTQ_LEASE="2s")`: a real process in the test's folder, gone when the test ends."""
    processes: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **more: str) -> subprocess.Popen[str]:
        processes.append(
            subprocess.Popen(
                command(*arguments),
                cwd=tmp_path,
                env=environment(**more),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ran(folder: Path, *arguments: str, **more: str) -> Answer:
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("statu", 2, "no such command 'statu' - did you mean 'status'? (see fastq --help)"),
        ("jobs sho x", 2, "no such command 'sho' - did you mean 'show'? (see fastq jobs --help)"),
        ("wat", 2, "no such command 'wat' (see fastq --help)"),
        ("status --jsn", 2, "no such option '--jsn' - did you mean '--json'? (see fastq status --help)"),
        ("supervise --workes 3", 2, "no such option '--workes' - did you mean '--workers'?"),
        ("--nope", 2, "no such option '--nope'"),
        ("jobs ls --queue mail", 2, "no such option '--queue': QUEUE is an argument, give its value alone (see fastq"),
        ("jobs show", 2, "missing argument 'ID'"),
        ("jobs ls --state pendng", 2, "'pendng' is not one of"),
        ("jobs ls --limit 201", 2, "201 is not in the range 1<=x<=200"),
        ("jobs ls --limit nan", 2, "'nan' is not a valid integer"),
        ("jobs ls --offset 3", 2, "--offset needs a QUEUE"),
        ("top --interval 0", 2, "0.0 is not in the range"),
        ("status --redis-url http://x", 2, "the Redis URL http://x has no usable scheme"),
        ("status --redis-url memory://", 2, "memory:// is the private server of another process"),
        ("status --prefix a{b", 2, "prefix="),
        ("status --config none.toml", 2, "cannot read none.toml: No such file or directory"),
        ("supervise --concurrency many", 2, "concurrency="),
        ("supervise --grace 1y", 2, "'1y' is no duration"),
        ("worker --queues a,b=2", 2, "give every queue a weight, or none"),
        ("dev", 2, "no application was named: fastq dev app.py"),
        ("cron ls", 2, "no application was named"),
        ("cron ls nope:app", 2, "no module named 'nope'"),
        ("enqueue a/b", 2, "is not a task name"),
        ("enqueue send --json {", 2, "the arguments of task 'send' are not JSON"),
        ("enqueue send --json 3", 2, "must be an object"),
        ('enqueue send --json {"":1}', 2, "must be an object"),
        ("enqueue send --queue a/b", 2, "queue name 'a/b'"),
        ("enqueue send --delay soon", 2, "'soon' is no duration"),
        ("enqueue send --delay 367d", 2, "at most 366 days"),
        ("enqueue send --job-id a\nb", 2, "job_id="),
        ("dlq purge mail", 2, "give one of IDs, --older-than and --all"),
        ("dlq purge mail --all --older-than 1d", 2, "give one of IDs, --older-than and --all"),
        (f"status --redis-url {CLOSED}", 3, "cannot reach redis://app:***@127.0.0.1:1/0 (Connection refused)"),
        (f"enqueue send --redis-url {CLOSED}", 3, "or set FASTQ_REDIS_URL"),
        (f"top --redis-url {CLOSED}", 3, "cannot reach"),
        (f"doctor --redis-url {CLOSED}", 3, "cannot reach"),
    ],
)
def test_an_error_is_one_line_and_a_status(call: Call, line: str, code: int, words: str) -> None:
    """Nothing is printed but one line that names the thing and its value; no traceback, no password (A-08)."""
    answer = call(*line.split(" "))
    assert words in answer.err
    assert (answer.code, answer.out) == (code, "")
    assert answer.err.startswith("fastq: ")
    assert answer.err.count("\n") == 1
    assert "s3cret" not in answer.err


@pytest.mark.parametrize(
    "line",
    [
        "status \udcff", "jobs show \udcff", "jobs cancel \udcff", "jobs cancel \udcff --json", "dlq show \udcff", "queues purge \udcff --yes",
        "dlq replay \udcff", "enqueue \udcff", "enqueue send --json \udcff", "enqueue send --queue \udcff",
        "enqueue send --job-id \udcff", "enqueue send --delay \udcff", "cron next \udcff --app \udcff",
        "enqueue send --json " + "[" * 100_000, 'enqueue send --json {"a":' + "9" * 400 + "}",
    ],
    ids=lambda line: ascii(line)[:50],
)  # fmt: skip
def test_bytes_that_are_no_text_and_other_abuse(bench: Bench, call: Call, line: str) -> None:
    """Whatever a shell hands over: one line, no traceback."""
    bench.put("a")
    answer = call(*line.split(" "))
    assert answer.code in (1, 2), answer
    assert (answer.out + answer.err).count("\n") == 1
    assert (answer.out + answer.err).isascii() or answer.err == ""


@pytest.mark.parametrize(("priority", "words"), [("11", "priority=11"), ("x", "'x' is not a valid integer")])
def test_a_priority_that_does_not_exist(bench: Bench, call: Call, priority: str, words: str) -> None:
    answer = call("enqueue", "send", "--priority", priority)
    assert (answer.code, answer.out) == (2, "")
    assert words in answer.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("status mial", "no queue 'mial' - did you mean 'mail'?"),
        ("queues pause mial", "no queue 'mial' - did you mean 'mail'?"),
        ("queues purge mial --yes", "no queue 'mial' - did you mean 'mail'?"),
        ("jobs ls mial", "no queue 'mial' - did you mean 'mail'?"),
        ("dlq replay mial", "no queue 'mial' - did you mean 'mail'?"),
        ("jobs show nope", "no job 'nope' in any queue, or its record has expired"),
        ("jobs show nope -q mail", "no job 'nope' in queue 'mail'"),
        ("dlq show nope", "no dead letter 'nope' in any queue"),
    ],
)
def test_what_was_not_found_is_named(bench: Bench, call: Call, line: str, words: str) -> None:
    bench.put("a")
    answer = call(*line.split())
    assert (answer.code, answer.out) == (1, "")
    assert words in answer.err
    assert answer.err.count("\n") == 1


def test_redis_that_refuses_the_password_is_no_traceback(make_server: Any, call: Call) -> None:
    server = make_server(config={"requirepass": "right"})
    answer = call("status", "--redis-url", server.url.replace("right", "wr0ng"))
    assert answer.code == 1
    assert "check the user, password and permissions" in answer.err
    assert "wr0ng" not in answer.err


def test_a_misspelt_variable_is_said_on_stderr_only(bench: Bench, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTQ_CONCURENCY", "3")
    answer = call("status", "--json")
    assert "FASTQ_CONCURENCY" in answer.err
    assert answer.json["queues"] == []


def test_the_real_process_says_the_same(tmp_path: Path) -> None:
    """One line, no traceback, and the statuses of ExitCode, through `python -m fastq`."""
    answer = ran(tmp_path, "status", FASTQ_REDIS_URL=CLOSED)
    assert (answer.code, answer.out, answer.err.count("\n")) == (3, "", 1)
    assert answer.err.startswith("fastq: cannot reach redis://app:***@127.0.0.1:1/0")
    answer = ran(tmp_path, "satus")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)


# -- help and version ---------------------------------------------------------------------------


def every_command() -> Iterator[tuple[str, ...]]:
    for part in root.VERBS.values():
        for name, verb in part.items():
            yield (name,)
            made = verb.load()[name]
            if isinstance(made, click.Group):
                yield from ((name, below) for below in made.commands)


def test_help_lists_every_verb_with_its_own_first_line(call: Call) -> None:
    """The list of verbs is a table, so that it costs no imports; here it is compared with what the verbs say."""
    for arguments in ((), ("--help",), ("-h",)):
        answer = call(*arguments)
        assert answer.code == 0
        assert answer.err == ""
    text = " ".join(answer.out.split())
    for part in root.VERBS.values():
        for name, verb in part.items():
            assert f"{name} {verb.help}" in text
            assert verb.load()[name].get_short_help_str(200).rstrip(".") == verb.help.rstrip(".")


@pytest.mark.parametrize("path", list(every_command()), ids=" ".join)
def test_every_command_is_documented(call: Call, path: tuple[str, ...]) -> None:
    """`--help` works everywhere, and docs/cli.md names every command and every option of it."""
    answer = call(*path, "--help")
    assert answer.code == 0
    assert answer.err == ""
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    section = page.partition(f"\n### fastq {' '.join(path)}")[2].partition("\n##")[0]
    assert section, f"docs/cli.md has no heading for fastq {' '.join(path)}"
    common = page.partition("\n## Options of every verb")[2].partition("\n## ")[0]
    for option in re.findall(r"--[a-z-]+", answer.out.partition("Options:")[2].partition("Commands:")[0]):
        assert f"`{option}" in section or f"`{option}" in common or option == "--help", option


def test_a_group_alone_prints_its_help(call: Call) -> None:
    answer = call("dlq")
    assert answer.code == 0
    assert "replay" in answer.out


def test_versions(call: Call) -> None:
    """`fastq --version` for people in a hurry, `fastq version` for bug reports."""
    short = call("--version")
    assert re.fullmatch(r"fastq \d+\.\d+\.\d+\S*\n", short.out)
    long = call("version")
    assert long.out.splitlines()[0] == short.out.strip()
    assert call("version", "--json").json["python"].startswith(f"3.{sys.version_info.minor}")


# -- start ----------------------------------------------------------------------------------------

START = 0.250
"""Seconds of CPU, above the interpreter's own start, from exec to the end."""

HEAVY = {"redis", "uvloop", "prometheus_client", "rich", "cronsim", "http.server", "ssl", "multiprocessing"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which modules are compiled once, as they are where fastq is installed."""
    environ = environment(PYTHONPYCACHEPREFIX=str(tmp_path_factory.mktemp("pyc")))
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    return environ


def cpu(arguments: list[str], environ: dict[str, str], folder: Path) -> float:
    """CPU seconds of one process: another builder's load on the machine does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(arguments, env=environ, cwd=folder, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "line",
    [
        "--version",
        "--help",
        "version",
        *(f"{' '.join(path)} --help" for path in every_command() if len(path) == 1),
        f"status --redis-url {CLOSED}",
        f"jobs ls --redis-url {CLOSED}",
        f"queues ls --redis-url {CLOSED}",
        f"dlq ls --redis-url {CLOSED}",
        f"enqueue send --redis-url {CLOSED}",
        f"doctor --redis-url {CLOSED}",
        f"top --redis-url {CLOSED}",
    ],
)
def test_a_verb_starts_at_once(line: str, compiled: dict[str, str], tmp_path: Path) -> None:
    """The whole way to the help text, or to the first byte for a Redis that does not listen, best of several."""
    interpreter = min(cpu([sys.executable, "-c", "pass"], compiled, tmp_path) for _ in range(3))
    spent = []
    for _ in range(12):
        spent.append(cpu(command(*line.split()), compiled, tmp_path) - interpreter)
        if spent[-1] < START:
            return
    pytest.fail(f"fastq {line} took {min(spent) * 1_000:.0f} ms of CPU")


def test_the_ways_to_redis_import_nothing_heavy(compiled: dict[str, str], tmp_path: Path) -> None:
    """redis-py alone costs 250 ms; an event loop is not needed to ask a question."""
    probe = "import sys; import fastq; before = set(sys.modules); from fastq.cli.root import run; run(sys.argv[1:]); print(*set(sys.modules) - before)"
    for line in ("status", "jobs ls", "queues ls", "dlq ls", "enqueue send", "doctor", "top"):
        arguments = [sys.executable, "-c", probe, *line.split(), "--redis-url", CLOSED]
        said = subprocess.run(arguments, env=compiled, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert HEAVY.isdisjoint(said.stdout.split()), line
        assert "asyncio" not in said.stdout.split(), line


# -- status and top -----------------------------------------------------------------------------


def test_status_of_an_empty_redis(bench: Bench, call: Call) -> None:
    answer = call("status")
    assert answer.code == 0
    assert answer.out.splitlines() == [
        "no queue yet: nothing was ever enqueued here",
        "",
        "no worker runs",
        "scheduler: none runs",
    ]
    assert call("status", "--json").json == {"queues": [], "workers": [], "scheduler": None, "paused_tasks": {}}


def test_status_in_columns_and_in_json(bench: Bench, call: Call) -> None:
    bench.put("a", "b", age=75)
    bench.put("c", delay_ms=60_000)
    bench.worker()
    bench.run(bench.inspector.pause("mail"))
    lines = call("status").out.splitlines()
    assert lines[0].split() == [
        "QUEUE",
        "PENDING",
        "SCHEDULED",
        "PARKED",
        "RUNNING",
        "DEAD",
        "WORKERS",
        "OLDEST",
        "STATE",
    ]
    assert re.fullmatch(r"mail  +2 +1 +0 +0 +0 +1 +1m\d\ds +paused", lines[1])
    assert lines[3].split() == ["WORKER", "HOST", "PID", "RUNNING", "OF", "LEASE", "STATE", "QUEUES", "VERSION"]
    assert re.fullmatch(r"w1 +host-a +42 +0 +100 +1\d\.\ds +running +mail +0\.1\.0", lines[4])
    value = call("status", "mail", "--json").json
    assert value["queues"][0]["ready"] == {"5": 2}
    assert value["workers"][0]["id"] == "w1"


def test_status_of_one_queue(bench: Bench, call: Call, redis_url: str) -> None:
    other = Bench(redis_url, "bulk")
    for each in (bench, other):
        each.put("a")
        each.worker(f"w-{each.queue}")
    other.connection.close()
    value = call("status", "bulk", "--json").json
    assert [info["name"] for info in value["queues"]] == ["bulk"]
    assert [worker["id"] for worker in value["workers"]] == ["w-bulk"]


def test_text_that_a_job_brings_is_escaped(bench: Bench, call: Call) -> None:
    """A-16: a terminal takes orders from whoever can write to it."""
    bench.worker("w1", info=b"")
    evil = "\x1b]0;owned\x07\x1b[2J\nfastq: all is well"
    bench.bury("a", envelope=bench.envelope(extra=Extra(error=evil)))
    bench.connection.call(raw("HSET", bench.q.dead_errors, "a", _error(evil)))
    bench.put("b", extra=Extra(error=evil))
    for line in ("dlq ls", "dlq show a", "jobs show a", "jobs show b", "jobs ls", "jobs ls --state failed"):
        answer = call(*line.split())
        assert answer.code == 0
        assert "\x1b" not in answer.out
        assert "\nfastq: all" not in answer.out
        assert r"\x1b[2J" in answer.out


def _error(text: str) -> bytes:
    return msgspec.msgpack.encode(["exception", text, text, text, 1, 0, text])


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (QueueInfo(name="q"), QueueInfo(name="q", pending=10), (5.0, 0.0, 0.0)),
        (QueueInfo(name="q", pending=10), QueueInfo(name="q", finished=8, dead=2), (0.0, 4.0, 1.0)),
        (QueueInfo(name="q", running=4, finished=9), QueueInfo(name="q", running=4, finished=15), (3.0, 3.0, 0.0)),
        (QueueInfo(name="q", pending=9), QueueInfo(name="q"), (0.0, 0.0, 0.0)),
        (QueueInfo(name="q", finished=50, dead=3), QueueInfo(name="q", pending=2), (1.0, 0.0, 0.0)),
    ],
    ids=["arrivals", "a drain", "a steady flow", "a purge", "records expire"],
)
def test_rates_follow_from_two_looks(before: QueueInfo, after: QueueInfo, expected: tuple[float, ...]) -> None:
    found = top.rates(before, after, 2.0)
    assert (found.arrived, found.done, found.died) == expected
    assert top.rates(before, after, 0.0) == top.Rates()


def test_top_prints_frames_into_a_pipe(bench: Bench, call: Call) -> None:
    bench.put("a")
    bench.worker()
    answer = call("top", "--interval", "0.1", "--count", "2")
    assert answer.code == 0
    assert answer.out.count("IN/S") == 2
    assert answer.out.count("w1") == 2
    frames = [json.loads(line) for line in call("top", "-i", "0.1", "-n", "2", "--json").out.splitlines()]
    assert [frame["queues"][0]["pending"] for frame in frames] == [1, 1]
    assert (frames[0]["rates"], list(frames[1]["rates"])) == ({}, ["mail"])


def test_top_outlives_an_outage(make_server: Any, start: Start) -> None:
    """F-17: it says that Redis is away, and goes on when it is back."""
    server = make_server(appendonly=True)
    process = start("top", "--json", "--interval", "0.1", FASTQ_REDIS_URL=server.url)
    assert process.stdout is not None

    def frame_where(fact: Callable[[dict[str, Any]], bool]) -> None:
        assert process.stdout is not None
        while not fact(json.loads(process.stdout.readline())):
            pass

    frame_where(lambda frame: not frame["error"])
    server.shutdown()
    frame_where(lambda frame: "cannot reach" in frame["error"])
    server.start()
    frame_where(lambda frame: not frame["error"])
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.communicate()[1] == ""


PLAIN = "import sys; sys.modules['rich'] = None; from fastq.cli import main; main()"


@pytest.mark.parametrize("how", [["-m", "fastq"], ["-c", PLAIN]], ids=["rich", "plain"])
def test_top_on_a_terminal(bench: Bench, redis_url: str, tmp_path: Path, how: list[str]) -> None:
    """With and without the extra `cli`; Ctrl-C leaves the terminal as it was, and says nothing."""
    bench.put("a")
    bench.worker()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *how, "top", "--interval", "0.1"],
        cwd=tmp_path,
        env=environment(FASTQ_REDIS_URL=redis_url, TERM="xterm", LINES="40"),
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    seen = _until(ours, b"w1")
    process.send_signal(signal.SIGINT)
    code = process.wait(20)
    seen += _rest(ours)
    assert process.stderr is not None
    with process.stderr as stderr:
        assert (code, stderr.read()) == (130, b"")
    for word in (b"PENDING", b"mail", b"\x1b[?1049h"):
        assert word in seen
    assert seen.rstrip().endswith((b"\x1b[?1049l", b"\x1b[?25h")), seen[-60:]


def _until(fd: int, word: bytes) -> bytes:
    seen = b""
    while word not in seen:
        assert select.select([fd], [], [], 20)[0], f"the terminal shows no {word!r}: {seen[-500:]!r}"
        seen += os.read(fd, 65_536)
    return seen


def _rest(fd: int) -> bytes:
    seen = b""
    with contextlib.suppress(OSError):  # Linux: the other side is closed
        while select.select([fd], [], [], 0.2)[0] and (some := os.read(fd, 65_536)):
            seen += some
    os.close(fd)
    return seen


# -- jobs -------------------------------------------------------------------------------------------


def test_jobs_ls(bench: Bench, call: Call) -> None:
    bench.put("a", "b")
    bench.put("c", priority=9)
    lines = call("jobs", "ls").out.splitlines()
    assert lines[0].split() == ["ID", "QUEUE", "TASK", "PRIORITY", "ATTEMPTS", "ENQUEUED"]
    assert [line.split()[0] for line in lines[1:]] == ["c", "a", "b"]
    assert [job["id"] for job in call("jobs", "ls", "mail", "--offset", "1", "-n", "1", "--json").json] == ["a"]
    assert call("jobs", "ls", "--state", "running").out == "no running job\n"


def test_jobs_ls_of_all_queues_keeps_to_its_limit(bench: Bench, call: Call, redis_url: str) -> None:
    other = Bench(redis_url, "bulk")
    for each in (bench, other):
        each.put(*(f"{each.queue}-{i}" for i in range(5)))
    other.connection.close()
    assert len(call("jobs", "ls", "--limit", "7", "--json").json) == 7


def test_jobs_show(bench: Bench, call: Call) -> None:
    bench.finish("a", result={"sent": [1, 2]})
    text = call("jobs", "show", "a").out
    assert re.search(r"^state +success$", text, re.MULTILINE)
    assert re.search(r"^result +\{'sent': \[1, 2\]\}$", text, re.MULTILINE)
    assert call("jobs", "show", "a", "--json").json["result"] == {"sent": [1, 2]}


def test_jobs_cancel(bench: Bench, call: Call) -> None:
    bench.put("a", "b")
    bench.hold(bench.worker(), "b")
    assert call("jobs", "cancel", "a") == (0, "a: cancelled\n", "")
    answer = call("jobs", "cancel", "a", "b", "--queue", "mail")
    assert answer.code == 1
    assert answer.out.splitlines() == [
        "a: no such job that could still be cancelled",
        "b: is running: its worker was asked to stop it, and it will not run again",
    ]
    assert call("jobs", "cancel", "b", "--terminate").code == 0
    assert bench.connection.call(raw("HGET", bench.q.cancels, "b")).startswith(b"t")
    assert bench.state("a") == "cancelled"


def test_jobs_retry(bench: Bench, call: Call) -> None:
    bench.bury("dead")
    bench.put("later", delay_ms=60_000)
    bench.finish("done")
    answer = call("jobs", "retry", "dead", "later")
    assert (answer.code, answer.out.splitlines()) == (
        0,
        ["dead: sent back with a fresh budget of attempts", "later: due now"],
    )
    assert {bench.state("dead"), bench.state("later")} == {"pending"}
    assert call("jobs", "retry", "done", "nope", "--json").code == 1


# -- enqueue ------------------------------------------------------------------------------------------


def test_enqueue_by_name(bench: Bench, call: Call) -> None:
    """F067, F073: the id on stdout, and the job as a worker expects it."""
    answer = call("enqueue", "send", "--json", '{"to": "a@example.org", "n": [1, 2.5, null]}', "-q", "mail", "-p", "8")
    job_id = answer.out.strip()
    assert (answer.code, answer.err) == (0, "fastq: no live worker serves queue mail\n")
    assert re.fullmatch(r"[0-9a-f]{24}", job_id)
    envelope = decode_envelope(bench.connection.call(raw("HGET", bench.q.jobs, job_id)))
    assert (envelope.task, envelope.priority, envelope.attempt, envelope.extra) == ("send", 8, 0, None)
    assert msgspec.msgpack.decode(envelope.body) == {"to": "a@example.org", "n": [1, 2.5, None]}
    assert bench.info().ready == {8: 1}
    assert bench.run(bench.inspector.queues()) == ["mail"]


def test_enqueue_with_positional_arguments_and_a_delay(bench: Bench, call: Call) -> None:
    value = call("enqueue", "send", "--json", "[1, 2]", "--delay", "90s", "-q", "mail", "-o", "json").json
    assert (value["queue"], value["created"]) == ("mail", True)
    status = bench.run(bench.inspector.status(value["id"]))
    assert status.state == "scheduled"
    assert status.due_at == pytest.approx(bench.now() / 1_000 + 90, abs=30)


def test_enqueue_goes_to_the_first_queue_of_the_settings(
    bench: Bench, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTQ_QUEUES", "critical=3,mail=1")
    assert call("enqueue", "send", "-o", "json").json["queue"] == "critical"


def test_enqueue_reads_stdin(bench: Bench, redis_url: str, tmp_path: Path) -> None:
    done = subprocess.run(
        command("enqueue", "send", "--json", "-", "--queue", "mail"),
        input='{"to": "ü"}',
        env=environment(FASTQ_REDIS_URL=redis_url, PYTHONIOENCODING="utf-8"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    data = bench.connection.call(raw("HGET", bench.q.jobs, done.stdout.strip()))
    assert msgspec.msgpack.decode(decode_envelope(data).body) == {"to": "ü"}


def test_an_id_of_ones_own_is_used_once(bench: Bench, call: Call) -> None:
    line = ("enqueue", "send", "-q", "mail", "--job-id", "mail-17")
    first = call(*line)
    assert (first.code, first.out) == (0, "mail-17\n")
    again = call(*line)
    assert (again.code, again.out) == (0, "mail-17\n")
    assert "exists already" in again.err
    assert call(*line, "-o", "json").json["created"] is False
    assert bench.info().pending == 1
    bench.run(bench.inspector.cancel("mail-17"))
    answer = call(*line)
    assert (answer.code, answer.out) == (1, "")
    assert "that job ended as cancelled" in answer.err
    bench.bury("dead")
    assert "ended as failed" in call("enqueue", "send", "-q", "mail", "--job-id", "dead").err


def test_a_body_that_is_too_large(bench: Bench, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTQ_MAX_BODY", "100")
    answer = call("enqueue", "send", "--json", json.dumps({"to": "x" * 200}))
    assert answer.code == 2
    assert "more than 100" in answer.err


@pytest.mark.other_user("it is a user of its own")
def test_whoever_may_only_enqueue_is_not_told_of_workers(
    bench: Bench, call: Call, monkeypatch: pytest.MonkeyPatch, raw: Any, redis_url: str
) -> None:
    """Whether a worker knows the task is read from hashes that a producer need not see: the job is enqueued all the same."""
    raw.execute_command("ACL", "SETUSER", "shop", "on", ">pass", "~*", "&*", "+@all", "-hgetall")
    try:
        monkeypatch.setenv("FASTQ_REDIS_URL", redis_url.replace("://", "://shop:pass@"))
        answer = call("enqueue", "send", "-q", "mail")
    finally:
        raw.execute_command("ACL", "DELUSER", "shop")
    assert (answer.code, answer.err) == (0, "")
    assert raw.hexists("fastq:{mail}:jobs", answer.out.strip())


def test_a_lost_reply_makes_no_second_job(bench: Bench, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """F-17: the call is repeated, and the script knows it by its number."""
    from fastq.broker.connection import SyncConnection
    from fastq.errors import BrokerUnavailable

    real, calls = SyncConnection.ask, []

    def lossy(connection: SyncConnection, sent: Any, **how: Any) -> Any:
        replies = real(connection, sent, **how)
        calls.append(sent[0].script)
        if calls == [None, "enqueue_plain"]:  # the version of the keys was looked at first
            connection.close()
            raise BrokerUnavailable("the reply was lost")
        return replies

    monkeypatch.setattr(SyncConnection, "ask", lossy)
    assert call("enqueue", "send", "-q", "mail").code == 0
    monkeypatch.undo()
    assert calls == [
        None,
        "enqueue_plain",
        "enqueue_plain",
        None,
        None,
        None,
        None,
    ]  # the queue is noted, and who serves it is asked
    assert bench.info().pending == 1


# -- queues ---------------------------------------------------------------------------------------------


def test_queues_ls_pause_and_resume(bench: Bench, call: Call) -> None:
    assert call("queues", "ls").out == "no queue yet: nothing was ever enqueued here\n"
    bench.put("a")
    assert call("queues", "pause", "mail").out == "mail: paused\n"
    assert call("queues", "pause", "mail").out == "mail: was paused already\n"
    assert call("queues", "ls").out.splitlines()[1].endswith("paused")
    assert call("queues", "resume", "mail", "--json").json == {"queue": "mail", "changed": True}
    assert call("queues", "resume", "mail").out == "mail: was not paused\n"


def test_what_deletes_asks_first(bench: Bench, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put("a", "b")
    bench.bury("x")
    for line in ("queues purge mail", "dlq purge mail --all"):
        answer = call(*line.split())
        assert answer.code == 2
        assert "give --yes" in answer.err.lower()
    assert (bench.info().pending, bench.info().dead) == (2, 1)
    assert call("queues", "purge", "mail", "--yes").out == "mail: 2 jobs deleted\n"
    assert call("dlq", "purge", "mail", "--all", "--yes").out == "mail: 1 dead letter deleted\n"


@pytest.mark.parametrize(("said", "code", "left"), [("y\n", 0, 0), ("n\n", 130, 1)])
def test_at_a_terminal_the_answer_counts(
    bench: Bench, redis_url: str, tmp_path: Path, said: str, code: int, left: int
) -> None:
    bench.put("a")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("queues", "purge", "mail"),
        cwd=tmp_path,
        env=environment(FASTQ_REDIS_URL=redis_url),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    _until(ours, b"[y/N]")
    os.write(ours, said.encode())
    assert process.wait(20) == code
    assert b"Traceback" not in _rest(ours)
    assert bench.info().pending == left


# -- dead letters -----------------------------------------------------------------------------------------


def test_dlq_ls_and_show(bench: Bench, call: Call) -> None:
    assert call("dlq", "ls").out == "no dead letter\n"
    bench.bury("a")
    lines = call("dlq", "ls").out.splitlines()
    assert lines[0].split() == ["ID", "QUEUE", "TASK", "ATTEMPTS", "FAILED", "REASON", "ERROR"]
    assert "ValueError: no a" in lines[1]
    text = call("dlq", "show", "a").out
    assert re.search(r"^arguments +\{'to': 'a@example.org'\}$", text, re.MULTILINE)
    assert text.endswith("\ntraceback\n  Traceback\n")
    value = call("dlq", "show", "a", "--json").json
    assert (value["reason"], value["error_type"]) == ("exception", "ValueError")


def test_dlq_replay(bench: Bench, call: Call) -> None:
    """F-48: the oldest first, dry run first, twice is once."""
    bench.bury(*(f"job-{i}" for i in range(250)))
    assert call("dlq", "replay", "mail", "--dry-run", "--all").out == "mail: 250 jobs would be sent back\n"
    assert bench.info().dead == 250
    assert call("dlq", "replay", "mail").out == "mail: 100 jobs sent back\n"
    assert call("dlq", "replay", "mail", "--limit", "30").out == "mail: 30 jobs sent back\n"
    left = [letter.id for letter in bench.run(bench.inspector.dead("mail", 0, 1))]
    assert call("dlq", "replay", "mail", *left).out == "mail: 1 job sent back\n"
    assert call("dlq", "replay", "mail", "--all", "--json").json["replayed"] == 119
    assert call("dlq", "replay", "mail", "--all").out == "mail: 0 jobs sent back\n"
    assert bench.info().pending == 250


def test_dlq_replay_says_what_cannot_be_sent_back(bench: Bench, call: Call, raw: Any) -> None:
    bench.bury("a")
    raw.zadd("fastq:{mail}:dead", {"odd": 1})
    raw.hset("fastq:{mail}:dead:jobs", "odd", NOT_MSGPACK)
    answer = call("dlq", "replay", "mail")
    assert answer.code == 1
    assert answer.out.splitlines() == ["mail: 1 job sent back", "1 cannot be read and stay: odd"]
    answer = call("dlq", "replay", "mail", "nope")
    assert answer.code == 1
    assert "1 are not in this dead-letter queue: nope" in answer.out


def test_dlq_replay_at_a_rate(bench: Bench, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """F-48: a replay of thousands may be spread out."""
    bench.bury(*(f"job-{i}" for i in range(250)))
    pauses: list[float] = []
    monkeypatch.setattr("fastq.cli.dlq.time.sleep", pauses.append)
    assert call("dlq", "replay", "mail", "--all", "--rate", "100").out == "mail: 250 jobs sent back\n"
    assert [round(pause, 1) for pause in pauses] == pytest.approx([1.0, 1.0, 0.5], abs=0.3)


def test_dlq_purge(bench: Bench, call: Call, raw: Any) -> None:
    bench.bury("a", "b")
    raw.zadd("fastq:{mail}:dead", {"old": bench.now() - 100_000})
    assert call("dlq", "purge", "mail", "--older-than", "50s", "--yes").out == "mail: 1 dead letter deleted\n"
    some = call("dlq", "purge", "mail", "a", "nope")
    assert (some.code, some.out) == (1, "mail: 1 dead letter deleted\n1 are not in this dead-letter queue\n")
    assert call("dlq", "purge", "mail", "--all", "--yes", "--json").json == {"queue": "mail", "purged": 1}


# -- check --------------------------------------------------------------------------------------------------


def test_check_finds_and_repairs(bench: Bench, raw: Any, call: Call) -> None:
    """Invariant I1 from the command line: nothing, a lost job (status 5), mended (0), nothing."""
    bench.put("a", "b")
    assert call("check").out == f"1 queue, 2 jobs, {len(raw.keys('*'))} keys: 0 faults\n"
    raw.lrem(bench.q.ready[5], 0, "a")
    answer = call("check", "mail")
    assert answer.code == 5
    assert " FAULT  mail         lost        a: the job is in no place" in answer.out
    assert "-> fastq check --repair" in answer.out
    answer = call("check", "--json")
    assert answer.code == 5
    report = json.loads(answer.out)
    (fault,) = report["faults"]
    assert fault == {"code": "lost", "queue": "mail", "name": "a", "detail": "", "state": "reparable"}
    assert (report["queues"], report["jobs"], report["complete"]) == (1, 2, True)
    answer = call("check", "--repair")
    assert (answer.code, answer.out.count("mended")) == (0, 2)
    assert call("check").code == 0
    assert raw.lrange(bench.q.ready[5], 0, -1) == [b"a", b"b"]
    raw.hdel(bench.q.jobs, "a")
    assert call("check", "nail").err == "fastq: no queue 'nail' - did you mean 'mail'?\n"
    assert call("check", "--repair").code == 0


# -- doctor -------------------------------------------------------------------------------------------------


def test_doctor_says_what_to_change(make_server: Any, call: Call) -> None:
    """F-24: a fault is exit status 5, for scripts; warnings are not."""
    server = make_server(appendonly=True)
    answer = call("doctor", "--redis-url", server.url)
    assert answer.code == 0
    assert "WARN  memory" in answer.out
    server.ask(b"CONFIG", b"SET", b"maxmemory-policy", b"allkeys-lru")
    answer = call("doctor", "--redis-url", server.url)
    assert answer.code == 5
    assert re.search(r"^FAULT  eviction .*\n +-> maxmemory-policy noeviction$", answer.out, re.MULTILINE)
    assert "1 fault, 1 warning at" in answer.out
    answer = call("doctor", "--redis-url", server.url, "--json")
    assert answer.code == 5
    faults = [finding for finding in json.loads(answer.out)["findings"] if finding["level"] == "fault"]
    assert [finding["name"] for finding in faults] == ["eviction"]


def test_doctor_shows_each_setting_and_its_origin(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis need not be there; passwords and tokens are masked (A-08)."""
    (tmp_path / "fastq.toml").write_text('concurrency = 7\nmetrics_token = "t0ken"\n')
    monkeypatch.setenv("FASTQ_LEASE", "20s")
    answer = call("doctor", "--show-config", "--redis-url", CLOSED)
    assert answer.code == 0
    rows = {line.split()[0]: line.split()[1:] for line in answer.out.splitlines()}
    assert rows["concurrency"] == ["7", "fastq.toml"]
    assert rows["lease"] == ["20.0", "FASTQ_LEASE"]
    assert rows["url"] == ["'redis://app:***@127.0.0.1:1/0'", "argument"]
    assert rows["grace"][1] == "default"
    assert "t0ken" not in answer.out
    value = call("doctor", "--show-config", "--json").json
    assert value["concurrency"] == {"value": "7", "origin": "fastq.toml"}


# -- cron -----------------------------------------------------------------------------------------------------


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(APP)
    return tmp_path


def test_cron_ls_and_next(app: Path) -> None:
    answer = ran(app, "cron", "ls", "shop:app")
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert lines[0].split() == ["NAME", "TASK", "SCHEDULE", "MISFIRE", "NEXT", "IN"]
    assert lines[1].startswith("pulse")
    assert re.search(r"nightly +report +At 04:30 every day \(Europe/Berlin\) +once +\S+ 04:30:00 CES?T", lines[2])
    answer = ran(app, "cron", "next", "nightly", "-n", "3", FASTQ_APP="shop:app")
    assert [line.split()[1] for line in answer.out.splitlines()[1:]] == ["04:30:00"] * 3
    ticks = ran(app, "cron", "next", "--app", "shop.py", "--count", "5", "--json").json
    assert [tick["at"] for tick in ticks] == sorted(tick["at"] for tick in ticks)
    assert {tick["name"] for tick in ticks} >= {"pulse"}
    answer = ran(app, "cron", "next", "nigthly", "--app", "shop")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err == "fastq: no schedule 'nigthly' - did you mean 'nightly'?\n"


def test_an_application_that_cannot_be_imported_shows_its_own_frames_only(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import shelf\n")
    (tmp_path / "shelf.py").write_text("def load():\n    return {}['no such key']\n\nload()\n")
    answer = ran(tmp_path, "cron", "ls", "broken:app")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("fastq: the application broken:app cannot be imported\n")
    assert "shelf.py" in answer.err
    assert "KeyError: 'no such key'" in answer.err
    assert "importlib" not in answer.err
    assert "launch.py" not in answer.err


def test_an_attribute_that_is_not_there_is_suggested(app: Path) -> None:
    answer = ran(app, "cron", "ls", "shop:ap")
    assert answer.code == 2
    assert answer.err == "fastq: 'shop:ap': module 'shop' has no 'ap' - did you mean 'app'?\n"


# -- processes ----------------------------------------------------------------------------------------------------


def tail(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and what was said on stderr; the process has been told to end."""
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("verb", ["worker", "supervise"])
def test_jobs_are_run_until_ctrl_c(bench: Bench, redis_url: str, app: Path, start: Start, verb: str) -> None:
    """The first Ctrl-C drains: exit status 0, no traceback."""
    process = start(
        verb,
        "shop:app",
        "--queues",
        "mail",
        "--metrics-port",
        "0",
        "--log-format",
        "json",
        FASTQ_REDIS_URL=redis_url,
    )
    made = ran(app, "enqueue", "add", "--json", '{"a": 40}', "--queue", "mail", FASTQ_REDIS_URL=redis_url)
    job_id = made.out.strip()
    eventually(lambda: bench.state(job_id) == "success", 60)
    shown = ran(app, "jobs", "show", job_id, "--json", FASTQ_REDIS_URL=redis_url).json
    assert (shown["result"], shown["attempts"]) == (42, 1)
    process.send_signal(signal.SIGINT)
    code, err = tail(process)
    assert code == 0
    assert "Traceback" not in err
    assert all(json.loads(line) for line in err.splitlines())
    assert bench.run(bench.inspector.workers()) == []


def test_the_scheduler_alone(bench: Bench, redis_url: str, app: Path, start: Start) -> None:
    process = start("scheduler", "shop:app", FASTQ_REDIS_URL=redis_url)
    eventually(lambda: bench.run(bench.inspector.leader()), 60)
    process.send_signal(signal.SIGINT)
    code, err = tail(process)
    assert (code, "Traceback" in err) == (0, False)


def test_supervise_ends_when_the_application_cannot_be_imported(redis_url: str, tmp_path: Path) -> None:
    """F-11: no crash loop, exit status 2, and the user's own error on stderr."""
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    answer = ran(tmp_path, "supervise", "broken:app", "--metrics-port", "0", FASTQ_REDIS_URL=redis_url)
    assert answer.code == 2
    assert "No module named 'no_such_library'" in answer.err
    assert "launch.py" not in answer.err


def test_a_pid_file_is_held_once(bench: Bench, redis_url: str, app: Path, start: Start) -> None:
    options = ("supervise", "shop:app", "--workers", "1", "--metrics-port", "0", "--pidfile", "pid")
    process = start(*options, FASTQ_REDIS_URL=redis_url)
    eventually(lambda: (app / "pid").exists() and (app / "pid").read_text() == f"{process.pid}\n", 60)
    assert ran(app, *options, FASTQ_REDIS_URL=redis_url).code == 4
    process.send_signal(signal.SIGTERM)
    assert tail(process)[0] == 0


def test_a_fleet_is_configured_by_the_environment_alone(bench: Bench, redis_url: str, app: Path, start: Start) -> None:
    """F223: one command for worker and scheduler; a delayed job needs both."""
    process = start(
        "supervise", FASTQ_APP="shop:app", FASTQ_REDIS_URL=redis_url, FASTQ_WORKERS="1", FASTQ_METRICS_PORT="0"
    )
    job_id = ran(app, "enqueue", "add", "--json", "[1]", "--delay", "0.2", FASTQ_REDIS_URL=redis_url).out.strip()
    eventually(lambda: bench.state(job_id) == "success", 60)
    process.send_signal(signal.SIGTERM)
    assert tail(process)[0] == 0


def test_dev_is_everything_in_one_command(app: Path, start: Start) -> None:
    """`fastq dev shop.py`: a server whose data outlive it, a worker, a scheduler, and the line for other terminals."""

    def begin() -> tuple[subprocess.Popen[str], str]:
        process = start("dev", "shop.py", "--metrics-port", "0")
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"^Redis for development on (\S+), its data in", line):
                return process, found[1]
        pytest.fail("it did not say where its server is")

    process, url = begin()
    bench = Bench(url, "default")
    job_id = ran(app, "enqueue", "add", "--json", "[1]", FASTQ_REDIS_URL=url).out.strip()
    eventually(lambda: bench.state(job_id) == "success", 60)
    bench.connection.close()
    second = ran(app, "dev", "shop.py")
    assert second.code == 4
    assert f"held by the live process {process.pid}" in second.err
    process.send_signal(signal.SIGINT)
    assert tail(process)[0] == 0

    process, url = begin()
    bench = Bench(url, "default")
    assert bench.state(job_id) == "success", "its data are kept in .fastq/"
    eventually(lambda: bench.run(bench.inspector.workers()), 60)
    bench.connection.close()
    process.send_signal(signal.SIGINT)
    assert tail(process)[0] == 0
    assert (app / ".fastq" / ".gitignore").read_text() == "*\n"


def test_output_into_a_pipe_that_nobody_reads(bench: Bench, redis_url: str, start: Start) -> None:
    """`fastq jobs ls | head -1` is no error message."""
    bench.put(*(f"job-{i}" for i in range(200)))
    process = start("top", "--interval", "0.1", FASTQ_REDIS_URL=redis_url)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 1
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_ctrl_c_while_redis_hangs(make_server: Any, start: Start) -> None:
    """F-18: nothing answers, and Ctrl-C still ends it at once, quietly."""
    server = make_server()
    server.pause()
    process = start("status", FASTQ_REDIS_URL=server.url)
    eventually(lambda: _connected(server.socket_path, process.pid), 30)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    out, err = process.communicate()
    assert (out, err) == ("", "")
    server.resume()


def _connected(path: Path, pid: int) -> bool:
    """Whether the process holds a socket: it is past its imports and on its way to Redis."""
    if sys.platform != "linux":
        time.sleep(1)
        return True
    with contextlib.suppress(OSError):
        return any(os.readlink(fd).startswith("socket:") for fd in Path(f"/proc/{pid}/fd").iterdir())
    return False


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTQ_CONNECT_TIMEOUT", "100ms")
    monkeypatch.setenv("FASTQ_RESPONSE_TIMEOUT", "100ms")
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        answer = call("status", "--redis-url", f"unix://{path}")
    assert answer.code == 3
    assert "no reply within 0.1 s" in answer.err


# -- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""), (0, "0ms"), (0.9996, "1000ms"), (1, "1.0s"), (59.94, "59.9s"), (60, "1m00s"), (3_599, "59m59s"),
        (3_600, "1h00m"), (86_399, "23h59m"), (86_400, "1d00h"), (1e9, "11574d01h"), (-75, "-1m15s"),
    ],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert table.duration(seconds) == text


def test_a_moment_that_no_calendar_has() -> None:
    assert (table.moment(None), table.moment(1e30)) == ("", "?")


def test_columns() -> None:
    lines = list(table.rows(("NAME", "N"), [("a", 7), ("long\x1bname", None), ("x" * 99, 1_000)]))
    assert lines[0].rstrip() == f"{'NAME':<60}     N"
    assert lines[1] == f"{'a':<60}     7"
    assert lines[2] == f"{'long' + chr(92) + 'x1bname':<60}     -"
    assert lines[3].startswith("x" * 59 + "…")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": b"\x00"}, b'{"a":"AA=="}'),
        ({"a": {(1, 2): "x"}}, b'{"a":{"(1, 2)":"x"}}'),
        ({"a": msgspec.msgpack.Ext(1, b"x")}, None),
        ({"a": {None: 1, b"k": [{1.5: 2}]}}, None),
    ],
)
def test_json_takes_whatever_a_handler_has_returned(value: Any, text: bytes | None) -> None:
    found = session.as_json(value)
    assert json.loads(found)
    assert text is None or found == text
