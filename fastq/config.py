"""Settings: what they are, where they come from, what they mean.

Later sources win: defaults, then a file, then the environment, then arguments::

    loaded = load(arguments={"lease": "20s"})
    loaded.settings.lease       # 20.0
    loaded.origins["lease"]     # 'argument'

The annotations of :class:`Settings` are the only description of a setting: its type, bounds and meaning;
``docs/settings.md`` is printed from them by ``python -m fastq.config``.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from fastq.errors import ConfigError, FastQError, did_you_mean, mask_url, safe_text
from fastq.partitions import parse_partitions, partitions_text
from fastq.routes import parse_routes, queues_text, routes_text
from fastq.values import (
    DURATION_UNITS,
    check_queue_name,
    parse_duration,
    parse_queues,
    parse_size,
    quoted,
)

__all__ = ["Loaded", "Settings", "load", "shown"]

MINUTE = 60.0
HOUR = 3_600.0
DAY = 86_400.0
YEAR = 366 * DAY


# -- how a field is described -----------------------------------------------------------------


def _text(doc: str, **bounds: Any) -> msgspec.Meta:
    return msgspec.Meta(description=doc, extra={"kind": "text"}, **bounds)


def _number(doc: str, **bounds: Any) -> msgspec.Meta:
    return msgspec.Meta(description=doc, extra={"kind": "number"}, **bounds)


def _switch(doc: str) -> msgspec.Meta:
    return msgspec.Meta(description=doc, extra={"kind": "switch"})


def _duration(doc: str, **bounds: Any) -> msgspec.Meta:
    return msgspec.Meta(description=doc, extra={"kind": "duration"}, **bounds)


def _size(doc: str, **bounds: Any) -> msgspec.Meta:
    return msgspec.Meta(description=doc, extra={"kind": "size"}, **bounds)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting of fastq, flat. Durations are seconds, sizes are bytes.

    Built by :func:`load`, which checks the values; a direct call does not check them.
    """

    url: Annotated[
        str, _text("Where Redis is: `redis://`, `rediss://` with TLS, `unix://` for a socket.", min_length=1)
    ] = "redis://localhost:6379/0"
    prefix: Annotated[
        str, _text("The first part of every key; one per application.", pattern=r"^[A-Za-z0-9_.:-]{1,64}\Z")
    ] = "fastq"
    connect_timeout: Annotated[float, _duration("How long one connection attempt may take.", gt=0, le=HOUR)] = 5.0
    response_timeout: Annotated[
        float, _duration("How long Redis may take to answer before the connection is given up.", gt=0, le=HOUR)
    ] = 10.0

    queues: Annotated[
        str,
        _text("What workers serve: `critical,default` in strict order, or `critical=6,default=3` by weight."),
    ] = "default"
    workers: Annotated[int, _number("Worker processes under `fastq supervise`.", ge=1, le=1_024)] = 2
    concurrency: Annotated[int, _number("Jobs that one worker runs at the same time.", ge=1, le=10_000)] = 100
    threads: Annotated[int, _number("Threads of one worker for handlers that are not async.", ge=1, le=1_024)] = 32
    processes: Annotated[
        int, _number('Processes of one worker for handlers with `isolation="process"`.', ge=1, le=1_024)
    ] = 4
    process_jobs: Annotated[int, _number("Each of them is replaced after this many jobs.", ge=1, le=10**12)] = 1_000
    prefetch_max: Annotated[
        int, _number("The most jobs one worker holds reserved, started or not.", ge=1, le=10_000)
    ] = 1_000
    grace: Annotated[
        float,
        _duration("How long a stopping worker waits for its running jobs before it hands them back.", ge=0, le=DAY),
    ] = 25.0
    lease: Annotated[
        float, _duration("How long the jobs of a vanished host stay with it before others may run them.", ge=1, le=HOUR)
    ] = 15.0
    hang_timeout: Annotated[
        float, _duration("A worker whose event loop is blocked for longer is killed.", ge=2, le=DAY)
    ] = 60.0
    max_jobs: Annotated[int, _number("A worker is replaced after this many jobs; 0 = never.", ge=0, le=10**12)] = 0
    max_rss: Annotated[
        int, _size("A worker is replaced when it holds more memory than this; 0 = never.", ge=0, le=2**50)
    ] = 0
    reload: Annotated[bool, _switch("Restart workers when a source file changes; for development.")] = False

    default_queue: Annotated[
        str, _text("Where the jobs of tasks go that name no queue.", pattern=r"^[A-Za-z0-9_-]{1,64}\Z")
    ] = "default"
    routes: Annotated[
        str,
        _text("Queues by task name, before those of the tasks themselves: `tasks.send_email=emails,report*=reports`."),
    ] = ""
    partitions: Annotated[
        str,
        _text("Queues split over a cluster, and into how many parts: `mail=4,reports=2`. Before what the code says."),
    ] = ""
    schedules: Annotated[str, _text("Schedules, as JSON; in a file a table each: `[schedules.x]`.")] = ""
    default_timeout: Annotated[
        float, _duration("How long a handler may run, unless its task says otherwise.", gt=0, le=YEAR)
    ] = 300.0
    default_soft_timeout: Annotated[
        float,
        _duration(
            "When `SoftTimeLimitExceeded` is raised in a handler, unless its task says otherwise; 0 = never.",
            ge=0,
            le=YEAR,
        ),
    ] = 0.0
    default_max_attempts: Annotated[
        int, _number("How often a failing job is run in all, unless its task says otherwise.", ge=1, le=1_000_000)
    ] = 5
    max_deliveries: Annotated[
        int, _number("A job whose worker died this many times goes to the dead-letter queue.", ge=1, le=1_000)
    ] = 3
    unknown_task_ttl: Annotated[
        float, _duration("How long a job whose task no worker knows waits for a worker that does.", ge=0, le=YEAR)
    ] = 600.0
    result_ttl: Annotated[
        float, _duration("How long the record of a finished job is kept; 0 = not at all.", ge=0, le=YEAR)
    ] = 3_600.0
    dead_max: Annotated[
        int, _number("The most entries a dead-letter queue keeps; the oldest go first.", ge=1, le=10**9)
    ] = 10_000
    dead_max_age: Annotated[
        float, _duration("How long an entry of a dead-letter queue is kept.", gt=0, le=100 * YEAR)
    ] = 90 * DAY

    max_body: Annotated[
        int, _size("The most bytes the encoded arguments of one job may have.", ge=1, le=512 * 2**20)
    ] = 1_048_576
    signing_keys: Annotated[
        str,
        _text("Jobs are signed: `id=secret`, more of them after commas; the first signs, all verify. See security.md."),
    ] = ""
    signing_required: Annotated[
        bool, _switch("With keys, workers run signed jobs only; false: for the time in which producers get theirs.")
    ] = True
    enqueue_timeout: Annotated[
        float, _duration("How long `enqueue` tries to reach Redis before it raises.", gt=0, le=HOUR)
    ] = 5.0
    durability: Annotated[
        Literal["stored", "replicated"],
        _text("When `enqueue` returns: `stored` by Redis, or `replicated`: `replicas` of its replicas have it, too."),
    ] = "stored"
    replicas: Annotated[int, _number("Replicas that must have a job with `durability=replicated`.", ge=1, le=100)] = 1
    replication_timeout: Annotated[
        float, _duration("How long `enqueue` waits for them before it raises `NotReplicated`.", gt=0, le=HOUR)
    ] = 1.0
    enqueue_buffer: Annotated[
        int, _number("Jobs of one process that may wait to be sent; further calls wait.", ge=1, le=10_000_000)
    ] = 10_000

    log_level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"], _text("The least severe log line.")
    ] = "info"
    log_format: Annotated[
        Literal["auto", "text", "json"], _text("`text`, `json`, or `auto`: text on a terminal, JSON otherwise.")
    ] = "auto"
    job_log_lines: Annotated[
        int,
        _number(
            "Lines of `job.log` that are kept of each job, the last ones, for `job.logs()`; 0 = none.", ge=0, le=1_000
        ),
    ] = 0
    metrics_host: Annotated[
        str,
        _text("The address of `/metrics`, `/healthz`, `/readyz`; any but this host's own needs a token.", min_length=1),
    ] = "127.0.0.1"
    metrics_port: Annotated[int, _number("The port of the same; 0 = off.", ge=0, le=65_535)] = 9_191
    metrics_token: Annotated[str, _text("`/metrics` then asks for `Authorization: Bearer` and this token.")] = ""
    pidfile: Annotated[str, _text("Where the supervisor writes its process id; empty = nowhere.")] = ""

    def __repr__(self) -> str:
        """Without passwords and tokens."""
        return f"Settings({', '.join(f'{name}={shown(self, name)}' for name in self.__struct_fields__)})"


