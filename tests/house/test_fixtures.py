"""The checks of tests/conftest.py find what they are there to find."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import eventually, eventually_async, key_faults

ROOT = Path(__file__).parents[2]


SAMPLE = """
import os, subprocess, sys
import pytest
import tests.conftest

tests.conftest.LINGER = 0.1

def test_child():
    os.posix_spawn("/bin/sleep", ["sleep", "61"], {})

@pytest.mark.skipif(sys.platform != "linux", reason="an orphan is adopted on Linux only")
def test_orphan():
    subprocess.run(["/bin/sh", "-c", "sleep 62 >/dev/null 2>&1 &"])

async def test_good():
    pass

async def test_bad(tmp_path):
    assert tmp_path == 1

def test_warning():
    open("/dev/null")
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> str:
    """What pytest says about the sample under our conftest."""
    path = tmp_path_factory.mktemp("sample") / "test_sample.py"
    path.write_text(SAMPLE)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml"), str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_a_child_that_outlives_its_test_is_found(said):
    assert "processes outlived the test" in said
    assert re.search(r"^\d+ sleep 61 ", said, re.MULTILINE)


@pytest.mark.skipif(sys.platform != "linux", reason="an orphan is adopted on Linux only")
def test_an_orphaned_grandchild_is_found(said):
    assert re.search(r"^\d+ sleep 62 ", said, re.MULTILINE)


def test_coroutine_tests_run_and_can_fail(said):
    assert "FAILED" in said
    assert "test_bad - AssertionError" in said.replace("\n", "")
    assert "test_good" not in said


def test_an_unclosed_file_fails(said):
    assert "test_warning - pytest.PytestUnraisable" in said.replace("\n", "")


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (("SET", "other:key", "1"), "other:key: not in the table"),
        (("SET", "fastq:{a}:nope", "1"), "not in the table"),
        (("SET", "fastq:{a}:jobs", "1"), "is a string, the table says hash"),
        (("HSET", "fastq:{a}:done:60:1", "id", "record"), "has no TTL"),
        (("SET", "fastq:leader", "me"), "has no TTL"),
        (("HSET", "fastq:{a}:jobs", "id", "envelope"), None),
    ],
)
def test_a_leaked_key_is_found(raw, command, fault):
    raw.execute_command(*command)
    found = list(key_faults(raw))
    assert (found == []) if fault is None else any(fault in text for text in found)


def test_every_test_begins_with_an_empty_database(raw):
    assert raw.dbsize() == 0
    raw.set("left", "behind")


def test_every_test_begins_with_an_empty_database_again(raw):
    assert raw.dbsize() == 0


def test_eventually_returns_the_value_and_names_the_fact():
    answers = iter([0, "", "found"])
    assert eventually(lambda: next(answers)) == "found"
    with pytest.raises(AssertionError, match=r"not true within 0.01 s: .*never_true"):
        eventually(never_true, timeout=0.01)


async def test_eventually_async_awaits_the_fact():
    answers = iter([False, True])

    async def fact() -> bool:
        return next(answers)

    assert await eventually_async(fact)


def never_true() -> bool:
    return False
