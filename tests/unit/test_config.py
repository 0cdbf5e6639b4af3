"""Settings: sources, origins, values, and the mistakes that are answered (F230 to F231, F338, F345)."""

from __future__ import annotations

import datetime as dt
import doctest
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastq.config
import fastq.values
from fastq.config import (
    OTHER_VARIABLES,
    Settings,
    load,
    shown,
)
from fastq.errors import ConfigError, FastQError, InvalidQueueName
from fastq.values import QueueOrder, check_queue_name, parse_duration, parse_queues, parse_size

ROOT = Path(fastq.config.__file__).parent


def loaded(
    arguments: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None, file: Path | None = None
) -> fastq.config.Loaded:
    return load(arguments=arguments or {}, environ=environ or {}, file=file)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the repository's own pyproject.toml."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(fastq.values).failed == 0


# -- sources ----------------------------------------------------------------------------------


def test_defaults() -> None:
    """F345: Redis on this machine unless something else is said."""
    result = loaded()
    assert result.settings == Settings()
    assert set(result.origins.values()) == {"default"}
    assert result.warnings == ()
    assert result.settings.url == "redis://localhost:6379/0"


def test_every_default_is_a_value_that_would_be_accepted() -> None:
    defaults = Settings()
    given_all = {name: getattr(defaults, name) for name in Settings.__struct_fields__}
    assert loaded(given_all).settings == defaults


def test_later_sources_win(empty_folder: Path) -> None:
    file = empty_folder / "fastq.toml"
    file.write_text("workers = 3\nlease = '20s'\nconcurrency = 7\n")
    environ = {"FASTQ_LEASE": "30s", "FASTQ_CONCURRENCY": "8"}
    result = loaded({"concurrency": 9, "grace": None}, environ)
    got = result.settings
    assert (got.workers, got.lease, got.concurrency, got.grace) == (3, 30.0, 9, 25.0)
    assert {name: result.origins[name] for name in ("workers", "lease", "concurrency", "grace")} == {
        "workers": "fastq.toml",
        "lease": "FASTQ_LEASE",
        "concurrency": "argument",
        "grace": "default",
    }


def test_the_table_in_pyproject(empty_folder: Path) -> None:
    (empty_folder / "pyproject.toml").write_text("[tool.other]\nx = 1\n[tool.fastq]\nworkers = 4\n")
    assert loaded().settings.workers == 4
    assert loaded().origins["workers"] == "pyproject.toml [tool.fastq]"
    (empty_folder / "fastq.toml").write_text("concurrency = 5\n")
    assert (loaded().settings.workers, loaded().settings.concurrency) == (2, 5)


