"""Whatever is written into any key, nobody ends of it: workers, scheduler, monitor, consumer and command line (A-10, A-18, F-38).

Everything that fastq keeps in Redis is made first, by using it. Then a foreign writer puts garbage into the values, one kind of
key at a time: bytes that are no msgpack, msgpack of another shape, huge numbers, names that are no names. What is asked: nobody
exits, nobody spins, every verb answers or says what is wrong in one line, and good jobs run, in the same queue.
GARBAGE_ROUNDS=20 looks longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastq
from fastq.cli.root import run
from fastq.job import Envelope, Extra, encode
from tests.chaos.jobs import tasks
from tests.chaos.test_fuzz import PIECES
from tests.conftest import eventually
from tests.process.fleet import PATIENCE, Fleet, free_port

ROUNDS = int(os.environ.get("GARBAGE_ROUNDS", "3"))

NUMBERS = [0, -1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), float("nan"), float("inf"), -float("inf"), 1e308]
GARBAGE = [
    *PIECES, b"", b"\x00", b"x" * 100_000, b"\x91" * 5_000, b"-1", b"1e400", b"nan", b"99999999999999999999", b"\xff\xfe\xfd", b"a|b|c|",
    "é\u2028\x1b[2J".encode(), b"a\r\nb", b"{q}:jobs", b"*", b"%s%n", *(encode(n) for n in NUMBERS if isinstance(n, int)),
    encode([]), encode({}), encode([[]] * 9), encode({"": None}), encode([None] * 20), encode(["x"] * 20), encode(2.5), encode({1: 2}),
    encode(Envelope(5, 1, "x" * 300, b"", -(2**62), 2**62)),
    *(
        encode(Envelope(5, 1, "quiet", encode(["k"]), now, attempt, extra))
        for now in (0, 2**62, -(2**62))
        for attempt in (0, -5, 2**60)
        for extra in (
            Extra(timeout=float("nan")), Extra(timeout=-1.0), Extra(timeout=1e300), Extra(max_attempts=-(2**40)), Extra(strays=2**62),
            Extra(max_attempts=2**62), Extra(expires_at=-(2**63)), Extra(result_ttl=float("nan")), Extra(result_ttl=-5.0),
            Extra(result_ttl=1e300), Extra(snoozes=2**62), Extra(due_at=2**62), Extra(takes=2**31), Extra(takes=-99), Extra(schedule="\x00"),
        )
    ),
]  # fmt: skip

VERBS = [
    "status", "status --json", "queues ls", "queues ls --json", "jobs ls default", "jobs ls default --state scheduled", "jobs ls default --state running",
    "jobs ls default --state parked", "jobs show nosuch", "dlq ls default", "dlq ls default --json", "dlq groups default", "cron ls",
    "cron ls --json", "cron history beat", "limits list", "limits list --json", "check", "check --json", "doctor", "explain nosuch", "batch", "top --json --count 1",
]  # fmt: skip


def populate(url: str) -> None:
    """Use everything once, so that every kind of key is there."""
    app = fastq.FastQ(url)
    app.include(tasks)

    async def use() -> None:
        with contextlib.suppress(fastq.FastQError):  # what others have spoilt may be in the way; nothing but that
            await everything()
        await app.aclose()

    async def everything() -> None:
        await tasks.tasks["quiet"].enqueue_many([(f"q{n}",) for n in range(20)])
        await app.options(delay=3_600).enqueue("quiet", "later")
        await app.options(unique=True).enqueue("quiet", "unique")
        await app.options(unique=60).enqueue("quiet", "for a while")
        await app.enqueue("deadly", "noway", "SIGNONE")
        await app.enqueue("charged", "step", "/")
        await app.enqueue("rated", "r")
        await app.enqueue("pooled", "p")
        flow = fastq.chain(tasks.tasks["piece"].s(1), tasks.tasks["piece"].si(2, 3_600))
        await flow.enqueue()
        await app.enqueue_batch("quiet", [("b1",), ("b2",)], on_complete=tasks.tasks["quiet"].si("done"))
        await app.schedule_interval("quiet", 0.5, name="beat", args=("tick",))
        await app.schedule("quiet", cron="0 4 * * *", name="nightly", args=("night",))

    asyncio.run(use())
    app.close()


def spoil(raw: Any, key: bytes, dice: random.Random) -> None:
    """Put garbage into a key, of its own type, beside and instead of what is there."""
    some = dice.choice(GARBAGE)
    name = dice.choice([some[:200], b"x%d" % dice.randrange(99), b"\xff\x00"])
    match raw.type(key):
        case b"hash":
            fields = [f for f in raw.hkeys(key) if not f.startswith(b"~")]
            raw.hset(key, dice.choice(fields) if fields and dice.random() < 0.7 else name, some)
        case b"list":
            dice.choice([raw.lpush, raw.rpush])(key, name)
        case b"set":
            raw.sadd(key, name)
        case b"zset":
            raw.zadd(key, {name: dice.choice([0, -1e18, 1e18, time.time() * 1_000, float("inf"), float("-inf")])})
        case b"string":
            raw.set(key, some, keepttl=True)
        case b"stream":
            raw.xadd(key, {name or b"x": some})


@pytest.mark.timeout(120 + 30 * ROUNDS)
def test_garbage_in_any_key_ends_nobody(
    make_fleet: Callable[..., Fleet],
    redis_url: str,
    raw: Any,
    dice: random.Random,
    figure: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Three processes live on what lies in Redis, and 23 verbs show it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTQ_REDIS_URL", redis_url)
    fleet = make_fleet(
        redis_url,
        workers=2,
        concurrency=20,
        unknown_task_ttl=0,
        metrics_port=free_port(),
        hang_timeout=10,
        job_log_lines=5,
    ).serving()
    fleet.until_logged("scheduler running")
    fleet.until_logged("monitor running")
    known = {role: fleet.pids(role) for role in ("worker", "scheduler", "monitor")}
    spoilt: set[bytes] = set()
    for turn in range(ROUNDS):
        populate(redis_url)
        for key in sorted(raw.scan_iter(count=1_000)):
            if key != b"fastq:schema" and not key.endswith(b":paused"):
                for _ in range(8):
                    spoil(raw, key, dice)
                spoilt.add(raw.type(key) + b" " + key.partition(b"}:")[2].partition(b":")[0])
        for verb in VERBS:
            code = run(verb.split())
            said = capfd.readouterr()
            assert code in (0, 1, 2, 5), (verb, code, said.err)
            assert "Traceback" not in said.err, (verb, said.err)
        assert fleet.get("/metrics")[0] == 200
        keys = [f"good{turn}.{n}" for n in range(50)]
        raw.delete("fastq:{default}:paused", "fastq:{default}:paused:tasks")
        for key in keys:  # by its own application: the tasks have been included by another one since
            fleet.enqueue("once", key, 0.0)
        fleet.until_done(keys)
    for role, pids in known.items():
        assert fleet.pids(role) == pids, f"a {role} has ended"
    assert fleet.logged("worker crashed") == fleet.logged("scheduler crashed") == fleet.logged("monitor crashed") == []
    figure(f"{ROUNDS} rounds, {len(spoilt)} kinds of keys spoilt, {len(VERBS)} verbs: nobody ended")
    raw.flushall()
    fleet.until_logged("worker lost its lease", 2)
    fleet.enqueue("once", "afterwards", 0.0)
    fleet.until_done(["afterwards"])
    eventually(lambda: not raw.exists("fastq:{default}:ready:5"), PATIENCE)
    assert fleet.stop() == 0


@pytest.mark.timeout(120)
def test_a_process_that_ends_of_garbage_is_found(
    make_fleet: Callable[..., Fleet], redis_url: str, raw: Any, dice: random.Random
) -> None:
    """The planted bug `leaky_decoder`: of the garbage that the test above writes, some ends a worker that lets errors out."""
    fleet = make_fleet(redis_url, workers=1, unknown_task_ttl=0).start(plant="leaky_decoder")
    fleet.until_serving(1)

    def spoilt() -> bool:
        raw.rpush("fastq:{default}:ready:5", "g")
        raw.hset("fastq:{default}:jobs", "g", "x")
        for _ in range(8):
            spoil(raw, b"fastq:{default}:jobs", dice)
        return bool(fleet.logged("worker exited"))

    eventually(spoilt, PATIENCE)
