"""`import fastq` is cheap: a web server and every command pay it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

BUDGET = 120  # milliseconds of CPU (a busy machine does not count) above the interpreter's own start, the best of several tries

PROBE = """
import sys, time
before = set(sys.modules)
start = time.process_time()
import {module}
spent = time.process_time() - start
import json
print(json.dumps([spent * 1000, sorted(set(sys.modules) - before)]))
"""


def imported(module: str) -> tuple[float, set[str]]:
    """Milliseconds and the modules that came along, in a new interpreter."""
    command = [sys.executable, "-c", PROBE.format(module=module)]
    spent, modules = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return spent, set(modules)


@pytest.mark.versions
def test_import_fastq_takes_less_than_120_ms():
    times = []
    for _ in range(8):
        times.append(imported("fastq")[0])
        if times[-1] < BUDGET:
            return
    pytest.fail(f"import fastq took {min(times):.0f} ms")


@pytest.mark.versions
def test_import_fastq_brings_nothing_heavy():
    _, modules = imported("fastq")
    heavy = {
        "redis",
        "prometheus_client",
        "click",
        "rich",
        "uvloop",
        "cronsim",
        "multiprocessing",
        "unittest",
        "http.server",
    }
    assert modules.isdisjoint(heavy)