#: The first field of each part of docs/settings.md.
PARTS = {
    "url": "Redis",
    "queues": "Workers",
    "default_queue": "Jobs",
    "max_body": "Enqueue",
    "log_level": "Operation",
}

#: Environment variables of a field besides its own, in the order in which they are looked up.
VARIABLES: Mapping[str, tuple[str, ...]] = {
    "url": ("FASTQ_REDIS_URL", "FASTQ_URL", "REDIS_URL"),
    "schedules": ("FASTQ_SCHEDULE_JSON", "FASTQ_SCHEDULES", "JOBS_SCHEDULE_JSON"),
    "default_timeout": ("FASTQ_DEFAULT_TIMEOUT", "JOB_DEFAULT_TIMEOUT_SECONDS"),
}

#: FASTQ_… variables that are no setting; they are never taken for a misspelt one.
OTHER_VARIABLES = {
    "FASTQ_LIMITS": "The file with `[stores]` and `[limiters]` (or its folder), instead of looking in `.` and `./config`.",
    "FASTQ_APP": "The application, `package.module:app`, when a command is given none.",
    "FASTQ_REDIS_SERVER": "The server binary of `memory://` and of the tests.",
}

#: Tables of fastq.toml that :mod:`fastq.limiter.catalogue` reads.
LIMIT_TABLES = frozenset({"stores", "limiters"})

