"""The application of test_isolation.py: isolated handlers that do everything a handler must not do."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import subprocess
import threading
import time

import fastq

app = fastq.FastQ()
if os.environ.get("THREADS_AT_IMPORT"):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()


@app.task
async def good(n: int) -> int:
    await asyncio.sleep(0.001)
    return n


@app.task(isolation="process")
def isolated(n: int) -> int:
    return n


@app.task(isolation="process")
async def isolated_async(n: int, job: fastq.JobContext) -> list[object]:
    await asyncio.sleep(0.001)
    return [n, job.attempt, job.task, app.job().id == job.id]


@app.task(isolation="process")
def who() -> tuple[int, int]:
    return os.getpid(), os.getppid()


@app.task(isolation="process", max_attempts=2, retry=0)
def crash(how: str) -> None:
    if how == "segfault":
        ctypes.string_at(0)
    elif how == "exit":
        os._exit(0)
    elif how == "abort":
        os.abort()
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(isolation="process", max_memory="300MB", max_attempts=2, retry=0)
def hog(mib: int) -> int:
    return len(bytearray(mib << 20))


@app.task(isolation="process", timeout=0.5, max_attempts=1)
def endless_c() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")


@app.task(isolation="process", timeout=0.5, max_attempts=1)
async def swallows() -> None:
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass


@app.task(isolation="process", soft_timeout=0.2, timeout=30, max_attempts=1)
def soft(how: str) -> str:
    try:
        time.sleep(60)
    except fastq.SoftTimeLimitExceeded:
        if how == "raise":
            raise
    return "tidy"


@app.task(isolation="process", soft_timeout=0.2, timeout=30, max_attempts=1)
async def soft_async() -> str:
    try:
        await asyncio.sleep(60)
    except fastq.SoftTimeLimitExceeded:
        return "tidy"
    return "?"


class MyError(Exception):
    pass


@app.task(isolation="process", max_attempts=3, retry=0, never_on=MyError)
def raises(how: str, job: fastq.JobContext) -> int:
    if how == "mine":
        raise MyError("never again")
    if how == "fail":
        raise fastq.Fail("no")
    if how == "retry" and job.attempt < 3:
        raise fastq.Retry(delay=0)
    if how == "snooze" and not job.extra.snoozes:
        job.snooze(0)
    if how == "unkept":
        return object()  # type: ignore[return-value]
    return job.attempt


@app.task(isolation="process", timeout=60)
def waits(path: str) -> str:
    """Starts a process of its own, says who they are, and looks whether it is to stop."""
    child = subprocess.Popen(["sleep", "600"])
    with open(path, "w") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    job = app.job()
    while not job.cancelled:
        time.sleep(0.005)
    child.kill()
    child.wait()
    raise RuntimeError("was told")


@app.task(isolation="process")
def tells(path: str, job: fastq.JobContext) -> str:
    job.progress(3, 10, message="reading")
    job.log.info("chapter one")
    while not os.path.exists(path):
        time.sleep(0.005)
    return "told"
