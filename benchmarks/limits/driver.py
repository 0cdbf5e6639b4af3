"""What limits cost and what they hold: every figure of one run on one machine, on a private server, with real processes."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import uvloop

import fastq
from benchmarks.limits.forks import over_bucket, used
from fastq.broker.command import raw
from fastq.broker.connection import SyncConnection
from fastq.broker.embedded import EmbeddedServer
from fastq.broker.url import parse_url
from fastq.limits import Tokens

RIVAL = "rate-sync[redis]==0.4.2"
RIVAL_PYTHONS = ("3.12", "3.13", "3.14")  # it needs 3.12
ROUNDS = 3  # of what is only ever made slower by the machine: the best one counts


class Use(msgspec.Struct):
    """Processes that use a limit under backlog for some seconds."""

    rate: int
    processes: int
    uses: int
    share: float
    """Of what the rate yields in the time from the end of the burst to the last use."""
    excess: float
    """Units above burst + rate × L in the worst of all spans; 0 or less: none was over."""
    requests_per_second: float
    fewest: int
    """Uses of the process that had the fewest."""


class Figures(msgspec.Struct):
    """Everything that one run measures."""

    machine: str
    server: str
    grant_ns: float
    acquires_per_second: float
    rival_per_second: float | None
    rival_python: str | None
    round_trip_us: float
    pacing_p50_ms: float
    pacing_p99_ms: float
    timer_p99_ms: float
    pacing_requests: float
    keys_per_second: float
    bytes_per_key: float
    keys_kept: int
    uses: list[Use]


# -- one process ----------------------------------------------------------------------------------------------------------


def grant_ns() -> float:
    """Ns of taking one unit from the compiled tokens, called from Python."""
    tokens = Tokens()
    tokens.put(10**12, 1e12)
    return min(timeit.repeat("take(1, 1.0)", globals={"take": tokens.take}, number=20_000, repeat=100)) / 20_000 * 1e9


async def acquires(url: str, count: int = 300_000) -> float:
    """``await limiter.acquire()`` per second, one after the other, at a rate whose tokens are at hand."""
    app = fastq.FastQ(url)
    limiter, best = app.limiter("speed", rate="10000000/s"), 0.0
    for _ in range(20_000):
        await limiter.acquire()
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            await limiter.acquire()
        best = max(best, count / (time.perf_counter() - start))
    await app.aclose()
    return best


async def round_trip(url: str, count: int = 2_000) -> float:
    """µs of an acquire that asks Redis: each for a key of its own."""
    app = fastq.FastQ(url)
    limiter = app.limiter("trip", rate="10/s")
    start = time.perf_counter()
    for n in range(count):
        await limiter.for_key(str(n)).acquire()
    taken = time.perf_counter() - start
    await app.aclose()
    return taken / count * 1e6


async def pacing(url: str, count: int = 500) -> tuple[float, float, float, float]:
    """At 100/s, one waiter: error of the spacing in ms, p50 and p99; the same of a bare timer; requests per grant."""
    app = fastq.FastQ(url)
    limiter = app.limiter("pace", rate="100/s burst 1")
    for _ in range(10):
        await limiter.acquire()
    requests = limiter.counts.requests
    times, late = [], []

    async def timer() -> None:
        while len(times) < count:
            start = time.monotonic()
            await asyncio.sleep(0.01)
            late.append(time.monotonic() - start - 0.01)

    bare = asyncio.create_task(timer())
    while len(times) < count:
        await limiter.acquire()
        times.append(time.monotonic())
    await bare
    await app.aclose()
    errors = sorted(abs(b - a - 0.01) * 1e3 for a, b in itertools.pairwise(times))
    timers = sorted(late)
    return (
        errors[len(errors) // 2],
        errors[len(errors) * 99 // 100],
        timers[len(timers) * 99 // 100] * 1e3,
        (limiter.counts.requests - requests) / count,
    )


async def keys(url: str, count: int) -> tuple[float, float, int]:
    """Distinct keys: acquires per second, bytes of this process per key remembered, and how many it remembers."""
    app = fastq.FastQ(url)
    limiter = app.limiter("keys", rate="10/s")
    await limiter.for_key("first").acquire()
    before, start = rss(), time.perf_counter()
    for first in range(0, count, 1_000):
        await asyncio.gather(*(limiter.for_key(f"user-{n}").acquire() for n in range(first, first + 1_000)))
    taken = time.perf_counter() - start
    gc.collect()
    kept = len(limiter._parts)
    grown = rss() - before
    await app.aclose()
    return count / taken, grown / kept, kept


def rss() -> int:
    """Bytes of this process that are in memory."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# -- the rival --------------------------------------------------------------------------------------------------------------


