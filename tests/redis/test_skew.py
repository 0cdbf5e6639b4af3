"""Two versions of one thing at once: signatures of tasks, a Redis that refuses for a while, an outbox (F-26, F-41, F-62)."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

import fastq
from fastq.job import JobState
from fastq.worker.trouble import Trouble
from tests.conftest import MakeServer, connect
from tests.redis.workshop import working


class OldOrder(msgspec.Struct):
    """As it was in the release before."""

    id: int
    note: str = ""


class NewOrder(msgspec.Struct):
    """A field more that must be there, one that must not."""

    id: int
    customer: str
    note: str = ""
    tags: list[str] = []


def shop_of(url: str, kind: type) -> tuple[fastq.FastQ, list[Any]]:
    app, ran = fastq.FastQ(url, concurrency=4), []

    async def ship(order: Any) -> None:
        ran.append(order)

    ship.__annotations__["order"] = kind
    app.task(ship, name="ship")
    return app, ran


async def test_an_argument_with_more_fields_than_the_worker_knows(redis_url: str) -> None:
    """F-41: a new producer and an old worker: what it does not know is left out, the rest is there."""
    producer, _ = shop_of(redis_url, NewOrder)
    worker, ran = shop_of(redis_url, OldOrder)
    async with working(worker) as shop:
        job = await producer.enqueue("ship", NewOrder(7, "bob", tags=["a"]))
        assert (await shop.ended(job)).state is JobState.SUCCESS
    assert ran == [OldOrder(7)]
    await producer.aclose()


async def test_an_argument_without_a_field_that_the_worker_needs(redis_url: str) -> None:
    """F-41: an old producer and a new worker: a dead letter that names the argument and the field; retries would not help."""
    producer, _ = shop_of(redis_url, OldOrder)
    worker, ran = shop_of(redis_url, NewOrder)
    async with working(worker) as shop:
        job = await producer.enqueue("ship", OldOrder(7))
        assert (await shop.ended(job)).state is JobState.FAILED
        (letter,) = await worker.dead.list()
        assert letter.reason == "arguments"
        assert "order" in letter.error_message
        assert "customer" in letter.error_message
        assert shop.counts("ship") == {"failed": 1}
    assert ran == []
    await producer.aclose()


async def test_redis_cannot_save(make_server: MakeServer, tmp_path: Path) -> None:
    """F-26: MISCONF. The caller is told what Redis said, the worker waits without spinning, and goes on when it is mended."""
    folder = tmp_path / "data"
    server = make_server(data_dir=folder, config={"save": "3600 1", "stop-writes-on-bgsave-error": "yes"})
    app, ran = shop_of(server.url, OldOrder)
    impatient = fastq.FastQ(server.url, enqueue_timeout=0.3)
    with connect(server.url) as raw:
        async with working(app) as shop:
            first = await app.enqueue("ship", OldOrder(1))
            assert (await shop.ended(first)).state is JobState.SUCCESS
            _fail_to_save(raw, folder)
            with pytest.raises(fastq.BrokerUnavailable, match="MISCONF"):
                await impatient.enqueue("ship", {"id": 2})
            assert await commands_a_second(raw) < 100, "it waits between two tries"
            raw.config_set("stop-writes-on-bgsave-error", "no")
            job = await app.enqueue("ship", OldOrder(3))
            assert (await shop.ended(job)).state is JobState.SUCCESS
    server.kill()  # it could not save now, either, and would take ten seconds to say so
    assert [order.id for order in ran] == [1, 3]
    await impatient.aclose()


async def commands_a_second(raw: Any) -> float:
    before, begun = raw.info("stats")["total_commands_processed"], time.monotonic()
    await asyncio.sleep(1.0)  # the second that is measured
    return float((raw.info("stats")["total_commands_processed"] - before) / (time.monotonic() - begun))


async def test_a_worker_that_spins_is_found(
    make_server: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug of F-26: no pause between two tries."""
    monkeypatch.setattr(Trouble, "goes_on", lambda *_: 0.0)
    folder = tmp_path / "data"
    server = make_server(data_dir=folder, config={"save": "3600 1", "stop-writes-on-bgsave-error": "yes"})
    app, _ = shop_of(server.url, OldOrder)
    with connect(server.url) as raw:
        async with working(app):
            _fail_to_save(raw, folder)
            assert await commands_a_second(raw) > 100
            raw.config_set("stop-writes-on-bgsave-error", "no")
    server.kill()