def test_a_pyproject_without_a_table_is_nothing(empty_folder: Path) -> None:
    (empty_folder / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert loaded().settings == Settings()


def test_a_file_that_is_named(empty_folder: Path) -> None:
    (empty_folder / "fastq.toml").write_text("workers = 3\n")
    other = empty_folder / "other.toml"
    other.write_text("concurrency = 5\n")
    result = loaded(file=other)
    assert (result.settings.workers, result.settings.concurrency) == (2, 5)
    assert result.origins["concurrency"] == str(other)


@pytest.mark.parametrize(
    ("environ", "url", "origin"),
    [
        (
            {"REDIS_URL": "redis://c", "FASTQ_URL": "redis://b", "FASTQ_REDIS_URL": "redis://a"},
            "redis://a",
            "FASTQ_REDIS_URL",
        ),
        ({"REDIS_URL": "redis://c", "FASTQ_URL": "redis://b"}, "redis://b", "FASTQ_URL"),
        ({"REDIS_URL": "redis://c"}, "redis://c", "REDIS_URL"),
        ({"REDIS_URL": "redis://c", "FASTQ_URL": " "}, "redis://c", "REDIS_URL"),
        ({"REDIS_URL": ""}, "redis://localhost:6379/0", "default"),
    ],
)
def test_the_url_has_three_variables(environ: dict[str, str], url: str, origin: str) -> None:
    """F231, F338: REDIS_URL serves every library; FASTQ_REDIS_URL says it for fastq alone."""
    result = loaded(environ=environ)
    assert (result.settings.url, result.origins["url"]) == (url, origin)


def test_the_environment_is_the_process_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTQ_WORKERS", "6")
    assert load(arguments={}).settings.workers == 6


def test_every_setting_can_come_from_everywhere(empty_folder: Path) -> None:
    defaults = Settings()
    values = {name: getattr(defaults, name) for name in Settings.__struct_fields__}
    texts = {f"FASTQ_{name.upper()}": str(value) for name, value in values.items() if value != ""}
    result = loaded(environ=texts)
    assert result.settings == defaults
    assert "default" not in {origin for name, origin in result.origins.items() if values[name] != ""}
    lines = (
        f"{name} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for name, value in values.items()
    )
    (empty_folder / "fastq.toml").write_text("\n".join(lines))
    assert loaded().settings == defaults


# -- mistakes ---------------------------------------------------------------------------------


def test_an_unknown_argument() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'concurency' \(argument\) - did you mean 'concurrency'\?"):
        loaded({"concurency": None})


def test_an_unknown_key_in_a_file(empty_folder: Path) -> None:
    (empty_folder / "fastq.toml").write_text("worker = 3\n")
    with pytest.raises(ConfigError, match=r"unknown setting 'worker' \(fastq.toml\) - did you mean 'workers'\?"):
        loaded()


def test_an_unknown_variable_warns_when_it_is_near() -> None:
    environ = dict.fromkeys(["FASTQ_CONCURENCY", "FASTQ_SOMETHING_ELSE", "CONCURENCY", *OTHER_VARIABLES], "1")
    result = loaded(environ=environ)
    assert result.warnings == (
        "unknown environment variable FASTQ_CONCURENCY is ignored - did you mean 'FASTQ_CONCURRENCY'?",
    )
    assert result.settings == Settings()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"workers = ", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
        (b"[workers]\nx = 1", "workers="),
        (b"workers = true", "got bool"),
        (b"workers = 2.5", "workers=2.5"),
        (b"lease = nan", "lease"),
        (b"lease = 2000-01-01", "a duration is"),
        (b"queues = 5", "no list of queues"),
        (b"metrics_token = 5", "expected str"),
    ],
)
def test_a_bad_file(empty_folder: Path, content: bytes, message: str) -> None:
    (empty_folder / "fastq.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        loaded()
    assert "fastq.toml" in str(caught.value)


def test_a_file_that_is_not_there(empty_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none.toml: No such file"):
        loaded(file=empty_folder / "none.toml")


@pytest.mark.parametrize("content", ["[tool]\nfastq = 5\n", "tool = 5\n"])
def test_a_tool_table_that_is_none(empty_folder: Path, content: str) -> None:
    (empty_folder / "pyproject.toml").write_text(content)
    with pytest.raises(ConfigError, match="is not a table"):
        loaded()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("workers", "0"),
        ("workers", "two"),
        ("workers", "2.5"),
        ("workers", "1e400"),
        ("workers", "9" * 5_000),
        ("concurrency", "10001"),
        ("lease", "0.5s"),
        ("lease", "2h"),
        ("lease", "15 parsecs"),
        ("lease", "inf"),
        ("lease", "-5"),
        ("default_timeout", "0"),
        ("max_body", "0"),
        ("max_rss", "512XB"),
        ("prefix", "has space"),
        ("prefix", "a{b}"),
        ("prefix", "x" * 65),
        ("prefix", "umläut"),
        ("reload", "maybe"),
        ("log_level", "verbose"),
        ("log_format", "xml"),
        ("metrics_port", "65536"),
        ("queues", "a,,b"),
        ("queues", "a,a"),
        ("queues", "a b"),
        ("queues", "a=1,b"),
        ("queues", "a=0"),
    ],
)
def test_a_bad_value_names_field_and_origin(name: str, text: str) -> None:
    variable = f"FASTQ_{name.upper()}"
    with pytest.raises(ConfigError) as caught:
        loaded(environ={variable: text})
    message = str(caught.value)
    assert message.startswith(name)
    assert f"({variable})" in message
    assert len(message) < 400
    assert message.isprintable()


