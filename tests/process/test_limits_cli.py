"""``fastq limits``: what an operator sees of limiters, and what becomes of a change in the processes that use them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastq
from fastq.broker.command import raw
from fastq.broker.connection import SyncConnection
from fastq.broker.keys import QueueKeys
from fastq.broker.url import parse_url
from fastq.cli import root
from fastq.limits import FixedWindow, Rule, SlidingWindow, TokenBucket
from tests.conftest import eventually

Call = Callable[..., Any]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call("list")` is what `fastq limits list` prints; with --json: the value; an error: (status, text)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTQ_REDIS_URL", redis_url)

    def run(*arguments: str) -> Any:
        capsys.readouterr()
        code = root.run(["limits", *arguments])
        said = capsys.readouterr()
        if code:
            return code, said.err
        return json.loads(said.out) if "--json" in arguments else said.out

    return run


@pytest.fixture
def app(redis_url: str) -> Iterator[fastq.FastQ]:
    app = fastq.FastQ(redis_url)
    yield app
    app.close()


def row(text: str, name: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(name))


def test_the_list_knows_what_is_configured_and_what_was_used(app: fastq.FastQ, call: Call, tmp_path: Path) -> None:
    """Without the application's code."""
    assert call() == "no limiter yet\n"
    (tmp_path / "fastq.toml").write_text("[limiters.quota]\nlimit = 10\nevery = 'hour'\n")
    app.limiter("used", rate="5/m burst 3").sync.acquire()
    pool = app.limiter("pool", max_concurrent=2).sync
    pool.acquire()
    eventually(lambda: len(call("list").splitlines()) == 4)
    text = call()
    assert row(text, "used")[1:4] == ["5/m", "burst", "3"]
    assert row(text, "quota")[1:5] == ["10", "each", "hour", "10"]
    assert "1/2" in row(text, "pool")
    found = {info["id"]: info for info in call("--json")}
    assert found["used"]["limit"] == 3
    assert found["pool"]["holders"] == 1
    assert found["quota"]["remaining"] == 10
    pool.release()


def test_show_says_who_holds_slots(app: fastq.FastQ, call: Call) -> None:
    pool = app.limiter("pool", max_concurrent=3).sync
    pool.acquire()
    pool.for_key("tenant").acquire()
    eventually(lambda: call("list") != "no limiter yet\n")
    value = call("show", "pool", "--json")
    assert value["limiter"]["holders"] == 1
    (holder,) = value["holders"]
    assert holder["holder"].startswith(f"{socket.gethostname()[:10]}")
    assert f".{os.getpid()}." in holder["holder"]
    assert 10 < holder["lease"] <= 15
    text = call("show", "pool", "--key", "tenant")
    assert "1 of 3" in text
    assert holder["holder"] not in text
    assert "0 of 3" in call("show", "pool", "--key", "nobody")
    pool.release()
    pool.for_key("tenant").release()


def test_a_rule_that_is_set_is_in_force_in_the_processes_and_reset_lifts_it(app: fastq.FastQ, call: Call) -> None:
    limiter = app.limiter("api", algorithm="sliding_window", limit=3, window_seconds=60, max_concurrent=5)
    for _ in range(3):
        limiter.sync.acquire()
    assert not limiter.sync.try_acquire()
    eventually(lambda: call("list") != "no limiter yet\n")
    assert call("set", "api", "limit=100", "window_seconds=60").startswith("api: 100 in any 60 s, 5 at once, in force")
    eventually(limiter.sync.try_acquire)
    assert call("show", "api", "--json")["limiter"]["overridden"]
    assert "(overridden)" in call("list")
    assert call("set", "api", "max_concurrent=7", "--json") == {"id": "api", "rule": "100 in any 60 s, 7 at once"}
    assert call("reset", "api") == "api: as configured again\n"
    assert call("reset", "api") == "api: was as configured already\n"
    info = call("show", "api", "--json")["limiter"]
    assert (info["rule"], info["overridden"], info["remaining"]) == ("3 in any 60 s, 5 at once", False, 3)
    assert info["holders"] == 4, "slots stay with their holders"
    for _ in range(4):
        limiter.sync.release()


