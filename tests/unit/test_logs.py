"""Log lines: what they say, what cannot be slipped into them, and that nobody has to wait for their reader."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import io
import json
import logging
import math
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastq import logs
from fastq.errors import ConfigError
from fastq.logs import FieldLogger, FloodGuard, JsonFormatter, LineHandler, TextFormatter, fields, log_context

pytestmark = pytest.mark.versions

log = logging.getLogger("fastq.worker")
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (debug|info|warning|error|critical) [\w.]+ .+")


class Code(enum.IntEnum):
    BAD = 3


@dataclass
class Job:
    id: str = "1f2e"
    task: str = "send"
    queue: str = "mail"
    attempt: int = 2


def in_job(job: Job, *call: Any, **values: Any) -> Any:
    """Call something where `job` runs."""
    context = contextvars.copy_context()
    context.run(log_context.set, job)
    return context.run(*call, **values)


@pytest.fixture(autouse=True)
def undo() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    logs.reset()
    root.setLevel(level)


def setup(**options: Any) -> None:
    """As in a program that has configured nothing: without pytest's own handlers; text unless asked for otherwise."""
    logging.getLogger().handlers.clear()
    logs.setup(**{"format": "text", **options})


def record(
    event: str,
    /,
    *args: object,
    logger: str = "fastq.worker",
    severity: int = logging.INFO,
    exc: BaseException | None = None,
    **values: object,
) -> logging.LogRecord:
    exc_info = None if exc is None else (type(exc), exc, exc.__traceback__)
    made = logging.LogRecord(logger, severity, __file__, 1, event, args, exc_info)
    made.__dict__.update(fields(**values))
    return made


def text(event: str, /, *args: object, **values: object) -> str:
    """What stands after time, level and logger."""
    line = TextFormatter().format(record(event, *args, **values))  # type: ignore[arg-type]
    assert line.isprintable()
    return line.split(" ", 3)[3]


def as_json(event: str, /, *args: object, **values: object) -> dict[str, Any]:
    line = JsonFormatter().format(record(event, *args, **values))  # type: ignore[arg-type]
    assert "\n" not in line
    decoded: dict[str, Any] = json.loads(line)
    return decoded


def captured(**options: Any) -> io.StringIO:
    stream = io.StringIO()
    setup(stream=stream, **options)
    return stream


def raised(error: BaseException) -> BaseException:
    """With a traceback."""
    try:
        raise error
    except BaseException as caught:
        return caught


# -- text ----------------------------------------------------------------------------------------------


def test_a_line_is_time_level_logger_event_and_fields() -> None:
    stream = captured()
    log.info("worker ready", extra=fields(slots=100, queues=["mail", "bulk"], lease=15.0))
    line = stream.getvalue()
    assert LINE.fullmatch(line.rstrip("\n"))
    assert line.endswith("Z info fastq.worker worker ready slots=100 queues=mail,bulk lease=15\n")


def test_a_handler_s_logger_takes_fields_as_keywords(caplog: pytest.LogCaptureFixture) -> None:
    """F050: ``logger.info("…", issue_id=…)``, which a plain logger refuses."""
    log = FieldLogger("fastq.job")
    with caplog.at_level("INFO", "fastq.job"):
        log.info("issue %s synced", "A", issue_id=7, extra=fields(repo="x"))
        log.warning("plain")
        try:
            raise ValueError
        except ValueError:
            log.exception("failed", why="test")
    first, second, third = caplog.records
    assert (first.getMessage(), first.fields) == ("issue A synced", {"repo": "x", "issue_id": 7})  # type: ignore[attr-defined]
    assert not hasattr(second, "fields")
    assert third.exc_info is not None
    assert third.funcName == "test_a_handler_s_logger_takes_fields_as_keywords"