SECRETS = frozenset({"metrics_token", "signing_keys"})


class Loaded(msgspec.Struct, frozen=True):
    """What :func:`load` found: the settings, the origin of each value, and what looked like a mistake."""

    settings: Settings
    origins: dict[str, str]
    warnings: tuple[str, ...] = ()


# -- the fields, as data ----------------------------------------------------------------------


class _Field(msgspec.Struct, frozen=True):
    """One setting: what the annotation says."""

    name: str
    type: Any
    kind: str
    doc: str
    default: Any
    choices: tuple[str, ...]

    @property
    def variables(self) -> tuple[str, ...]:
        return VARIABLES.get(self.name, (f"FASTQ_{self.name.upper()}",))


def _fields() -> dict[str, _Field]:
    hints = get_type_hints(Settings, include_extras=True)
    defaults = Settings()
    return {name: _field(name, hints[name], getattr(defaults, name)) for name in Settings.__struct_fields__}


def _field(name: str, annotated: Any, default: object) -> _Field:
    plain, meta = get_args(annotated)
    choices = get_args(plain) if get_origin(plain) is Literal else ()
    return _Field(name, annotated, meta.extra["kind"], meta.description, default, choices)


def _identity(value: object) -> object:
    return value


_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _switch_value(value: object) -> object:
    return _SWITCH.get(value.strip().lower(), value) if isinstance(value, str) else value


_READERS: Mapping[str, Callable[[object], object]] = {
    "text": _identity,
    "number": _identity,
    "switch": _switch_value,
    "duration": parse_duration,
    "size": parse_size,
}