def test_a_bad_choice_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"'warn' is none of debug, info, .* - did you mean 'warning'\?"):
        loaded({"log_level": "warn"})


def test_secrets_are_never_shown() -> None:
    settings = loaded({"url": "redis://app:secret@db/0", "metrics_token": "hush"}).settings
    assert "secret" not in repr(settings)
    assert "hush" not in repr(settings)
    assert shown(settings, "url") == "'redis://app:***@db/0'"
    assert shown(settings, "workers") == "2"
    assert shown(Settings(), "metrics_token") == "''"
    with pytest.raises(ConfigError) as caught:
        loaded({"metrics_token": ["hush"]})
    assert "hush" not in str(caught.value)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Settings().workers = 3  # type: ignore[misc]


# -- durations, sizes, switches ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("250ms", 0.25),
        ("20s", 20.0),
        ("20 s", 20.0),
        (" 5m ", 300.0),
        ("2h", 7_200.0),
        ("7d", 604_800.0),
        ("1h30m", 5_400.0),
        ("1d 12h", 129_600.0),
        ("1.5s", 1.5),
        ("0", 0.0),
        ("20", 20.0),
        ("0.5", 0.5),
        (20, 20.0),
        (0.5, 0.5),
        (dt.timedelta(minutes=5), 300.0),
    ],
)
def test_durations(value: object, seconds: float) -> None:
    assert parse_duration(value) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "s",
        "5 minutes",
        "PT20S",
        "1h-30m",
        "5mm",
        "٥s",
        "5S",
        "1e3",
        "-1",
        "nan",
        -1,
        math.nan,
        math.inf,
        True,
        None,
        10**400,
        "9" * 100_000,
        "1h" * 50_000 + "x",
        dt.timedelta(-1),
        b"5s",
        [5],
    ],
)
def test_no_durations(value: object) -> None:
    with pytest.raises(ConfigError):
        parse_duration(value)


@given(st.integers(0, 10**9))
def test_a_duration_means_the_same_in_every_spelling(milliseconds: int) -> None:
    seconds = parse_duration(f"{milliseconds}ms")
    assert seconds == pytest.approx(milliseconds / 1000)
    assert parse_duration(str(milliseconds)) == milliseconds
    assert parse_duration(dt.timedelta(milliseconds=milliseconds)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("512MB", 512 * 2**20),
        ("512mb", 512 * 2**20),
        ("512Mi", 512 * 2**20),
        ("512MiB", 512 * 2**20),
        ("512M", 512_000_000),
        ("64 kb", 65_536),
        ("1.5k", 1_500),
        ("1gb", 2**30),
        ("2TB", 2 * 2**40),
        ("100b", 100),
        ("100", 100),
        (100, 100),
        (0, 0),
    ],
)
def test_sizes(value: object, size: int) -> None:
    """The units of redis.conf; Kubernetes' Mi as well."""
    assert parse_size(value) == size


@pytest.mark.parametrize(
    "value", ["", "MB", "5 megabytes", "-1", "1e9", "٥", "5PB", -1, 1.5, True, None, "9" * 100_000]
)
def test_no_sizes(value: object) -> None:
    with pytest.raises(ConfigError):
        parse_size(value)


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("YES", True), ("on", True), ("0", False)])
def test_switches(text: str, value: bool) -> None:
    assert loaded(environ={"FASTQ_RELOAD": text}).settings.reload is value