def test_a_penalty_stops_everybody(app: fastq.FastQ, call: Call) -> None:
    limiter = app.limiter("api", rate="1000/s").sync
    limiter.acquire()
    eventually(lambda: call("list") != "no limiter yet\n")
    assert call("penalize", "api", "30") == "api: nothing is granted for 30.0s, in no partition\n"
    eventually(lambda: not limiter.for_key("tenant").try_acquire())
    eventually(lambda: not limiter.try_acquire())
    assert call("show", "api", "--json")["limiter"]["penalty"] == pytest.approx(30, abs=3)
    assert call("penalize", "api", "1", "--json")["penalty"] > 20
    assert call("penalize", "api", "0") == "api: no penalty\n"
    eventually(limiter.try_acquire)
    call("penalize", "api", "60")
    call("reset", "api")
    eventually(limiter.try_acquire)
    call("penalize", "api", "60", "--key", "tenant")
    assert limiter.try_acquire()
    assert not limiter.for_key("tenant").try_acquire()


def test_parked_jobs_are_counted_by_queue(app: fastq.FastQ, call: Call, redis_url: str) -> None:
    app.limiter("api", rate="1/m").sync.acquire()
    eventually(lambda: call("list") != "no limiter yet\n")
    connection = SyncConnection(parse_url(redis_url))
    for queue, limits in (("mail", ["api/~all", "api/~all", "api/tenant"]), ("bulk", ["api/~all", "other/~all"])):
        q = QueueKeys("fastq", queue)
        connection.call(raw("SADD", "fastq:queues", queue))
        for n, limit in enumerate(limits):
            connection.call(raw("ZADD", q.parked, 1, limit))
            connection.call(raw("ZADD", q.parked_by(limit), n, f"job{n}"))
    connection.close()
    assert row(call(), "api")[-1] == "4"
    assert call("show", "api", "--json")["limiter"]["parked"] == {"bulk": 1, "mail": 3}
    assert call("show", "api", "--key", "tenant", "--json")["limiter"]["parked"] == {"mail": 1}
    assert "3 jobs" in call("show", "api")


def test_the_limiters_of_an_application(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "limited_app.py").write_text(
        "import fastq\napp = fastq.FastQ()\napp.limiter('in_code', rate='100/s burst 200')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert row(call("--app", "limited_app:app"), "in_code")[1:4] == ["100/s", "burst", "200"]
    assert call("show", "in_code")[0] == 1


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("show ap", 1, "no limiter 'ap' - did you mean 'api'?"),
        ("set api rate", 2, "write OPTION=VALUE"),
        ("set api rte=5/s", 2, "did you mean 'rate'?"),
        ("set api rate=5/x", 2, "cannot be read"),
        ("set api", 2, "OPTION=VALUE"),
        ("penalize api -1", 2, "-1"),
        ("penalize api soon", 2, "soon"),
        ("show api --key " + "x" * 201, 2, "200 characters"),
    ],
)
def test_mistakes_are_named(app: fastq.FastQ, call: Call, tmp_path: Path, line: str, status: int, words: str) -> None:
    (tmp_path / "fastq.toml").write_text("[limiters.api]\nrate = '5/s'\n")
    code, text = call(*line.split())
    assert words in text
    assert code == status


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule(TokenBucket(100)), "100/s"),
        (Rule(TokenBucket(100, 200)), "100/s burst 200"),
        (Rule(TokenBucket(5_000 / 3_600)), "5000/h"),
        (Rule(TokenBucket(0.1)), "6/m"),
        (Rule(TokenBucket(2.5)), "150/m"),
        (Rule(SlidingWindow(5_000, 3_600)), "5000 in any 3600 s"),
        (Rule(FixedWindow(10, "day", "Europe/Berlin"), 7), "10 each day (Europe/Berlin), 7 at once"),
        (Rule(FixedWindow(10, 90.0)), "10 each 90 s"),
        (Rule(None, 3), "3 at once"),
    ],
)
def test_a_rule_in_words(rule: Rule, words: str) -> None:
    assert str(rule) == words
