"""Whatever lies in Redis, no worker ends of it: mutated envelopes, bombs, foreign producers (F-38, F-39, A-01, A-02).

A mutation is cheap, so the numbers are large: FUZZ_IN_PROCESS mutations meet the decoders themselves, FUZZ_THROUGH_WORKERS go
through a live fleet. `make chaos` takes 1,000,000 and 10,000.
"""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from fastq import job
from fastq.errors import UndecodableJob
from tests.conftest import eventually
from tests.process.fleet import PATIENCE, Fleet
from tests.sound import assert_sound

IN_PROCESS = int(os.environ.get("FUZZ_IN_PROCESS", "100000"))
THROUGH_WORKERS = int(os.environ.get("FUZZ_THROUGH_WORKERS", "400"))

Figure = Callable[[str], None]

EXTRA = job.Extra(
    timeout=3.0, max_attempts=2, expires_at=2**50, due_at=2**40, error="no", schedule="s", replayed_from=7
)
SEEDS = [
    job.encode(job.Envelope(5, 1, "quiet", job.encode(["a key"]), 1_700_000_000_000)),
    job.encode(job.Envelope(10, 1, "quiet", job.encode({"key": "k", "seconds": 0.0}), 1_700_000_000_000, 3, EXTRA)),
    job.encode(job.Envelope(0, 1, "quiet", job.encode([["deep", {"er": [1, 2.5, None, True]}]]), 0)),
]
PIECES = [
    b"\xc1", b"\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff", b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00", b"\xa2\xff\xfe", b"\xc0", b"\x90", b"\x80",
    b"\xd6\xff\x00\x00\x00\x00", b"\xc7\x08\x05" + b"x" * 8, b"\x91" * 40,
]  # fmt: skip
"""What msgpack cannot be, or should not: lengths of 4 GiB, NaN, 2**64 - 1, bad UTF-8, extensions, nesting."""


def mutated(dice: random.Random) -> bytes:
    """One of the seeds after one to four accidents."""
    data = bytearray(dice.choice(SEEDS))
    for _ in range(dice.randrange(1, 5)):
        where = dice.randrange(len(data) + 1)
        match dice.randrange(5):
            case 0 if data:
                data[where % len(data)] ^= 1 << dice.randrange(8)
            case 1:
                del data[where : where + dice.randrange(1, 6)]
            case 2:
                data[where:where] = dice.choice(PIECES)
            case 3 if data:
                data[where % len(data)] = dice.randrange(256)
            case _:
                data[where : where + 2] = dice.choice(PIECES)
    return bytes(data)


BOMBS = {
    "an array of 2**32 things": b"\x97\x05\x01\xa4once\xdd\xff\xff\xff\xff",
    "nested 100,000 deep": b"\x91" * 100_000,
    "a body of a million nils": job.encode(
        job.Envelope(5, 1, "once", b"\xdd\x00\x0f\x42\x40" + b"\xc0" * 1_000_000, 0)
    ),
    "a body nested 100,000 deep": job.encode(job.Envelope(5, 1, "once", b"\x91" * 100_000, 0)),
    "a body of empty maps": job.encode(job.Envelope(5, 1, "once", b"\xdc\xff\xff" + b"\x80" * 65_535, 0)),
    "a body with one key a thousand times": job.encode(
        job.Envelope(5, 1, "once", b"\xde\x03\xe8" + (b"\xa3key" + b"\xa1x") * 1_000, 0)
    ),
    "an integer for a name": b"\x96\x05\x01\xcf" + b"\xff" * 8 + b"\xc4\x01\x90\x00\x00",
    "a name of 1 MB": job.encode(job.Envelope(5, 1, "x" * 1_000_000, b"\x90", 0)),
    "nothing": b"",
    "a priority that is none": b"\x96\xff\x01\xa4once\xc4\x01\x90\x00\x00",
}