def test_times_are_utc_to_the_millisecond() -> None:
    first, second = record("a"), record("b")
    first.created, first.msecs = 1_700_000_000.007, 7.0
    second.created, second.msecs = 1_700_000_001.5, 500.0
    formatter = TextFormatter()
    assert formatter.format(first).startswith("2023-11-14T22:13:20.007Z ")
    assert formatter.format(second).startswith("2023-11-14T22:13:21.500Z ")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("a/b:c@d.e-f+g", "a/b:c@d.e-f+g"),
        ("two words", '"two words"'),
        ("", '""'),
        ("a=b", '"a=b"'),
        ('say "hi"', r'"say \"hi\""'),
        ("back\\slash", "back\\slash"),
        ("back \\ slash", r'"back \\ slash"'),
        ("new\nline", r'"new\nline"'),
        ("\x1b[31mred", r'"\x1b[31mred"'),
        ("\u2028\u202e", r'"\u2028\u202e"'),
        ("\ud800", r'"\ud800"'),
        ("naïve", "naïve"),
        (True, "true"),
        (7, "7"),
        (0.1234567, "0.123457"),
        (math.nan, "nan"),
        (b"x", "b'x'"),
        (["a", 1, "b c"], '"a,1,b c"'),
        ([], '""'),
        (list(range(60)), ",".join(map(str, range(50))) + ",…"),
        (Code.BAD, "3"),
    ],
)
def test_a_value_is_quoted_when_it_must_be(value: object, shown: str) -> None:
    assert text("e", value=value) == f"e value={shown}"


def test_none_is_left_out() -> None:
    assert text("e", a=None, b=1) == "e b=1"
    assert as_json("e", a=None, b=1).keys() == {"time", "level", "logger", "event", "b"}


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        ("job failed", "job failed"),
        ("done status=success", '"done status=success"'),
        ('say "hi"', r'"say \"hi\""'),
        ("a\nfake line", r'"a\nfake line"'),
    ],
)
def test_an_event_cannot_pretend_to_have_fields(event: str, shown: str) -> None:
    """F-A16: log injection through a message."""
    assert text("%s", event) == shown


@given(st.text(), st.text(), st.text())
@example("", "traceback", "a\x85b")
def test_whatever_is_logged_is_one_printable_line(event: str, key: str, value: str) -> None:
    """F-A16. Decoded, the traceback of the JSON format has line ends, and nothing else that cannot be printed."""
    made = record("%s", event)
    made.__dict__.update({"fields": {key: value}})
    assert TextFormatter().format(made).isprintable()
    line = JsonFormatter().format(made)
    assert "\n" not in line
    assert json.loads(line)["logger"] == "fastq.worker"
    for name, shown in json.loads(line).items():
        lines = shown.split("\n") if name == "traceback" else [shown]
        assert all(part.isprintable() for part in lines if isinstance(part, str))


QUOTED = re.compile(r' value=(?:"((?:[^"\\]|\\.)*)"|(\S+))')


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=400).filter(str.isprintable))
def test_a_printable_value_can_be_read_back(value: str) -> None:
    match = QUOTED.fullmatch(text("e", value=value).removeprefix("e"))
    assert match is not None
    assert (match[2] if match[1] is None else re.sub(r"\\(.)", r"\1", match[1])) == value


def test_long_things_are_cut() -> None:
    """I12: the length of a line is bounded, whatever a job brings along."""
    line = text("x" * 100_000, value="y" * 100_000, values=["z" * 100_000] * 100)
    assert len(line) < 4_000
    assert line.count("…") >= 3
    assert len(json.dumps(as_json("x" * 100_000, value="y" * 100_000))) < 3_000


def test_a_message_that_does_not_fit_its_arguments_is_still_a_line() -> None:
    assert text("%d jobs", "many") == "%d jobs ('many',)"


def test_a_value_that_cannot_be_shown_is_named_by_its_type() -> None:
    class Broken:
        def __str__(self) -> str:
            raise ValueError

    assert text("e", value=Broken(), values=[Broken()]) == "e value=<Broken> values=<Broken>"
    assert text("e", value=10**5000) == "e value=<int>"
    assert as_json("e", value=Broken(), number=10**5000, big=2**63) | {"time": 0} == {
        "time": 0, "level": "info", "logger": "fastq.worker", "event": "e", "value": "<Broken>", "number": "<int>", "big": str(2**63),
    }  # fmt: skip


