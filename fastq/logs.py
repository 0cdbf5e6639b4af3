"""Logging: one line per event, key=value or JSON, that cannot be forged, flood or hold up the loop.

    log = logging.getLogger("fastq.worker")
    log.warning("job failed", extra=fields(error="ValueError: no", delay=1.5))

    2026-11-22T00:46:01.123Z warning fastq.worker job failed job=1f… task=send queue=mail attempt=2 error="ValueError: no" delay=1.5

* Everything a job brings along goes through ``errors.safe_text``: control characters are escaped, lengths are bounded (F-A16).
* The job id, task, queue and attempt of a record emitted while a job runs come from ``log_context``, which the worker sets to
  the job itself: nothing is built unless something is logged.
* Floods (F-49): of fastq's own warnings and of its records with an exception, at most ``FLOOD`` a second per event, task and
  error type are written; the next one says ``suppressed=n``. What users log is never suppressed.
* A reader that stops reading (a blocked pipe) never stops a process. In ``background`` mode, for processes with an event loop,
  lines go into a bounded queue that one daemon thread writes; it is started by the first line in this process, so a
  fork() before that sees no thread, and a forked child starts its own. When the queue is full the oldest line goes. Otherwise
  the process writes itself, but waits ``PATIENCE`` at most for a pipe to take a line, and not at all while it is known to be
  blocked. (If two processes write to a pipe that has room for one line, the second may still wait: that is why
  loops use the thread.) Either way ``dropped()`` counts what was lost, and a line says so as soon as one can be written.

A process that ends with ``os._exit`` calls ``flush()`` before.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import os
import queue
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextvars import ContextVar
from typing import IO, Any, Literal, Protocol, cast

from fastq.errors import ConfigError, did_you_mean, safe_text

__all__ = ["FLOOD", "LogFormat", "RunningJob", "dropped", "fields", "flush", "log_context", "reset", "setup"]

LogFormat = Literal["auto", "text", "json"]
FORMATS: tuple[LogFormat, ...] = ("auto", "text", "json")
LEVELS = ("debug", "info", "warning", "error", "critical")

FLOOD = 20
"""Lines per second of one event, task and error type."""

PATIENCE = 0.2
"""Seconds that a process without a writer thread waits for a pipe to take a line."""

_QUEUE_LINES = 10_000  # of the writer thread; at 200 bytes a line, 2 MB
_ITEMS = 50  # of a list in a field
_TRACEBACK = 4_000  # characters: its first lines and, more of it, its last
_FLUSH = 1.0  # seconds that flush() waits for the writer thread


class RunningJob(Protocol):
    """What a log line says about the job that runs."""

    @property
    def id(self) -> str:
        """The job id."""
        ...

    @property
    def task(self) -> str:
        """The name of its task."""
        ...

    @property
    def queue(self) -> str:
        """The name of its queue."""
        ...

    @property
    def attempt(self) -> int:
        """1 for the first run."""
        ...


log_context: ContextVar[RunningJob | None] = ContextVar("fastq_log_context", default=None)
"""The job that runs in this context; the worker sets it, every record emitted there names it."""


def fields(**values: object) -> dict[str, dict[str, object]]:
    """The ``extra`` of a logging call: ``log.info("worker ready", extra=fields(slots=100))``. None is left out."""
    return {"fields": values}


# -- records to lines -------------------------------------------------------------------------------------


class FieldLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger that takes fields as keywords: ``log.info("issue synced", issue_id=7)``; a plain one refuses them."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name), None)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Keep logging's own keywords, and make fields of the others."""
        own = {name: kwargs.pop(name) for name in ("exc_info", "stack_info", "stacklevel", "extra") if name in kwargs}
        if kwargs:
            extra = own.get("extra") or {}
            own["extra"] = {**extra, "fields": {**extra.get("fields", {}), **kwargs}}
        return msg, own