def _fail_to_save(raw: Any, folder: Path) -> None:
    """A background save that fails: the folder that the server stands in is gone (root may write anywhere else)."""
    shutil.rmtree(folder)
    raw.execute_command("BGSAVE")
    deadline = time.monotonic() + 10
    while raw.info("persistence")["rdb_last_bgsave_status"] != "err":
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- an outbox --------------------------------------------------------------------------------------------------------

ROWS = 400
RELAY = """
import os, sqlite3, sys, fastq
path, url, crash = sys.argv[1:]
app = fastq.FastQ(url)
rows = sqlite3.connect(path, isolation_level=None)
print("up", flush=True)
while True:
    for row, text in rows.execute("SELECT id, text FROM outbox WHERE sent = 0 ORDER BY id LIMIT 20").fetchall():
        app.options(job_id=f"outbox-{row}").enqueue_sync("note", text)
        if row == int(crash): os._exit(9)
        rows.execute("UPDATE outbox SET sent = 1 WHERE id = ?", (row,))
    if not rows.execute("SELECT 1 FROM outbox WHERE sent = 0").fetchone():
        print("done", flush=True)
"""


def relayed(url: str, folder: Path, program: str, kills: int) -> None:
    """Let a relay send all rows, while it is killed so often at random, and as often ends right behind an enqueue."""
    path = folder / "outbox.db"
    rows = sqlite3.connect(path, isolation_level=None)
    rows.execute("PRAGMA journal_mode=WAL")
    rows.execute("CREATE TABLE outbox (id INTEGER PRIMARY KEY, text TEXT, sent INTEGER DEFAULT 0)")
    rows.executemany("INSERT INTO outbox (text) VALUES (?)", [(f"t{n}",) for n in range(ROWS)])
    seed = random.SystemRandom().randrange(10**9)
    print("seed", seed)
    dice = random.Random(seed)
    for turn in range(2 * kills + 1):
        crash = rows.execute("SELECT min(id) + 3 FROM outbox WHERE sent = 0").fetchone()[0] if turn < kills else 0
        command = [sys.executable, "-c", program, str(path), url, str(crash)]
        relay = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert relay.stdout is not None
        assert relay.stdout.readline() == "up\n"
        if turn < kills:
            assert relay.wait() == 9
        elif turn < 2 * kills:
            time.sleep(dice.uniform(0.0, 0.05))
        else:
            assert relay.stdout.readline() == "done\n"
        relay.send_signal(signal.SIGKILL)
        relay.wait()
        relay.stdout.close()
    assert rows.execute("SELECT count(*) FROM outbox WHERE sent = 0").fetchone() == (0,)
    rows.close()


def test_a_relay_that_dies_between_enqueue_and_mark(redis_url: str, raw: Any, tmp_path: Path) -> None:
    """F-62: rows of a database become jobs, by a relay that is killed again and again: one job for each row, whatever it did.

    The row's id is the job's: a repeated call finds the job that is there.
    """
    relayed(redis_url, tmp_path, RELAY, kills=4)
    ready = [job.decode() for job in raw.lrange("fastq:{default}:ready:5", 0, -1)]
    assert sorted(ready) == sorted(f"outbox-{n}" for n in range(1, ROWS + 1))


def test_a_relay_that_gives_no_id_is_found(redis_url: str, raw: Any, tmp_path: Path) -> None:
    """The planted bug of F-62: the same rows with ids of our own."""
    careless = RELAY.replace('app.options(job_id=f"outbox-{row}")', "app")
    assert careless != RELAY
    relayed(redis_url, tmp_path, careless, kills=1)
    assert raw.llen("fastq:{default}:ready:5") > ROWS