def rival_python() -> str | None:
    """An interpreter that rate-sync runs on."""
    for version in RIVAL_PYTHONS:
        places = [
            shutil.which(f"python{version}"),
            *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
        ]
        for place in filter(None, places):
            check = [str(place), "-c", f"import sys, venv; assert sys.version.startswith('{version}.')"]
            if subprocess.run(check, capture_output=True, check=False).returncode == 0:
                return str(place)
    return None


@contextmanager
def rival() -> Iterator[str | None]:
    """An interpreter with rate-sync in an environment of its own; None where there is none for it, or no index."""
    python = rival_python()
    with tempfile.TemporaryDirectory(prefix="fastq-") as folder:
        if python is None or subprocess.run([python, "-m", "venv", folder], check=False).returncode:
            yield None
            return
        own = f"{folder}/bin/python"
        install = [own, "-m", "pip", "install", "-q", "--disable-pip-version-check", RIVAL]
        yield own if subprocess.run(install, stderr=subprocess.DEVNULL, check=False).returncode == 0 else None


def rival_acquires(python: str, url: str, seconds: float = 2.0) -> float:
    """Its acquires per second, on the same server."""
    script = str(Path(__file__).with_name("rate_sync.py"))
    command = [python, script, url, str(seconds)]
    return max(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(ROUNDS))


# -- several processes ------------------------------------------------------------------------------------------------------


def use(redis: SyncConnection, url: str, rate: int, processes: int, seconds: float) -> Use:
    """Forks that acquire as fast as they can; judged by the instants that they wrote down."""
    redis.call(raw("FLUSHALL"))
    redis.call(raw("CONFIG", "RESETSTAT"))
    per_process = used(processes, url, {"rate": f"{rate}/s"}, seconds, tasks=3 if rate < 1_000 else 30)
    times = sorted(at for uses in per_process for at in uses)
    span = times[-1] - times[0]
    return Use(
        rate,
        processes,
        len(times),
        (len(times) - rate) / (rate * span),
        over_bucket(times, rate, rate),
        _scripts(redis) / span,
        min(map(len, per_process)),
    )


def _scripts(redis: SyncConnection) -> int:
    lines = redis.call(raw("INFO", "commandstats")).decode().splitlines()
    return sum(int(line.split("calls=")[1].split(",")[0]) for line in lines if line.startswith("cmdstat_evalsha:"))


# -- all of it --------------------------------------------------------------------------------------------------------------


def measure(key_count: int = 100_000, scale: float = 1.0) -> Figures:
    """One run. ``scale`` shortens what takes seconds."""
    logging.getLogger("fastq.limits").setLevel(logging.CRITICAL)
    with EmbeddedServer() as server, rival() as other:
        redis = SyncConnection(parse_url(server.url))
        info = dict(
            line.split(":", 1) for line in redis.call(raw("INFO", "server")).decode().splitlines() if ":" in line
        )
        named = "valkey" if "valkey_version" in info else "redis"
        fast = uvloop.run(acquires(server.url))
        theirs = rival_acquires(other, server.url) if other else None
        p50, p99, timer, requests = uvloop.run(pacing(server.url, round(500 * scale)))
        speed, size, kept = uvloop.run(keys(server.url, key_count))
        plan = [(10, 1, 6.0), (10, 4, 6.0), (1, 50, 8.0), (10_000, 1, 3.0), (10_000, 4, 3.0), (50_000, 4, 2.0)]
        return Figures(
            machine=f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.machine()}",
            server=f"{named.capitalize()} {info[f'{named}_version'].strip()}",
            grant_ns=grant_ns(),
            acquires_per_second=fast,
            rival_per_second=theirs,
            rival_python=_version(other) if other else None,
            round_trip_us=uvloop.run(round_trip(server.url)),
            pacing_p50_ms=p50,
            pacing_p99_ms=p99,
            timer_p99_ms=timer,
            pacing_requests=requests,
            keys_per_second=speed,
            bytes_per_key=size,
            keys_kept=kept,
            uses=[use(redis, server.url, rate, n, seconds * scale) for rate, n, seconds in plan],
        )


