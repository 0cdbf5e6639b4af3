"""examples/web: FastAPI, Flask and Django under the servers that people run them with, and a worker beside them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeServer, eventually

FOLDER = Path(__file__).parents[2] / "examples" / "web"
GUNICORN = (
    "-m",
    "gunicorn",
    "--fd",
    "{fd}",
    "--workers",
    "2",
    "--threads",
    "4",
    "--worker-tmp-dir",
    "{tmp}",
    "--no-control-socket",
)
SERVERS = {
    "fastapi": ("-m", "uvicorn", "--fd", "{fd}", "with_fastapi:web"),
    "flask": (*GUNICORN, "--preload", "with_flask:web"),
    "django": (*GUNICORN, "with_django:web"),
}


@contextlib.contextmanager
def program(url: str, *words: str, keep: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """Python with these words, in the folder of the examples; ended by SIGTERM, as an init system does it."""
    environ = {**os.environ, "FASTQ_REDIS_URL": url, "FASTQ_METRICS_PORT": "0", "PYTHONPATH": str(FOLDER)}
    with subprocess.Popen([sys.executable, *words], cwd=FOLDER, env=environ, pass_fds=keep) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) in (0, -signal.SIGTERM)


@contextlib.contextmanager
def served(kind: str, url: str, tmp: Path) -> Iterator[str]:
    """The URL of an example under its server, which is given a socket that listens already."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        words = [word.format(fd=fd, tmp=tmp) for word in SERVERS[kind]]
        if kind != "fastapi":  # gunicorn takes it as an address
            words[words.index("--fd") : words.index("--fd") + 2] = ["--bind", f"fd://{fd}"]
        with program(url, *words, keep=(fd,)):
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def ask(url: str, *, post: bool = False) -> tuple[int, Any]:
    request = urllib.request.Request(url, method="POST" if post else "GET")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.mark.parametrize("kind", SERVERS)
def test_requests_become_jobs_that_run(kind: str, redis_url: str, tmp_path: Path) -> None:
    """Two dozen at a time over all processes and threads of the server: each is stored, runs once, and can be asked for."""
    with (
        program(redis_url, "-m", "fastq", "worker", "shop:app", "--queues", "emails"),
        served(kind, redis_url, tmp_path) as site,
    ):

        def order(number: int) -> tuple[int, Any]:
            return ask(f"{site}/orders/{number}/receipt?to=ann", post=True)

        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(order, range(60)))
        assert {code for code, _ in answers} == {202}
        ids = [body["job"] for _, body in answers]
        assert len(set(ids)) == 60
        for number, job_id in enumerate(ids):
            status = eventually(
                lambda job_id=job_id: (s := ask(f"{site}/jobs/{job_id}")[1])["status"] == "success" and s
            )
            assert (status["result"], status["attempts"]) == (f"receipt {number} for ann", 1)
        assert ask(f"{site}/jobs/nobody")[0] == 404


@pytest.mark.parametrize("kind", SERVERS)
def test_without_redis_a_request_is_told_to_come_again(kind: str, make_server: MakeServer, tmp_path: Path) -> None:
    redis = make_server()
    with served(kind, redis.url, tmp_path) as site:
        assert ask(f"{site}/orders/1/receipt?to=ann", post=True)[0] == 202
        redis.kill()
        assert ask(f"{site}/orders/2/receipt?to=ann", post=True)[0] == 503
        redis.start()
        assert eventually(lambda: ask(f"{site}/orders/3/receipt?to=ann", post=True)[0] == 202)