def test_a_decoder_raises_one_error_whatever_it_reads(dice: random.Random, figure: Figure) -> None:
    """F-38: an envelope is read or refused with UndecodableJob; records and errors of dead letters likewise."""
    refused = 0
    for _ in range(IN_PROCESS):
        data = mutated(dice)
        try:
            envelope = job.decode_envelope(data)
        except UndecodableJob:
            refused += 1
        else:
            assert isinstance(envelope.body, bytes)
        assert 0 <= job.priority_of(data) <= 10
        job.decode_error(data)
    figure(f"{IN_PROCESS:,} mutated envelopes in process: {refused:,} refused, no other error")
    assert 0 < refused < IN_PROCESS


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_small(name: str) -> None:
    """A-10: what claims to be huge costs no more than what it is."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    readable(BOMBS[name])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000, "KiB"


def write(raw: Any, entries: dict[bytes, bytes]) -> None:
    """As a foreign producer does: the hash and the list, no script, no queue announced."""
    with raw.pipeline(transaction=True) as pipe:
        for job_id, data in entries.items():
            pipe.hset("fastq:{default}:jobs", job_id, data)
            pipe.rpush("fastq:{default}:ready:5", job_id)
        pipe.execute()


def left(raw: Any) -> set[bytes]:
    return {name for name in raw.hkeys("fastq:{default}:jobs") if not name.startswith(b"~")}


@pytest.mark.timeout(60 + THROUGH_WORKERS // 20)
def test_no_worker_ends_of_what_it_reads(
    make_fleet: Callable[..., Fleet], redis_url: str, raw: Any, dice: random.Random, figure: Figure
) -> None:
    """F-38, F-39: foreign producers write mutations and bombs among good jobs; nobody exits, what is bad is a dead letter."""
    fleet = make_fleet(redis_url, workers=2, concurrency=20, unknown_task_ttl=0).serving()
    known = set(fleet.workers())
    bad = {b"fuzz-%d" % n: mutated(dice) for n in range(THROUGH_WORKERS)}
    bad |= {b"bomb-%d" % n: bomb for n, bomb in enumerate(BOMBS.values()) if bomb}
    good = [f"k{n}" for n in range(100)]
    names = list(bad)
    for start in range(0, len(names), 100):
        write(raw, {name: bad[name] for name in names[start : start + 100]})
        fleet.enqueue_many("once", ((key, 0.0) for key in good[start : start + 10]))
    fleet.enqueue_many("once", ((key, 0.0) for key in good))
    fleet.until_done(good)
    eventually(lambda: not left(raw), PATIENCE)
    dead = {name.decode() for name in raw.zrange("fastq:{default}:dead", 0, -1)}
    reasons = [job.decode_error(data).reason for data in raw.hvals("fastq:{default}:dead:errors")]
    figure(
        f"{len(bad):,} foreign jobs through 2 workers: {len(dead):,} dead letters "
        f"({', '.join(f'{reasons.count(r):,} {r}' for r in sorted(set(reasons)))}), 0 exits"
    )
    unreadable = {name.decode() for name, data in bad.items() if not readable(data)}
    assert unreadable <= dead, "every envelope that cannot be read is a dead letter"
    assert "" not in reasons
    assert len(dead) > len(bad) // 2
    assert set(fleet.workers()) == known
    assert fleet.logged("worker exited") == fleet.logged("worker lost its lease") == []
    assert_sound(redis_url)
    assert fleet.stop() == 0


def readable(data: bytes) -> bool:
    try:
        job.decode_envelope(data)
    except UndecodableJob:
        return False
    return True


def test_ids_that_are_no_ids(make_fleet: Callable[..., Fleet], redis_url: str, raw: Any) -> None:
    """A-18: a foreign producer's job id may be any bytes: the worker neither ends nor spins, and its neighbours run."""
    fleet = make_fleet(redis_url, workers=1, concurrency=20).serving()
    seed = SEEDS[0]
    odd = [b"\xff\xfe", b"{q}:jobs", b"a\r\nb", b"\x00", "ï".encode(), b"x" * 5_000, b"%s%n", b"id with spaces"]
    write(raw, dict.fromkeys(odd, seed))
    fleet.enqueue_many("once", [("after", 0.0)])
    fleet.until_done(["after"])
    eventually(lambda: left(raw) == set(), 5)
    assert fleet.logged("worker exited") == fleet.logged("worker crashed") == []
    dead = set(raw.zrange("fastq:{default}:dead", 0, -1))
    assert dead == {name for name in odd if len(name) > job.ID_MOST or not name.isascii()}
    assert_sound(redis_url)
    assert fleet.stop() == 0


def test_a_decoder_that_lets_its_errors_out_is_found(monkeypatch: pytest.MonkeyPatch, dice: random.Random) -> None:
    """The planted bug of the decoders: what msgpack raises is raised (finding 7 of FAULTS: UnicodeDecodeError is one of it)."""
    monkeypatch.setattr(job, "decode_envelope", job.read_envelope)
    with pytest.raises((UnicodeDecodeError, msgspec.MsgspecError)):
        test_a_decoder_raises_one_error_whatever_it_reads(dice, print)


def test_a_worker_that_ends_of_what_it_reads_is_found(
    make_fleet: Callable[..., Fleet], redis_url: str, raw: Any
) -> None:
    """The same in a live worker."""
    fleet = make_fleet(redis_url, workers=1, unknown_task_ttl=0).serving(plant="leaky_decoder")
    write(raw, {b"bomb": BOMBS["nested 100,000 deep"]})
    fleet.until_logged("worker exited")