def test_units_in_a_file(empty_folder: Path) -> None:
    (empty_folder / "fastq.toml").write_text('max_rss = "512MB"\ngrace = 5\nlease = "20s"\nlog_level = "DEBUG"\n')
    settings = loaded().settings
    assert (settings.max_rss, settings.grace, settings.lease, settings.log_level) == (2**29, 5.0, 20.0, "debug")


# -- queues -----------------------------------------------------------------------------------


def test_strict_order_and_weights() -> None:
    """F145: strict order, or weights against starvation."""
    assert parse_queues("critical,default") == QueueOrder(("critical", "default"))
    assert parse_queues(" critical=6, default = 3 ,bulk=1") == QueueOrder(("critical", "default", "bulk"), (6, 3, 1))
    assert parse_queues("default") == QueueOrder(("default",))


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", "a,", "a,a", "a=1,b", "a=0", "a=-1", "a=1001", "a=x", "a=", "a=1=2", "a=٣", "a=1,a=2", "ä", "a;b"),
        "x" * 65,
        ",".join(f"q{i}" for i in range(101)),
    ],
)
def test_no_queues(text: str) -> None:
    with pytest.raises(FastQError):
        parse_queues(text)


@pytest.mark.parametrize(
    "toml",
    ['queues = "critical=6,default=3"', "queues = {critical = 6, default = 3}", "[queues]\ncritical=6\ndefault=3"],
)
def test_weights_in_a_file(empty_folder: Path, toml: str) -> None:
    (empty_folder / "fastq.toml").write_text(toml)
    assert parse_queues(loaded().settings.queues) == QueueOrder(("critical", "default"), (6, 3))


def test_a_list_in_a_file(empty_folder: Path) -> None:
    (empty_folder / "fastq.toml").write_text('queues = ["critical", "default"]')
    assert loaded().settings.queues == "critical,default"


@pytest.mark.parametrize("name", ["default", "a", "A-b_9", "x" * 64])
def test_queue_names(name: str) -> None:
    assert check_queue_name(name) == name


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a{b}", "x" * 65, "ü", "a\n", "٣", None, 5, b"a"])
def test_no_queue_names(name: Any) -> None:
    with pytest.raises(InvalidQueueName, match="must be 1 to 64 characters"):
        check_queue_name(name)


# -- any input --------------------------------------------------------------------------------


def refused(arguments: dict[str, object], environ: dict[str, str]) -> str:
    """The message, or nothing when it was accepted; what is accepted keeps its type and its bounds."""
    try:
        settings = loaded(arguments, environ).settings
    except ConfigError as error:
        return str(error)
    assert msgspec.convert(msgspec.to_builtins(settings), Settings) == settings
    return ""


@given(
    st.dictionaries(
        st.sampled_from(Settings.__struct_fields__),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50) | st.binary(max_size=5),
        max_size=4,
    )
)
def test_any_argument_is_used_or_refused(arguments: dict[str, object]) -> None:
    message = refused(arguments, {})
    assert message.isprintable()
    assert len(message) < 400


@given(st.sampled_from(Settings.__struct_fields__), st.text(max_size=60))
def test_any_variable_is_used_or_refused(name: str, text: str) -> None:
    message = refused({}, {f"FASTQ_{name.upper()}": text})
    assert message.isprintable()
    assert len(message) < 400


def test_importing_the_settings_is_cheap() -> None:
    """`import fastq` must stay under 120 ms: nothing heavy comes in through here."""
    script = f"""
import sys, types
package = types.ModuleType("fastq"); package.__path__ = [{str(ROOT)!r}]; sys.modules["fastq"] = package
import fastq.config, fastq.retry
heavy = {{"asyncio", "redis", "hiredis", "tomllib", "zoneinfo", "cronsim", "prometheus_client", "logging", "uvloop", "click"}}
print(sorted(heavy & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_pattern_is_told_in_words() -> None:
    with pytest.raises(ConfigError, match=r"expected 1 to 64 characters of A-Za-z0-9_.:-$"):
        loaded(environ={"FASTQ_PREFIX": "a b"})