def _given(record: logging.LogRecord) -> Mapping[str, object]:
    """The fields of the call."""
    given: object = getattr(record, "fields", None)  # another library may use the name for something else
    return cast("Mapping[str, object]", given) if isinstance(given, Mapping) else {}


def _record_fields(record: logging.LogRecord) -> dict[str, object]:
    """The job that runs, then what the call gave, then what the guard found."""
    job = log_context.get()
    found: dict[str, object] = {}
    if job is not None:
        found = {"job": job.id, "task": job.task, "queue": job.queue, "attempt": job.attempt}
    found.update(_given(record))
    suppressed = getattr(record, "suppressed", 0)
    if suppressed:
        found["suppressed"] = suppressed
    return found


def _event(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001  # arguments that do not fit the message must not cost the line
        return f"{record.msg} {record.args!r}"


def _traceback(record: logging.LogRecord, pairs: dict[str, object]) -> str:
    """The record's traceback, or the one among its fields, its middle cut out when it is long; empty without one."""
    text = str(pairs.pop("traceback", None) or record.exc_text or "")
    if record.exc_info and record.exc_info[1] is not None:
        text = "".join(traceback.format_exception(record.exc_info[1], limit=-30))
    if record.stack_info:
        text = f"{text}\n{record.stack_info}"
    text = text.strip("\n")
    if len(text) <= _TRACEBACK:
        return text
    return f"{text[: _TRACEBACK // 4]}\n…\n{text[-_TRACEBACK * 3 // 4 :]}"


def _text(value: object) -> str:
    try:
        return safe_text(str(value))
    except Exception:  # noqa: BLE001  # a __str__ of somebody else's
        return f"<{type(value).__name__}>"


class _Clock:
    """Times of records in ISO 8601, UTC, to the millisecond; the second is formatted once."""

    def __init__(self) -> None:
        self._second = -1
        self._prefix = ""

    def __call__(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second:
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second
        return f"{self._prefix}.{int(record.msecs):03d}Z"


class TextFormatter(logging.Formatter):
    """``time level logger event key=value …`` on one line.

    A value stands in double quotes when it has a space, a quote, an equals sign or something that had to be escaped;
    inside the quotes a backslash and a double quote have a backslash before them. ``terminal`` puts a traceback
    below the line, indented, and colours it if ``colour``.
    """

    def __init__(self, *, terminal: bool = False, colour: bool = False) -> None:
        super().__init__()
        self._clock = _Clock()
        self._terminal = terminal
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        level = record.levelname.lower()
        event = _event(record)
        event = _quoted(event) if '"' in event or "=" in event or not event.isprintable() else safe_text(event)
        when, logger = self._clock(record), safe_text(record.name)
        if self._colour:
            when, level = f"\033[2m{when}\033[0m", f"{_COLOURS.get(level, '')}{level}\033[0m"
            event = f"\033[1m{event}\033[0m"
        pairs = _record_fields(record)
        trace = _traceback(record, pairs)
        words = [when, level, logger, event, *(f"{_key(k)}={_value(v)}" for k, v in pairs.items() if v is not None)]
        if trace and self._terminal:
            return " ".join(words) + "".join(f"\n    {safe_text(below)}" for below in trace.splitlines())
        if trace:
            words.append(f"traceback={_quoted(trace, 2 * _TRACEBACK)}")
        return " ".join(words)


_COLOURS = {
    "debug": "\033[2m",
    "info": "\033[32m",
    "warning": "\033[33m",
    "error": "\033[31m",
    "critical": "\033[1;31m",
}


def _key(key: object) -> str:
    text = str(key)
    if text.isidentifier() and text.isascii():
        return text
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "_" for c in text[:100]) or "_"


def _value(value: object) -> str:
    """A field's value in text."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, bool):
        return "true" if value else "false"
    elif isinstance(value, int):
        return _text(int(value))
    elif isinstance(value, float):
        return f"{value:.6g}"
    else:
        text = ",".join(_items(cast("Iterable[object]", value))) if isinstance(value, _LISTS) else _text(value)
    if not text or " " in text or '"' in text or "=" in text or not text.isprintable():
        return _quoted(text)
    return safe_text(text)


_LISTS = (list, tuple, set, frozenset)


def _items(values: Iterable[object]) -> list[str]:
    """The first items of a list, and a mark when there are more."""
    texts = [_text(value) for value in itertools.islice(values, _ITEMS + 1)]
    return [*texts[:_ITEMS], "…"] if len(texts) > _ITEMS else texts


def _quoted(text: str, limit: int = 1_000) -> str:
    """In double quotes, escaped and bounded."""
    text = text[: limit + 1].replace("\\", "\\\\").replace('"', '\\"')
    return f'"{safe_text(text, limit)}"'


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, event, the fields, and ``traceback`` with its line ends."""

    def __init__(self) -> None:
        super().__init__()
        import msgspec

        self._clock = _Clock()
        self._encode = msgspec.json.Encoder().encode

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, object] = {
            "time": self._clock(record),
            "level": record.levelname.lower(),
            "logger": safe_text(record.name),
            "event": _text(_event(record)),
        }
        pairs = _record_fields(record)
        trace = _traceback(record, pairs)
        for key, value in pairs.items():
            if value is not None:
                name = _key(key)
                line[f"{name}_" if name in line else name] = _plain(value)
        if trace:
            line["traceback"] = "\n".join(safe_text(below) for below in trace.splitlines())
        return self._encode(line).decode()