def _read(field: _Field, raw: object, origin: str) -> object:
    """The checked value of a field, or ConfigError that names field, value and origin."""
    try:
        if field.name == "queues":
            raw = queues_text(raw)
            parse_queues(raw)
        elif field.name == "routes":
            raw = routes_text(raw)
            for _, queue in parse_routes(raw):
                check_queue_name(queue)
        elif field.name == "partitions":
            raw = partitions_text(raw)
            parse_partitions(raw)
        elif field.name == "schedules" and not isinstance(raw, str):
            raw = msgspec.json.encode(raw).decode()  # what the environment would hold; fastq.timetable reads it
        elif field.choices:
            raw = _choice(field, raw)
        return msgspec.convert(_READERS[field.kind](raw), field.type, strict=not isinstance(raw, str))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{field.name}={_safe(field.name, raw)} ({origin}): {_plain(error)}") from None
    except FastQError as error:
        raise ConfigError(f"{field.name} ({origin}): {error}") from None


_CHARACTERS = re.compile(r"Expected str matching regex '\^\[(.+)\]\{(\d+),(\d+)\}.*'")


def _plain(error: Exception) -> str:
    text = _CHARACTERS.sub(r"Expected \2 to \3 characters of \1", str(error).replace("`", ""))
    return text[:1].lower() + text[1:]


def _choice(field: _Field, raw: object) -> str:
    value = raw.strip().lower() if isinstance(raw, str) else raw
    if value in field.choices:
        return str(value)
    hint = did_you_mean(str(value), field.choices)
    raise ConfigError(f"{quoted(raw)} is none of {', '.join(field.choices)}{hint}")


def shown(settings: Settings, name: str) -> str:
    """The value of a setting as text for people, without its password or token."""
    return _safe(name, getattr(settings, name))


def _safe(name: str, value: object) -> str:
    if name in SECRETS:
        return "'***'" if value else "''"
    return quoted(mask_url(value) if name == "url" and isinstance(value, str) else value)


# -- the sources ------------------------------------------------------------------------------

_Given = Iterator[tuple[str, object, str]]  # field name, raw value, origin


def load(
    *, arguments: Mapping[str, object], environ: Mapping[str, str] | None = None, file: Path | None = None
) -> Loaded:
    """The settings in force and the origin of each.

    ``arguments`` win over ``environ`` (the process's unless given), which wins over ``file`` (unless given:
    ``./fastq.toml``, else ``[tool.fastq]`` of ``./pyproject.toml``, else nothing). An argument that is None and an
    environment variable that is empty count as not given. Raises ConfigError for a file that cannot be read, an
    unknown name or a value that cannot be used; the message says where it came from.
    """
    fields = _fields()
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origins = dict.fromkeys(fields, "default")
    for source in (_from_file(fields, file), _from_environ(fields, environ), _from_arguments(fields, arguments)):
        for name, raw, origin in source:
            values[name] = _read(fields[name], raw, origin)
            origins[name] = origin
    return Loaded(Settings(**values), origins, tuple(_suspects(fields, environ)))


def _from_arguments(fields: Mapping[str, _Field], arguments: Mapping[str, object]) -> _Given:
    for name, raw in arguments.items():
        _known(name, fields, "argument")
        if raw is not None:
            yield name, raw, "argument"


def _from_environ(fields: Mapping[str, _Field], environ: Mapping[str, str]) -> _Given:
    for field in fields.values():
        variable = next((v for v in field.variables if environ.get(v, "").strip()), None)
        if variable:
            yield field.name, environ[variable].strip(), variable


def _from_file(fields: Mapping[str, _Field], file: Path | None) -> _Given:
    if file is None:
        file = next((path for path in (Path("fastq.toml"), Path("pyproject.toml")) if path.is_file()), None)
    if file is None:
        return
    content, origin = _table(file)
    for name, raw in content.items():
        if name in LIMIT_TABLES:
            continue
        _known(name, fields, origin)
        yield name, raw, origin


