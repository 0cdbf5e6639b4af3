"""What the examples play on: a third party with a quota, worker processes, a Redis. No pattern is in here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).resolve().parent
os.environ.setdefault("FASTQ_LIMITS", str(HERE / "rate-sync.toml"))


# -- the third party ----------------------------------------------------------------------------------------------------


class TooManyRequests(Exception):
    """The API said 429: come back in ``retry_after`` seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"429, retry after {retry_after} s")
        self.retry_after = retry_after


class Api:
    """An HTTP server that lets ``limit`` requests through in any ``window`` seconds, refuses the others and remembers all.

    ``seconds``: how long it works on one. ``broken``: so many requests are answered with 500 first. ``retry_after``: what
    it tells those whom it refuses.
    """

    def __init__(
        self,
        limit: int = 1_000_000,
        window: float = 1.0,
        *,
        seconds: float = 0.0,
        broken: int = 0,
        retry_after: float = 1.0,
    ) -> None:
        self.limit = limit
        self.window = window
        self.seconds = seconds
        self.broken = broken
        self.retry_after = retry_after
        self.accepted: list[float] = []
        self.refused: list[float] = []
        self.bodies: list[Any] = []
        self.inside = self.most_inside = 0
        self.url = ""
        self._recent: deque[float] = deque()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    def use_up(self) -> None:
        """Somebody else, whom no limiter of ours knows, uses the whole quota."""
        self._recent.extend([time.monotonic()] * self.limit)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = head.partition("content-length:")[2].partition("\r\n")[0]
            body = await reader.readexactly(int(length or 0))
            status, headers = await self._answer(body)
            writer.write(f"HTTP/1.1 {status}\r\n{headers}connection: close\r\ncontent-length: 2\r\n\r\n{{}}".encode())
            await writer.drain()
        writer.close()

    async def _answer(self, body: bytes) -> tuple[str, str]:
        now = time.monotonic()
        while self._recent and self._recent[0] <= now - self.window:
            self._recent.popleft()
        if len(self._recent) >= self.limit:
            self.refused.append(now)
            return "429 Too Many Requests", f"retry-after: {self.retry_after}\r\n"
        self._recent.append(now)
        self.accepted.append(now)
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.inside -= 1
        if len(self.accepted) <= self.broken:
            return "500 Internal Server Error", ""
        self.bodies.append(json.loads(body or b"null"))
        return "200 OK", ""

    def facts(self) -> dict[str, Any]:
        """For the reader, and for the test."""
        return {
            "limit": self.limit,
            "window": self.window,
            "accepted": self.accepted,
            "refused": self.refused,
            "bodies": self.bodies,
            "most_inside": self.most_inside,
        }


async def post(url: str, body: Any = None) -> None:
    """Call the API. Raises TooManyRequests, or RuntimeError for another refusal."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"POST / HTTP/1.1\r\nhost: %b\r\ncontent-length: %d\r\n\r\n%b" % (host.encode(), len(data), data))
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    finally:
        writer.close()
    status = int(head.split(" ", 2)[1])
    if status == 429:
        raise TooManyRequests(float(head.partition("retry-after:")[2].partition("\r\n")[0]))
    if status >= 400:
        raise RuntimeError(f"the API answered {status}")


def post_blocking(url: str, body: Any = None) -> None:
    """The same from blocking code."""
    try:
        urllib.request.urlopen(url, json.dumps(body).encode(), timeout=30).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 429:
            raise TooManyRequests(float(error.headers["retry-after"])) from None
        raise RuntimeError(f"the API answered {error.code}") from None


# -- Redis and processes ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def redis(**environ: object) -> Iterator[None]:
    """The Redis of FASTQ_REDIS_URL; a private one without it. ``environ`` is for this process and those it starts."""
    from fastq.broker.embedded import EmbeddedServer

    os.environ.update({name: str(value) for name, value in environ.items()})
    with contextlib.ExitStack() as stack:
        if os.environ.get("FASTQ_REDIS_URL", "memory://") == "memory://":
            os.environ["FASTQ_REDIS_URL"] = stack.enter_context(EmbeddedServer()).url
        yield


@contextlib.asynccontextmanager
async def workers(app: str, count: int = 2) -> AsyncIterator[None]:
    """``fastq supervise app --workers count``, from here to the end of the block."""
    command = [sys.executable, "-m", "fastq", "supervise", app, "--workers", str(count)]
    command += ["--grace", "2", "--metrics-port", "0", "--log-level", "error"]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    process = await asyncio.create_subprocess_exec(
        *command, cwd=HERE, env=os.environ | {"PYTHONPATH": path}, stdout=sys.stderr, start_new_session=True
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), 20)
        except TimeoutError:
            process.kill()
            await process.wait()


async def ended(jobs: list[Any], seconds: float = 60.0) -> dict[str, int]:
    """Wait until all jobs are final; how many ended in which state, and in all how many attempts were charged."""
    deadline, states = time.monotonic() + seconds, {"attempts": 0}
    for job in jobs:
        while not (status := await job.status()).state.final:
            if time.monotonic() > deadline:
                raise SystemExit(f"{job} does not get on: {status}")
            await asyncio.sleep(0.02)
        states[status.state.value] = states.get(status.state.value, 0) + 1
        states["attempts"] += status.attempts
    return states


async def until(fact: Callable[[], bool]) -> None:
    while not fact():  # noqa: ASYNC110 - whatever the fact is
        await asyncio.sleep(0.002)


async def together(script: str, count: int) -> list[str]:
    """Run ``script worker`` in ``count`` processes, which begin at the same moment; the last line that each of them prints."""

    def start() -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen([sys.executable, script, "worker"], text=True, **pipes)

    def ready(process: subprocess.Popen[str]) -> bool:
        assert process.stdout is not None
        return process.stdout.readline() == "ready\n"

    processes = [start() for _ in range(count)]
    started = [await asyncio.to_thread(ready, process) for process in processes]
    begin = f"{time.time() + 0.3}\n"
    said = await asyncio.gather(*(asyncio.to_thread(process.communicate, begin) for process in processes))
    if not all(started):
        raise SystemExit("a process did not start")
    return [out.splitlines()[-1] for out, _ in said]


def begin() -> float:
    """In a process of :func:`together`: wait until all are ready; the time at which they begin."""
    print("ready", flush=True)
    return float(sys.stdin.readline())


def show(facts: Mapping[str, Any]) -> None:
    """Print what happened: a line for each fact, or all in one line of JSON with ``--json``."""
    if "--json" in sys.argv:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        seen = in_words(value) if isinstance(value, dict) and "accepted" in value else value
        print(f"{name:<12} {seen}")


def in_words(api: Mapping[str, Any]) -> str:
    most = most_in_a_window(api["accepted"], api["window"])
    return (
        f"{len(api['accepted'])} requests, {len(api['refused'])} refused, at most {most} in {api['window']} s "
        f"(limit {api['limit']}), at most {api['most_inside']} at once"
    )


def most_in_a_window(times: list[float], window: float) -> int:
    """Of all spans of that length, the one with the most."""
    most, first = 0, 0
    for n, at in enumerate(sorted(times)):
        while times[first] <= at - window:
            first += 1
        most = max(most, n - first + 1)
    return most
