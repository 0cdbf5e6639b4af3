"""fastq, the floors and the rivals, as things that can be drained."""

from __future__ import annotations

import ast
import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from benchmarks.load import app as application
from benchmarks.load.lab import ROOT, Candidate, Stuck, module
from benchmarks.rivals import environment

__all__ = ["FASTQ", "FLOORS", "NAMES", "Rival", "about", "aim", "fill", "rival"]

app = application.app


def aim(url: str) -> None:
    """Let the application of this process talk to the server at ``url``."""
    app.adopt(msgspec.structs.replace(app.settings, url=url))


async def fill_here(task: str, jobs: int) -> None:
    """Enqueue in bulk on the running loop."""
    await app.tasks[task].enqueue_many(zip(range(jobs), strict=False), ids=False)


def fill(url: str, task: str, jobs: int) -> None:
    """Enqueue in bulk."""

    async def run() -> None:
        await fill_here(task, jobs)
        await app.aclose()

    aim(url)
    asyncio.run(run())


def _workers(url: str, processes: int, task: str) -> list[str]:
    """One process as users start it; several under their supervisor, as what needs a scheduler (parked jobs)."""
    name = "benchmarks.load.app:app"
    quiet = ("--log-level", "error")
    if processes == 1 and task != "noop_limited":
        return module("fastq", "worker", name, *quiet)
    return module("fastq", "supervise", name, *quiet, "--workers", str(processes))


def _floor(kind: str) -> Candidate:
    return Candidate(kind, fill, lambda url, processes, task: module("benchmarks.floor", kind, url, str(processes)))


FASTQ = Candidate("fastq", fill, _workers)
FLOORS = {kind: _floor(kind) for kind in ("redis-py", "protocol", "flat")}


# -- rivals -----------------------------------------------------------------------------------

NAMES = (
    "celery", "dramatiq", "rq", "arq", "taskiq", "saq", "huey", "streaq", "docket", "ardiq", "mayu", "blitzq",
    "blitzq_fast", "tarsk", "bullmq", "sidekiq",
)  # fmt: skip


class About(NamedTuple):
    """What a rival's module says of itself; read from its source, since the library is not importable here."""

    packages: list[str]
    guarantee: str
    settings: str
    handlers: str = "both"
    least: Sequence[int] = (3, 11)
    runtime: str = "python"

    @property
    def once(self) -> bool:
        """Whether a job of a killed worker is run again."""
        return self.guarantee.startswith("at least once")


class Rival(NamedTuple):
    """A rival that is installed here."""

    candidate: Candidate
    about: About
    python: str
    environ: dict[str, str]

    def command(self, *words: object) -> list[str]:
        return [self.python, "-m", "benchmarks.rivals", self.candidate.name, *map(str, words)]

    def send(self, url: str, *words: object) -> float:
        """Run one of its producers to the end; the seconds that it took.

        Raises:
            Stuck: it failed.
        """
        variables = os.environ | self.environ | {"BENCH_REDIS_URL": url, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            self.command(*words), env=variables, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
        )
        if done.returncode:
            raise Stuck(f"{self.candidate.name} {words}: {done.stderr[-1500:]}")
        return float(done.stdout.split()[-1])


def about(name: str) -> About:
    """Read ``ABOUT`` of a rival's module."""
    tree = ast.parse((ROOT / "benchmarks" / "rivals" / f"{name}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ABOUT":
            return About(**ast.literal_eval(node.value))
    raise LookupError(f"{name} has no ABOUT")


def rival(name: str) -> Rival:
    """Install a rival if need be.

    Raises:
        Missing: it is not to be had on this machine.
    """
    told = about(name)
    environ: dict[str, str] = {}
    python = sys.executable
    if told.runtime == "node":
        environ["NODE_PATH"] = str(environment.node([p.replace("==", "@") for p in told.packages]) / "node_modules")
    elif told.runtime == "ruby":
        environment.ruby("sidekiq")
    else:
        python = environment.python(name.removesuffix("_fast"), told.packages, (told.least[0], told.least[1]))
    made: list[Rival] = []
    candidate = Candidate(
        name,
        lambda url, task, jobs: made[0].send(url, "fill", task, jobs) and None,
        lambda url, processes, task: made[0].command("work", processes, task),
        environ,
    )
    made.append(Rival(candidate, told, python, environ))
    return made[0]
