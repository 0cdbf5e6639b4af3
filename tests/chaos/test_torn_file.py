"""The append-only file ends anywhere (F-19): what a power failure leaves. Every cut is a state in which nothing is lost half-way.

A script reaches the file as one transaction, and a server drops an unfinished one when it loads the file. So each cut must look
like a moment between two calls: `fastq check` finds nothing. The planted bug sends the same steps as commands of their own,
and the first of its cuts is where the last of these steps begins: whether chance finds another one is not what is asked.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastq.broker import commands, timing
from fastq.broker.command import Command
from fastq.broker.commands import NewJob, Once, Parked
from fastq.broker.embedded import EmbeddedServer
from fastq.broker.keys import PAD
from tests.conftest import MakeServer, connect
from tests.redis.lab import Lab, envelope
from tests.sound import checked

CUTS = int(os.environ.get("CHAOS_CUTS", "60"))
"""Offsets at which the file is cut; each costs the start of a server. `make chaos` takes more."""

STEPS = int(os.environ.get("CHAOS_STEPS", "400"))

Figure = Callable[[str], None]


class History:
    """A queue in which everything happens, at random, and the ids that are in it."""

    def __init__(self, lab: Lab, dice: random.Random) -> None:
        self.lab = lab
        self.dice = dice
        self.serial = 0
        self.held: dict[str, set[str]] = {}

    def fresh(self) -> str:
        self.serial += 1
        return f"job-{self.serial}"

    def write(self, steps: int) -> None:
        moves = [self.enqueue, self.enqueue, self.unique, self.reserve, self.reserve, self.settle, self.settle, self.park,
                 self.unpark, self.recover, self.cancel, self.promote, self.replay, self.fire, self.purge]  # fmt: skip
        for _ in range(steps):
            self.dice.choice(moves)()

    def worker(self) -> str:
        name = self.dice.choice("uvw")
        if name not in self.held:
            self.lab.register(name)
            self.held[name] = set()
        return name

    def some(self, ids: set[str]) -> list[str]:
        return self.dice.sample(sorted(ids), min(len(ids), self.dice.randrange(4)))

    def call(self, command: Command[Any]) -> Any:
        return self.lab.call(command)

    def enqueue(self) -> None:
        delay = self.dice.choice((0, 1, 100_000))
        self.lab.enqueue(
            *(NewJob(self.fresh(), envelope(), delay, chosen=True) for _ in range(self.dice.randrange(1, 9)))
        )

    def unique(self) -> None:
        self.lab.enqueue(
            NewJob(
                self.fresh(),
                envelope(),
                0,
                f"key-{self.dice.randrange(9)}",
                True,
                Once(self.dice.choice(("executed", "started"))),
            )
        )

    def reserve(self) -> None:
        worker = self.worker()
        self.held[worker].update(i.decode() for i in self.lab.reserve(self.dice.randrange(1, 9), worker).ids)

    def settle(self) -> None:
        worker = self.worker()
        ids = self.some(self.held[worker])
        rows: dict[str, list[Any]] = {name: [] for name in ("succeeded", "recorded", "later", "failed", "released")}
        for job_id in ids:
            kind = self.dice.choice(sorted(rows))
            bucket = "3600000:1", self.lab.started + 3_600_000
            rows[kind].append(
                {"recorded": (*bucket, job_id, b"record"), "later": (job_id, self.dice.choice((0, 1)), envelope()),
                 "failed": (job_id, envelope(), b"error")}.get(kind, job_id)
            )  # fmt: skip
        self.call(self.lab.settle_command(worker, **rows))
        self.held[worker] -= set(ids)

    def park(self) -> None:
        worker = self.worker()
        if ids := self.some(self.held[worker]):
            self.call(commands.park(self.lab.q, worker, [Parked(i, "x/~all", 1, 1_000) for i in ids]))
            self.held[worker] -= set(ids)

    def unpark(self) -> None:
        worker = self.worker()
        self.held[worker].update(
            i.decode() for i in self.call(commands.unpark(self.lab.q, worker, "x/~all", 3, 1_000)).ids
        )

    def recover(self) -> None:
        worker = self.worker()
        if self.lab.recover(worker, charge="all", max_deliveries=2, limit=self.dice.choice((2, 100))).remaining == 0:
            del self.held[worker]
        else:
            self.held[worker] = {i.decode() for i in self.lab.raw.smembers(self.lab.q.running(worker))} - {PAD}

    def cancel(self) -> None:
        job_id = f"job-{self.dice.randrange(1, self.serial + 2)}"
        self.call(commands.cancel(self.lab.q, job_id, sorted(self.held), b"", 0))

    def promote(self) -> None:
        self.call(commands.promote(self.lab.q, 5))

    def replay(self) -> None:
        dead = self.lab.raw.zrange(self.lab.q.dead, 0, 2)
        self.call(commands.replay(self.lab.q, [(i.decode(), envelope()) for i in dead]))

    def fire(self) -> None:
        self.serial += 1
        self.call(timing.schedule(self.lab.q, "tick", b"", b"d", begin=False, most=9))
        self.call(timing.fire(self.lab.q, 5, "tick", self.lab.now() + self.serial, self.fresh(), envelope(), b"d"))

    def purge(self) -> None:
        if self.dice.random() < 0.2:
            self.call(commands.purge(self.lab.q, 20))


class AsCommands(History):
    """The planted bug (`pipeline_not_script`): enqueue and settle take their steps one by one."""

    def write(self, steps: int) -> None:
        super().write(steps)
        self.enqueue()  # the last RPUSH of the file is a step of its own

    def enqueue(self) -> None:
        with self.lab.raw.pipeline(transaction=False) as pipe:
            for _ in range(4):
                job_id = self.fresh()
                pipe.hset(self.lab.q.jobs, job_id, envelope())
                pipe.rpush(self.lab.q.ready[5], job_id)
            pipe.execute()

    def settle(self) -> None:
        worker = self.worker()
        ids = self.some(self.held[worker])
        with self.lab.raw.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.srem(self.lab.q.running(worker), job_id)
                pipe.hdel(self.lab.q.jobs, job_id)
                pipe.hdel(self.lab.q.deliveries, job_id)
            pipe.execute()
        self.held[worker] -= set(ids)


def written(make_server: MakeServer, dice: random.Random, history: type[History], steps: int) -> Path:
    """The folder of an append-only file in which a history is written."""
    server = make_server(appendonly=True, config={"appendfsync": "everysec", "auto-aof-rewrite-percentage": "0"})
    with connect(server.url) as raw:
        raw.sadd("fastq:queues", "default")
        lab = Lab(server.url, raw)
        history(lab, dice).write(steps)
        lab.conn.close()
    folder = server.data_dir
    server.kill()
    return folder


def cuts(
    folder: Path, home: Path, dice: random.Random, count: int, before: bytes
) -> Iterator[tuple[int, EmbeddedServer]]:
    """Servers that were started on the file cut at a random offset; the first one where the word ``before`` is last, if any."""
    (file,) = folder.glob("appendonlydir/*.incr.aof")
    data = file.read_bytes()
    offsets = [dice.randrange(len(data) // 20, len(data)) for _ in range(count)]
    if before:
        offsets[0] = data.rindex(before)
    for number, offset in enumerate(offsets):
        torn = home / f"cut{number}"
        shutil.copytree(folder / "appendonlydir", torn / "appendonlydir")
        (torn / "appendonlydir" / file.name).write_bytes(data[:offset])
        server = EmbeddedServer(data_dir=torn, appendonly=True, config={"aof-load-truncated": "yes"})
        try:
            yield offset, server.start()
        finally:
            server.kill()
            server.stop()
            shutil.rmtree(torn)


def faults_of_cuts(
    make_server: MakeServer,
    home: Path,
    dice: random.Random,
    history: type[History],
    *,
    count: int,
    steps: int,
    before: bytes = b"",
) -> dict[int, list[str]]:
    torn = cuts(written(make_server, dice, history, steps), home, dice, count, before)
    return {offset: [str(f) for f in checked(server.url).faults] for offset, server in torn}


@pytest.mark.timeout(60 + CUTS)
def test_a_cut_file_is_a_moment_between_two_calls(
    make_server: MakeServer, tmp_path: Path, dice: random.Random, figure: Figure
) -> None:
    """Finding 5 of FAULTS: 0 inconsistent states, whatever the offset; nothing that `fastq check` would have to repair."""
    found = faults_of_cuts(make_server, tmp_path, dice, History, count=CUTS, steps=STEPS)
    torn = {offset: faults for offset, faults in found.items() if faults}
    figure(f"append-only file cut at {len(found)} offsets up to {max(found):,}: {len(torn)} inconsistent")
    assert torn == {}


def test_steps_in_commands_of_their_own_are_found(
    make_server: MakeServer, tmp_path: Path, dice: random.Random, figure: Figure
) -> None:
    """The planted bug `pipeline_not_script` turns the test above red."""
    found = faults_of_cuts(make_server, tmp_path, dice, AsCommands, count=12, steps=150, before=b"RPUSH")
    torn = {offset: faults for offset, faults in found.items() if faults}
    figure(f"pipelines instead of scripts: {len(torn)} of {len(found)} cuts inconsistent")
    assert torn