def _plain(value: object) -> object:
    """What JSON has for it: numbers and truth as they are (NaN is null), a list of texts, or a text."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else _text(int(value))
    if isinstance(value, float):
        return float(value)
    return _items(cast("Iterable[object]", value)) if isinstance(value, _LISTS) else _text(value)


# -- floods -----------------------------------------------------------------------------------------------


_Kind = tuple[str, str, str]  # event, task, error type
_KINDS = 500  # told apart within a second
_THE_REST: _Kind = ("", "", "")


class FloodGuard(logging.Filter):
    """Lets through at most ``limit`` records a second of one event, task and error type.

    It looks at warnings and worse, and at records with an exception, of fastq's own loggers; what a handler logs through
    ``JobContext.log`` (``fastq.job``) is its author's. Of more than ``_KINDS`` different ones within a second the rest share one
    allowance. Counts are exact in a process that logs from one thread, near it otherwise.
    """

    def __init__(self, limit: int = FLOOD, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._limit = limit
        self._clock = clock
        self._second = -1
        self._seen: dict[_Kind, int] = {}
        self._suppressed: dict[_Kind, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it may be written; sets ``record.suppressed`` on the first after a flood."""
        if not (record.levelno >= logging.WARNING or record.exc_info) or not _is_ours(record.name):
            return True
        second = int(self._clock())
        if second != self._second:
            self._turn(second)
        kind = _kind(record)
        if kind not in self._seen and len(self._seen) >= _KINDS:
            kind = _THE_REST
        seen = self._seen[kind] = self._seen.get(kind, 0) + 1
        if seen > self._limit:
            self._suppressed[kind] = self._suppressed.get(kind, 0) + 1
            return False
        suppressed = self._suppressed.pop(kind, 0)
        if suppressed:
            record.suppressed = suppressed
        return True

    def _turn(self, second: int) -> None:
        self._second = second
        self._seen.clear()
        while len(self._suppressed) > _KINDS:  # the oldest floods are told together
            forgotten = self._suppressed.pop(next(iter(self._suppressed)))
            self._suppressed[_THE_REST] = self._suppressed.pop(_THE_REST, 0) + forgotten


def _kind(record: logging.LogRecord) -> _Kind:
    given = _given(record)
    job = log_context.get()
    task = given.get("task") or (job.task if job is not None else "")
    error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else given.get("error", "")
    return str(record.msg)[:200], str(task)[:200], str(error)[:200]