def _version(python: str) -> str:
    code = "import platform; print(platform.python_version())"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def report(f: Figures) -> str:
    """The table that `make bench-limits` prints."""
    rows = [
        ("a local grant, from Python", f"{f.grant_ns:.0f} ns"),
        ("await acquire(), tokens at hand", f"{f.acquires_per_second:,.0f}/s"),
        ("  an acquire that asks Redis, one by one", f"{f.round_trip_us:.0f} µs"),
    ]
    if f.rival_per_second is None:
        rows.append(("rate-sync 0.4.2", "not measured: needs Python 3.12 and a package index"))
    else:
        ratio = f.acquires_per_second / f.rival_per_second
        rows.append(("rate-sync 0.4.2, acquire on the same Redis", f"{f.rival_per_second:,.0f}/s ({f.rival_python})"))
        rows.append(("  ratio", f"{ratio:,.0f}"))
    rows += [
        ("pacing at 100/s, spacing error p50 / p99", f"{f.pacing_p50_ms:.2f} / {f.pacing_p99_ms:.2f} ms"),
        ("  a bare timer beside it, p99", f"{f.timer_p99_ms:.2f} ms"),
        ("  requests per grant", f"{f.pacing_requests:.2f}"),
        ("distinct keys, 1,000 at a time", f"{f.keys_per_second:,.0f}/s"),
        (f"  memory per key, {f.keys_kept:,} remembered", f"{f.bytes_per_key:,.0f} bytes"),
    ]
    for u in f.uses:
        name = f"{u.rate:,}/s, {u.processes} process{'es' if u.processes > 1 else ''}"
        over = "0 over" if u.excess <= 1e-6 else f"{u.excess:.2f} OVER"
        rows.append((name, f"{u.share:.1%} used, {over}, {u.requests_per_second:,.0f} requests/s, least {u.fewest:,}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"{f.machine}, {f.server}, one run", "", *(f"{name:<{width}}  {value}" for name, value in rows)])


def faults(f: Figures) -> list[str]:
    """What is worse than it may be; empty when all is well. Shares depend on a machine that has time for the processes."""
    checks = [
        (f.grant_ns <= 200, f"a local grant takes {f.grant_ns:.0f} ns, must be 200 or less"),
        (
            f.pacing_p99_ms <= 5 + f.timer_p99_ms,
            f"pacing is {f.pacing_p99_ms:.1f} ms off, must be 5 above a bare timer",
        ),
        (f.keys_kept <= 10_000, f"{f.keys_kept} keys are remembered, must be 10,000 or less"),
    ]
    if f.rival_per_second is not None:
        ratio = f.acquires_per_second / f.rival_per_second
        checks.append((ratio >= 100, f"acquire is {ratio:.0f} times as fast as rate-sync's, must be 100"))
    for u in f.uses:
        name, least = f"{u.rate:,}/s with {u.processes}", 0.95 if u.processes > 4 or u.rate > 10_000 else 0.98
        checks.append((u.excess <= 1e-6, f"{name}: {u.excess:.2f} units over"))
        checks.append((u.share >= least, f"{name}: {u.share:.1%} used, must be {least:.0%} or more"))
    return [message for holds, message in checks if not holds]
