"""`import fastq` is cheap: a web server and every command pay it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

BUDGET = 120  # milliseconds of CPU, on a machine that needs REFERENCE for the standard library's part
REFERENCE = 60  # milliseconds of CPU that `import asyncio, ssl, ...` below costs on an idle machine of 2026
TRIES = 8

PROBE = """
import json, sys, time
start = time.process_time()
import {modules}
spent = time.process_time() - start
print(json.dumps([spent * 1000, sorted(sys.modules)]))
"""


def imported(modules: str) -> tuple[float, set[str]]:
    """Milliseconds of CPU above the interpreter's own start, and the modules that were loaded, in a new interpreter."""
    command = [sys.executable, "-c", PROBE.format(modules=modules)]
    spent, names = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return spent, set(names)


@pytest.mark.versions
def test_import_fastq_takes_less_than_120_ms():
    """Absolute times jitter with the machine and its load: each try is scaled by what the standard library took next to it."""
    scaled = []
    for _ in range(TRIES):
        reference, _ = imported("asyncio, ssl, http.client, json, logging, decimal")
        scaled.append(imported("fastq")[0] * REFERENCE / reference)
        if scaled[-1] < BUDGET:
            return
    pytest.fail(f"import fastq took {min(scaled):.0f} ms (scaled), the budget is {BUDGET}")


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