def _is_ours(logger: str) -> bool:
    return logger == "fastq" or (logger.startswith("fastq.") and logger != "fastq.job")


# -- lines to the stream ----------------------------------------------------------------------------------


_Line = str | threading.Event | None  # a line to write, one who waits for those before it, the end


class LineHandler(logging.Handler):
    """Writes lines to a stream without ever waiting long for its reader; see the module's docstring."""

    def __init__(self, stream: IO[str], *, background: bool = False, capacity: int = _QUEUE_LINES) -> None:
        super().__init__()
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._fd = _descriptor(stream)
        self._background = background
        self._capacity = capacity
        self._pushed_out = 0  # lines, counted by whoever logs
        self._unwritten = 0  # lines, counted by whoever writes
        self._told, self._told_at = 0, -math.inf
        self._blocked = False
        self._torn = False
        self.forget_writer()

    @property
    def dropped(self) -> int:
        """Lines that were lost."""
        return self._pushed_out + self._unwritten

    def forget_writer(self) -> None:
        """No thread and nothing queued: the state of a new handler, and of a forked child's copy of one."""
        self._lines: queue.SimpleQueue[_Line] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Format the record here, where its job and its exception are at hand; write it here or hand it on."""
        try:
            line = self.format(record) + "\n"
        except Exception:  # noqa: BLE001  # as logging's own handlers do
            self.handleError(record)
            return
        if self._background and not sys.is_finalizing():  # then no thread begins any more, and none goes on
            self._hand_on(line)
        else:
            self._write(line)

    def flush(self) -> None:
        """Wait until what was logged so far is written, at most ``_FLUSH`` seconds."""
        if self._writer is not None:
            done = threading.Event()
            self._lines.put(done)
            done.wait(_FLUSH)

    def close(self) -> None:
        """End the writer thread after what is queued; a later line would start another."""
        self.acquire()
        try:
            writer = self._writer
            self._lines.put(None)
            self.forget_writer()
        finally:
            self.release()
        if writer is not None:
            writer.join(0.1)  # at once, unless the reader is blocked
        super().close()

    # -- in the background

    def _hand_on(self, line: str) -> None:
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, args=(self._lines,), name="fastq-log", daemon=True)
            self._writer.start()
        if self._lines.qsize() >= self._capacity:
            self._push_out_oldest()
        self._lines.put(line)

    def _push_out_oldest(self) -> None:
        with contextlib.suppress(queue.Empty):
            oldest = self._lines.get_nowait()
            if isinstance(oldest, threading.Event):
                oldest.set()
            else:
                self._pushed_out += 1

    def _write_all(self, lines: queue.SimpleQueue[_Line]) -> None:
        while (line := lines.get()) is not None:
            if isinstance(line, threading.Event):
                self._tell_loss()
                line.set()
            else:
                self._write(line)

    # -- both ways

    def _write(self, line: str) -> None:
        # Of a flood every second, and at its end: a line before each one would be half of what a slow reader gets.
        if self._lines.empty() or time.monotonic() - self._told_at >= 1.0:
            self._tell_loss()
        if not self._try_to_write(line):
            self._unwritten += 1

    def _tell_loss(self) -> None:
        lost = self.dropped - self._told
        if lost:
            record = logging.LogRecord("fastq.logs", logging.WARNING, "", 0, "log lines dropped", None, None)
            record.__dict__.update(fields(lines=lost))
            if self._try_to_write(self.format(record) + "\n"):
                self._told, self._told_at = self._told + lost, time.monotonic()

    def _try_to_write(self, line: str) -> bool:
        try:
            if self._fd is None:
                self._stream.write(line)
                self._stream.flush()
                return True
            data = line.encode(self._encoding, "backslashreplace")
            if self._background:
                _write_fully(self._fd, data)
                return True
            return self._write_patiently(self._fd, data)
        except (OSError, ValueError):  # the reader has gone, or the stream was closed
            return False

    def _write_patiently(self, fd: int, data: bytes) -> bool:
        """In pieces that a pipe takes whole once it has room; gives up what the reader leaves no room for."""
        if self._torn:
            data = b"\n" + data
        deadline = time.monotonic() + (0.0 if self._blocked else PATIENCE)
        written = 0
        while written < len(data):
            self._blocked = not _writable(fd, max(deadline - time.monotonic(), 0.0))
            if self._blocked:
                self._torn = self._torn or written > 0
                return False
            written += os.write(fd, data[written : written + select.PIPE_BUF])
        self._torn = False
        return True


def _writable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(seconds * 1_000))


def _write_fully(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _descriptor(stream: IO[str]) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError, io.UnsupportedOperation):
        return None


# -- set-up -----------------------------------------------------------------------------------------------

_installed: list[tuple[logging.Logger, int, LineHandler]] = []  # the logger, its level before, our handler


def setup(
    level: str | int = "info",
    format: LogFormat = "auto",  # noqa: A002  # the setting is called log_format
    *,
    background: bool = False,
    stream: IO[str] | None = None,
    flood: int = FLOOD,
) -> None:
    """Write logs of ``level`` and above to ``stream`` (stderr); may be called again, the last call counts.

    ``format``: ``text``, ``json``, or ``auto``: coloured text on a terminal (unless NO_COLOR is set), JSON otherwise. The root
    logger gets the handler, so the application's own logs come out in the same form. If it has handlers already, the application
    has decided about its logs: then only the logger ``fastq`` is configured. ``background`` writes through a thread: for
    processes with an event loop, never for one that forks. ConfigError for an unknown level or format.
    """
    number = _level(level)
    target_stream = sys.stderr if stream is None else stream
    formatter = _formatter(format, target_stream)
    reset()
    handler = LineHandler(target_stream, background=background)
    handler.setFormatter(formatter)
    handler.addFilter(FloodGuard(flood))
    root, ours = logging.getLogger(), logging.getLogger("fastq")
    logger = ours if root.handlers else root
    _installed.append((logger, logger.level, handler))
    logger.addHandler(handler)
    logger.setLevel(number)
    ours.propagate = logger is root


def reset() -> None:
    """Undo ``setup``: what was logged is written, then its handler goes."""
    while _installed:
        logger, level, handler = _installed.pop()
        logger.removeHandler(handler)
        logger.setLevel(level)
        logging.getLogger("fastq").propagate = True
        handler.flush()
        handler.close()


def flush() -> None:
    """Wait until the lines logged so far are written; a second at most. For a process that ends with ``os._exit``."""
    for *_, handler in _installed:
        handler.flush()


def dropped() -> int:
    """Lines of this process that were lost because nobody read them fast enough."""
    return sum(handler.dropped for *_, handler in _installed)


def _level(level: str | int) -> int:
    if isinstance(level, int):
        return level
    name = level.lower()
    if name not in LEVELS:
        raise ConfigError(f"unknown log level {level!r}{did_you_mean(name, LEVELS)}; one of {', '.join(LEVELS)}")
    return int(getattr(logging, name.upper()))


def _formatter(format: str, stream: IO[str]) -> logging.Formatter:  # noqa: A002
    if format not in FORMATS:
        raise ConfigError(f"unknown log format {format!r}{did_you_mean(format, FORMATS)}; one of {', '.join(FORMATS)}")
    terminal = stream.isatty()
    if format == "json" or (format == "auto" and not terminal):
        return JsonFormatter()
    plain = format == "text" or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return TextFormatter(terminal=terminal, colour=terminal and not plain)


def _after_fork() -> None:
    for *_, handler in _installed:
        handler.forget_writer()


os.register_at_fork(after_in_child=_after_fork)