def _table(file: Path) -> tuple[Mapping[str, object], str]:
    """The settings in a TOML file, and what to call the place."""
    import tomllib  # only here: most processes have no file, and `import fastq` must be fast

    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None
    if file.name != "pyproject.toml":
        return content, str(file)
    tools = content.get("tool", {})
    table: Any = tools.get("fastq", {}) if isinstance(tools, dict) else tools
    if not isinstance(table, dict):
        raise ConfigError(f"[tool.fastq] of {file} is not a table")
    return table, f"{file} [tool.fastq]"


def _known(name: str, fields: Mapping[str, _Field], origin: str) -> None:
    if name not in fields:
        raise ConfigError(f"unknown setting {quoted(name)} ({origin}){did_you_mean(name, fields)}")


def _suspects(fields: Mapping[str, _Field], environ: Mapping[str, str]) -> Iterator[str]:
    """One line for each FASTQ_… variable that is no setting but looks like one.

    Not an error: the environment is shared, and other versions of fastq may read other variables.
    """
    known = {variable for field in fields.values() for variable in field.variables}
    for variable in sorted(environ):
        if not variable.startswith("FASTQ_") or variable in known or variable in OTHER_VARIABLES:
            continue
        near = difflib.get_close_matches(variable, known, n=1, cutoff=0.8)
        if near:
            yield f"unknown environment variable {safe_text(variable, 80)} is ignored - did you mean {near[0]!r}?"


# -- docs/settings.md -------------------------------------------------------------------------

_COLUMNS = ("| setting | default | environment | meaning |", "|---|---|---|---|")
_HEAD = """\
# Settings

<!-- printed by `python -m fastq.config`; do not edit -->

Each setting is read from, the last one winning: its default, the file (`--config`, else `./fastq.toml`, else
`[tool.fastq]` of `./pyproject.toml`), the environment, the argument of `FastQ(...)` or the option of a command.
`fastq doctor --show-config` prints every value in force and where it came from.

Durations are seconds, or text: `250ms`, `20s`, `5m`, `2h`, `7d`, `1h30m`. Sizes are bytes, or text with the units of
redis.conf: `512MB` counts by 1024, `512M` by 1000. Switches are `true` or `false`. An unknown name in the file or
among the arguments is an error; an environment variable that is nearly a setting is a warning; an empty one is not set.

In a file, `queues` may also be a list (`["critical", "default"]`) or a table of weights (`{critical = 6, default = 3}`).
"""


def document() -> str:
    """The text of docs/settings.md."""
    lines = [_HEAD]
    for field in _fields().values():
        if field.name in PARTS:
            lines += ["", f"## {PARTS[field.name]}", "", *_COLUMNS]
        variables = ", ".join(f"`{variable}`" for variable in field.variables)
        lines.append(f"| `{field.name}` | {_default(field)} | {variables} | {field.doc}{_limits(field)} |")
    lines += ["", "## Other environment variables", "", "| variable | meaning |", "|---|---|"]
    lines += [f"| `{variable}` | {doc} |" for variable, doc in OTHER_VARIABLES.items()]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _default(field: _Field) -> str:
    if field.kind == "switch":
        return f"`{str(field.default).lower()}`"
    return f"`{_amount(field.kind, field.default)}`" if field.default != "" else "empty"


def _limits(field: _Field) -> str:
    """`` 1s to 1h.``: the bounds of a field in words."""
    meta = get_args(field.type)[1]
    low, high = meta.ge if meta.ge is not None else meta.gt, meta.le
    if field.choices:
        return f" One of {', '.join(f'`{choice}`' for choice in field.choices)}."
    if high is None:
        return ""
    above = "more than " if meta.gt is not None else ""
    return f" {above}{_amount(field.kind, low)} to {_amount(field.kind, high)}.".replace(" more", " More")


def _amount(kind: str, value: Any) -> str:
    if not value or kind not in ("duration", "size"):
        return str(value)
    units = DURATION_UNITS if kind == "duration" else {"": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30, "tb": 2**40}
    unit = next(unit for unit, size in reversed(units.items()) if value % size == 0)
    return f"{value / units[unit]:.0f}{unit}"


if __name__ == "__main__":
    print(document(), end="")
