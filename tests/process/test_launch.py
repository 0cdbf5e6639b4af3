"""Where the settings of a fleet come from, and what is said when the application cannot be imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastq.errors import ConfigError
from fastq.launch import AppNotFound, ImportFailed, Launch, load_app, plan


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an application, as the working directory."""
    (tmp_path / "shop_app.py").write_text(
        "import fastq\n"
        "app = fastq.FastQ('redis://code:1/3', concurrency=7, lease='20s')\n"
        "other = fastq.FastQ()\n"
        "number = 5\n"
    )
    (tmp_path / "one_app.py").write_text("import fastq\nmy_app = fastq.FastQ()\n")
    (tmp_path / "broken_app.py").write_text("def inner():\n    return {}['missing']\n\ninner()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_code_beats_environment_and_file_and_options_beat_code(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shop / "fastq.toml").write_text("concurrency = 50\ngrace = '3s'\n")
    monkeypatch.setenv("FASTQ_REDIS_URL", "redis://environment:1/0")
    monkeypatch.setenv("FASTQ_WORKERS", "9")
    settings = plan("shop_app:app", {"lease": "30s", "queues": None}).settings
    assert (settings.url, settings.concurrency) == ("redis://code:1/3", 7)
    assert (settings.lease, settings.grace, settings.workers) == (30.0, 3.0, 9)
    assert plan("shop_app:other", {}).settings.url == "redis://environment:1/0"


def test_the_planning_process_leaves_nothing_of_the_application_behind(shop: Path) -> None:
    plan("shop_app:app", {})
    assert "shop_app" not in sys.modules


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("nosuch:app", "no module named 'nosuch'"),
        ("shop_app:ap", "has no 'ap' - did you mean 'app'"),
        ("shop_app:number", "is of type int, not a fastq.FastQ"),
        ("shop_app", "has 2 FastQ objects: name one"),
        ("missing.py", "no such file"),
        ("", "give package.module:app"),
    ],
)
def test_an_application_that_is_not_there(shop: Path, capfd: pytest.CaptureFixture[str], path: str, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        plan(path, {})
    assert capfd.readouterr().err == "", "whoever asks tells it: at a reload that is the supervisor's log"


def test_the_only_application_of_a_module_or_file_needs_no_name(shop: Path) -> None:
    assert plan("one_app", {}).app == "one_app"
    assert plan("one_app.py", {}).settings.workers == 2


def test_import_errors_show_the_users_frames_only(shop: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImportFailed):
        plan("broken_app:app", {})
    said = capfd.readouterr().err
    assert "KeyError: 'missing'" in said
    assert "in inner" in said
    assert "importlib" not in said
    assert os.sep + "fastq" + os.sep + "launch.py" not in said


def test_options_that_cannot_be_used_are_told(shop: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="concurrency='0'"):
        plan("shop_app:app", {"concurrency": "0"})
    assert capfd.readouterr().err == ""


def test_load_app_takes_the_launch_settings(shop: Path) -> None:
    launch = plan("shop_app:app", {"result_ttl": 0})
    code = (
        "import sys, msgspec; from fastq.launch import Launch, load_app; from fastq.config import Settings;"
        "app = load_app(Launch(msgspec.json.decode(sys.argv[1], type=Settings), 'shop_app:app'));"
        "print(app.settings.result_ttl, app.settings.concurrency, app.endpoint().host)"
    )
    import msgspec

    said = subprocess.run(
        [sys.executable, "-c", code, msgspec.json.encode(launch.settings).decode()],
        capture_output=True, text=True, check=True, cwd=shop,
    )  # fmt: skip
    assert said.stdout.split() == ["0.0", "7", "code"]
    with pytest.raises(AppNotFound):
        load_app(Launch(launch.settings, "nosuch:app"))


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("@app.every(30, args=('x',))\n@app.task\nasync def beat(n: int) -> None: ...\n", "task 'beat'"),
        ("@app.every(30)\n@app.task\nasync def beat(n: int) -> None: ...\n", "task 'beat'"),
        ("app.beat_schedule({'a': {'task': 'nobody', 'schedule': 30.0}})\n", "no task is named 'nobody'"),
    ],
)
def test_a_schedule_that_cannot_be_fired_is_told_before_the_first_fork(
    shop: Path, capfd: pytest.CaptureFixture[str], code: str, text: str
) -> None:
    """F090, F094: wrong arguments, or a task that nobody has."""
    (shop / "timed_app.py").write_text(f"import fastq\napp = fastq.FastQ()\n{code}")
    with pytest.raises(ConfigError, match=text):
        plan("timed_app:app", {})
    assert capfd.readouterr().err == ""