def test_fields_of_another_library_do_no_harm() -> None:
    not_ours = record("e")
    not_ours.__dict__["fields"] = "theirs"
    assert TextFormatter().format(not_ours).endswith(" fastq.worker e")


# -- json ----------------------------------------------------------------------------------------------


def test_json_keeps_numbers_truth_and_lists() -> None:
    line = as_json("e", count=3, share=0.5, ok=True, ids=["a", "b"], none=math.nan, text="two\nlines")
    assert line | {"time": 0} == {
        "time": 0, "level": "info", "logger": "fastq.worker", "event": "e",
        "count": 3, "share": 0.5, "ok": True, "ids": ["a", "b"], "none": None, "text": "two\\nlines",
    }  # fmt: skip


def test_a_field_cannot_replace_what_the_line_says_itself() -> None:
    made = record("e", level="fake", event="fake", time="fake")
    made.__dict__["fields"]["logger"] = "fake"
    line = json.loads(JsonFormatter().format(made))
    assert (line["level"], line["event"], line["logger"]) == ("info", "e", "fastq.worker")
    assert line["level_"] == line["event_"] == line["time_"] == line["logger_"] == "fake"


def test_text_needs_no_msgspec() -> None:
    """Its import costs the supervisor memory and time that only JSON is worth."""
    code = (
        "import sys, logging, fastq.logs as logs; before = 'msgspec' in sys.modules; logs.setup(format='text');"
        "logging.getLogger('fastq').warning('x'); print(before, 'msgspec' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout in ("False False\n", "True True\n")  # the second where `import fastq` itself brings it
    assert "msgspec" not in {name.partition(".")[0] for name in vars(logs)}


# -- tracebacks ------------------------------------------------------------------------------------------


def test_a_traceback_is_one_escaped_field() -> None:
    stream = captured()
    try:
        raise ValueError("no\n\x1b[2Jgood")
    except ValueError:
        log.exception("job failed")
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert 'traceback="Traceback (most recent call last):\\n  File ' in line
    assert r"ValueError: no\n\x1b[2Jgood" in line


def test_a_traceback_in_json_keeps_its_lines() -> None:
    made = record("e", exc=raised(ValueError("no\x1b")))
    line = json.loads(JsonFormatter().format(made))
    lines = line["traceback"].splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: no\\x1b"


def test_a_traceback_among_the_fields_is_treated_as_one() -> None:
    """The worker has formatted it already, for the dead letter."""
    assert text("e", traceback="a\nb", error="E") == r'e error=E traceback="a\nb"'
    assert as_json("e", traceback="a\nb")["traceback"] == "a\nb"
    assert text("e", traceback="") == "e"


def deep(n: int) -> None:
    if n:
        deep(n - 1)
    raise ValueError("the end")


def test_a_long_traceback_keeps_its_end() -> None:
    with pytest.raises(ValueError, match="the end") as caught:
        deep(500)
    line = TextFormatter().format(record("e", exc=caught.value))
    assert len(line) < 6_000
    assert line.endswith(r'ValueError: the end"')
    shown = TextFormatter().format(record("e", traceback="begin " + "x" * 20_000 + " end"))
    assert len(shown) < 5_000
    assert "begin" in shown
    assert "end" in shown


def test_a_stack_is_shown_too() -> None:
    stream = captured()
    log.info("loop blocked", stack_info=True)
    assert "Stack (most recent call last)" in stream.getvalue()


# -- the job that runs -------------------------------------------------------------------------------------


def test_the_running_job_is_named_on_every_line() -> None:
    stream = captured()
    in_job(Job(), log.info, "sent")
    log.info("idle")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("sent job=1f2e task=send queue=mail attempt=2")
    assert second.endswith("idle")


def test_what_the_call_says_wins_over_the_context() -> None:
    stream = captured()
    in_job(Job(), log.info, "e", extra=fields(attempt=3, job="x"))
    assert stream.getvalue().endswith("e job=x task=send queue=mail attempt=3\n")


async def test_each_task_has_its_own_job() -> None:
    stream = captured()

    async def handler(job: Job) -> None:
        log_context.set(job)
        await asyncio.sleep(0)
        logging.getLogger("users.own").info("here")

    await asyncio.gather(*(handler(Job(id=str(n))) for n in range(3)))
    assert re.findall(r"here job=(\d)", stream.getvalue()) == ["0", "1", "2"]


# -- set-up ------------------------------------------------------------------------------------------------


def test_the_root_logger_is_ours_when_nobody_configured_it() -> None:
    stream = captured(level="warning")
    logging.getLogger("users.own").warning("theirs")
    logging.getLogger("users.own").info("not shown")
    assert "users.own theirs" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_a_configured_root_logger_is_left_alone() -> None:
    theirs = io.StringIO()
    root = logging.getLogger()
    handler = logging.StreamHandler(theirs)
    root.handlers[:] = [handler]
    logs.setup(stream=(stream := io.StringIO()))
    assert root.handlers == [handler]
    log.warning("ours")
    logging.getLogger("users.own").warning("theirs")
    assert (stream.getvalue().count("\n"), theirs.getvalue()) == (1, "theirs\n")


def test_the_last_setup_counts() -> None:
    first = captured()
    second = captured(format="json")
    log.info("once")
    assert first.getvalue() == ""
    assert json.loads(second.getvalue())["event"] == "once"


def test_reset_leaves_no_trace() -> None:
    root, ours = logging.getLogger(), logging.getLogger("fastq")
    before = root.level, ours.level, ours.propagate
    captured(level="debug")
    logs.reset()
    assert (root.level, ours.level, ours.propagate) == before
    assert root.handlers == ours.handlers == []


@pytest.mark.parametrize("level", ["DEBUG", "debug", logging.DEBUG])
def test_levels_by_name_or_number(level: str | int) -> None:
    stream = captured(level=level)
    log.debug("shown")
    assert "debug fastq.worker shown" in stream.getvalue()


def test_unknown_levels_and_formats_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown log level 'wraning' - did you mean 'warning'"):
        setup(level="wraning")
    with pytest.raises(ConfigError, match="unknown log format 'jsn' - did you mean 'json'"):
        setup(format="jsn")
    assert logging.getLogger().handlers == [], "and nothing was changed"


def test_a_formatter_that_fails_does_not_reach_the_caller(capsys: pytest.CaptureFixture[str]) -> None:
    captured()

    class Hostile(UserDict[str, object]):
        def __iter__(self) -> Iterator[str]:
            raise ZeroDivisionError

    log.info("e", extra={"fields": Hostile(a=1)})
    assert "ZeroDivisionError" in capsys.readouterr().err


# -- terminals ---------------------------------------------------------------------------------------------


@pytest.fixture
def terminal() -> Iterator[tuple[IO[str], Callable[[], str]]]:
    ours, theirs = pty.openpty()
    stream = os.fdopen(theirs, "w")

    def shown() -> str:
        assert select.select([ours], [], [], 10)[0]
        return os.read(ours, 65_536).decode().replace("\r\n", "\n")

    yield stream, shown
    logs.reset()
    stream.close()
    os.close(ours)


def test_auto_is_coloured_on_a_terminal(
    terminal: tuple[IO[str], Callable[[], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream, shown = terminal
    setup(stream=stream, format="auto")
    log.warning("careful \x1b[2J", extra=fields(a=1))
    line = shown()
    assert "\x1b[33mwarning\x1b[0m" in line
    assert line.endswith('\x1b[1m"careful \\x1b[2J"\x1b[0m a=1\n')


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colour_when_not_wanted(
    terminal: tuple[IO[str], Callable[[], str]], monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    stream, shown = terminal
    setup(stream=stream, format="auto")
    log.warning("plain")
    assert "\x1b" not in shown()


def test_auto_is_json_where_nobody_reads_along() -> None:
    stream = captured(format="auto")
    log.warning("stored", extra=fields(a=1))
    assert json.loads(stream.getvalue()) | {"time": ""} == {
        "time": "",
        "level": "warning",
        "logger": log.name,
        "event": "stored",
        "a": 1,
    }


def test_a_traceback_stands_below_on_a_terminal(terminal: tuple[IO[str], Callable[[], str]]) -> None:
    stream, shown = terminal
    setup(stream=stream, format="text")
    log.error("job failed", exc_info=raised(ValueError("no\x1b[2J")), extra=fields(a=1))
    lines = shown().splitlines()
    assert lines[0].endswith("job failed a=1")
    assert lines[1] == "    Traceback (most recent call last):"
    assert lines[-1] == "    ValueError: no\\x1b[2J"


# -- floods ------------------------------------------------------------------------------------------------


class Seconds:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_flood_is_cut_and_counted() -> None:
    """F-49: 10,000 failing jobs a second do not make 10,000 lines."""
    clock = Seconds()
    guard = FloodGuard(limit=5, clock=clock)
    passed = [guard.filter(record("job failed", severity=logging.ERROR, task="send", error="E")) for _ in range(10_000)]
    assert passed == [True] * 5 + [False] * 9_995
    clock.now += 1
    following = record("job failed", severity=logging.ERROR, task="send", error="E")
    assert guard.filter(following)
    assert text_of(following).endswith("job failed task=send error=E suppressed=9995")
    another = record("job failed", severity=logging.ERROR, task="send", error="E")
    assert guard.filter(another)
    assert "suppressed" not in text_of(another), "told once"


def text_of(made: logging.LogRecord) -> str:
    return TextFormatter().format(made)


@pytest.mark.parametrize(
    "other",
    [
        record("job retries", severity=logging.ERROR, task="send", error="E"),
        record("job failed", severity=logging.ERROR, task="resize", error="E"),
        record("job failed", severity=logging.ERROR, task="send", error="F"),
        record("job failed", severity=logging.ERROR, exc=raised(KeyError()), task="send", error="E"),
        record("job failed", severity=logging.INFO, task="send", error="E"),
        record("job failed", severity=logging.ERROR, logger="users.own", task="send", error="E"),
        record("job failed", severity=logging.ERROR, logger="fastq.job", task="send", error="E"),
    ],
)
def test_a_flood_hides_nothing_else(other: logging.LogRecord) -> None:
    """Another event, task, error; what is only information; what users log themselves."""
    guard = FloodGuard(limit=1, clock=Seconds())
    flood = record("job failed", severity=logging.ERROR, task="send", error="E")
    assert [guard.filter(flood) for _ in range(3)] == [True, False, False]
    assert guard.filter(other)


def test_the_task_of_the_context_counts_too() -> None:
    guard = FloodGuard(limit=1, clock=Seconds())
    assert in_job(Job(), guard.filter, record("e", severity=logging.ERROR))
    assert not in_job(Job(), guard.filter, record("e", severity=logging.ERROR))
    assert guard.filter(record("e", severity=logging.ERROR))


def test_events_without_end_do_not_fill_the_memory() -> None:
    """I12: an event name with a job id in it makes every record a kind of its own."""
    clock = Seconds()
    guard = FloodGuard(limit=1, clock=clock)
    passed = 0
    for second in range(20):
        clock.now = float(second)
        passed += sum(guard.filter(record(f"e{second}-{i % 1_000}", severity=logging.ERROR)) for i in range(2_000))
    assert passed <= 20 * 501
    assert len(guard._seen) + len(guard._suppressed) <= 2_100
    clock.now += 1
    shared = [made for made in (record(f"f{i}", severity=logging.ERROR) for i in range(600)) if guard.filter(made)]
    assert getattr(shared[-1], "suppressed", 0) > 1_000, "told together"


def test_setup_guards_against_floods() -> None:
    stream = captured(flood=3)
    for _ in range(50):
        log.error("job failed", extra=fields(task="send"))
    assert 3 <= stream.getvalue().count("\n") <= 6  # a second may have turned


# -- a reader that does not read -----------------------------------------------------------------------------


class Pipe:
    """A pipe whose reader reads when it is told to."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        self.stream = os.fdopen(writer, "w", encoding="utf-8")

    def fill(self) -> None:
        os.set_blocking(self.stream.fileno(), False)
        try:
            while True:
                os.write(self.stream.fileno(), b"." * 4096)
        except BlockingIOError:
            os.set_blocking(self.stream.fileno(), True)

    def read(self, until: str) -> str:
        text = ""
        while until not in text:
            assert select.select([self.reader], [], [], 10)[0], f"{until!r} did not come: {text[-200:]!r}"
            text += os.read(self.reader, 1 << 20).decode()
        return text.lstrip(".")

    def close(self) -> None:
        os.close(self.reader)
        self.stream.close()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    logs.reset()
    made.close()


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastq-log"]


def test_in_the_background_nobody_waits_for_a_blocked_reader(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """F-49: stderr is a pipe that nobody reads; the loop goes on, the newest lines are kept, the loss is told."""
    monkeypatch.setattr(logs, "_FLUSH", 0.01)
    pipe.fill()
    handler = LineHandler(pipe.stream, background=True, capacity=100)
    handler.setFormatter(TextFormatter())
    started = time.monotonic()
    for n in range(5_000):
        handler.handle(record("line", n=n))
    handler.flush()
    assert time.monotonic() - started < 5
    assert 4_890 <= handler.dropped <= 4_900  # the writer holds one, and may have been slow to take it
    text = pipe.read(until=" n=4999\n")
    handler.handle(record("after"))
    text += pipe.read(until=" after\n")
    assert sum(map(int, re.findall(r"log lines dropped lines=(\d+)\n", text))) == handler.dropped
    assert re.findall(r" n=(\d+)\n", text)[-99:] == [str(n) for n in range(4_901, 5_000)]
    handler.close()


def test_a_flood_that_a_slow_reader_loses_is_told_now_and_then(pipe: Pipe) -> None:
    """A line about the loss before each line would be half of what it gets."""
    handler = LineHandler(pipe.stream, background=True)
    handler.setFormatter(TextFormatter())
    handler._lines.put("the next one waits already\n")
    for n in range(50):
        handler._pushed_out += 1
        handler._write(f"line {n}\n")
    assert pipe.read(until="line 49\n").count("log lines dropped") == 1
    handler._lines.get()
    handler._write("the last one\n")
    assert pipe.read(until="last one\n").endswith("log lines dropped lines=49\nthe last one\n")
    handler.close()


def test_without_a_thread_a_blocked_reader_costs_its_patience_once(pipe: Pipe) -> None:
    """The supervisor may have no thread, and must not stand still because a log reader does."""
    setup(stream=pipe.stream, flood=10_000)
    log.info("before")
    assert "before" in pipe.read(until="\n")
    pipe.fill()
    started = time.monotonic()
    for _ in range(1_000):
        log.error("lost")
    assert logs.PATIENCE <= time.monotonic() - started < logs.PATIENCE + 2
    assert logs.dropped() == 1_000
    assert writers() == []
    os.read(pipe.reader, 1 << 20)
    log.info("again")
    text = pipe.read(until="again\n")
    assert "warning fastq.logs log lines dropped lines=1000\n" in text
    assert "lost" not in text


def test_a_line_that_was_torn_does_not_swallow_the_next(pipe: Pipe) -> None:
    handler = LineHandler(pipe.stream)
    handler.setFormatter(TextFormatter())
    pipe.fill()
    os.read(pipe.reader, 4096)  # room for one piece
    wide = "x" * 990
    handler.handle(record("torn", f0=wide, f1=wide, f2=wide, f3=wide, f4=wide, f5=wide))
    assert handler.dropped == 1
    os.read(pipe.reader, 1 << 20)
    handler.handle(record("whole"))
    assert LINE.fullmatch(pipe.read(until="whole\n").splitlines()[-1])


@pytest.mark.parametrize("background", [False, True])
def test_a_reader_that_went_away_is_a_loss_and_no_error(background: bool) -> None:
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    setup(stream=stream, background=background)
    os.close(reader)
    log.info("to nobody")
    logs.flush()
    assert logs.dropped() == 1
    logs.reset()
    stream.close()


def test_background_lines_come_in_order_and_flush_waits_for_them(pipe: Pipe) -> None:
    setup(stream=pipe.stream, background=True)
    for n in range(100):
        log.info("line", extra=fields(n=n))
    logs.flush()
    assert re.findall(r" n=(\d+)\n", os.read(pipe.reader, 1 << 20).decode()) == [str(n) for n in range(100)]


def test_the_thread_starts_with_the_first_line_and_ends_with_the_handler(
    pipe: Pipe, eventually: Callable[..., object]
) -> None:
    setup(stream=pipe.stream, background=True)
    assert writers() == [], "a fork before the first line sees one thread"
    log.info("first")
    assert len(writers()) == 1
    logs.reset()
    eventually(lambda: writers() == [])


def test_a_closed_handler_that_is_used_again_starts_again(pipe: Pipe) -> None:
    """logging.config closes every handler it knows, in use or not."""
    handler = LineHandler(pipe.stream, background=True)
    handler.setFormatter(TextFormatter())
    handler.handle(record("one"))
    handler.close()
    handler.handle(record("two"))
    handler.flush()
    assert pipe.read(until="two\n").count("\n") == 2
    handler.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_writes_through_a_thread_of_its_own(pipe: Pipe) -> None:
    """Isolated handlers run in children of a worker; the worker's writer does not exist there."""
    setup(stream=pipe.stream, background=True)
    log.info("parent")
    logs.flush()
    pid = os.fork()
    if pid == 0:
        try:
            log.info("child")
            logs.flush()
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert [line.split()[-1] for line in pipe.read(until="child\n").splitlines()] == ["parent", "child"]


def test_lines_survive_the_end_of_the_program() -> None:
    code = (
        "import logging, fastq.logs as logs; logs.setup(format='text', background=True)\n"
        "for n in range(500): logging.getLogger('fastq').info('line')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count(" fastq line\n") == 500


def test_what_is_logged_while_the_interpreter_ends_is_written_and_holds_nothing_up() -> None:
    """asyncio complains there of what was never awaited; no thread begins any more by then, and starting one waits for ever."""
    code = """
import gc, logging, sys
from fastq import logs

class Last:
    def __init__(self):
        self.itself = self  # garbage, which the last collection finds

    def __del__(self):
        logging.getLogger("fastq").error("the last words", extra={"fields": {"finalizing": sys.is_finalizing()}})

logs.setup("info", "text", background=True)
gc.disable()
Last()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert "the last words finalizing=true" in ended.stdout + ended.stderr


def test_threads_do_not_mix_their_lines(pipe: Pipe) -> None:
    setup(stream=pipe.stream)

    def talk() -> None:
        for _ in range(50):
            log.info("x" * 100)

    threads = [threading.Thread(target=talk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = os.read(pipe.reader, 1 << 20).decode().splitlines()
    assert len(lines) == 200
    assert all(LINE.fullmatch(line) for line in lines)


def test_an_ascii_stream_shows_what_it_can() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="ascii") as stream:
        setup(stream=stream)
        log.info("naïve")
        logs.reset()
    assert os.read(reader, 4096).endswith(b"na\\xefve\n")
    os.close(reader)
