"""A-11: with keys, workers run only what somebody with a key has enqueued, as it was enqueued."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import msgspec
import pytest

import fastq
from fastq.broker.commands import NewJob, enqueue
from fastq.broker.connection import SyncConnection
from fastq.broker.planner import Planner
from fastq.errors import BadSignature, ConfigError, GivenBack, InvalidOption, UndecodableJob
from fastq.job import Envelope, Extra, JobState, Signature, decode_envelope, encode
from fastq.schedules import declared_by
from fastq.signing import Signer, signer_of
from tests.redis.test_scheduling import Rig
from tests.redis.workshop import Workshop, working

OLD, NEW, FOREIGN = "o" * 32, "n" * 40, "f" * 32
KEYS = f"new={NEW},old={OLD}"
JOBS = "fastq:{default}:jobs"


def make_app(url: str, keys: str = KEYS, **settings: Any) -> tuple[fastq.FastQ, list[Any]]:
    """An application whose handler tells what it was called with."""
    app, ran = fastq.FastQ(url, signing_keys=keys, **{"concurrency": 10, **settings}), []

    @app.task(name="t", retry=0, max_attempts=3)
    async def handler(value: Any = None, job: fastq.JobContext = None) -> Any:  # type: ignore[assignment]
        ran.append(value)
        if value == "fails once" and job.attempt == 1:
            raise fastq.Retry(delay=0)
        if value == "fails":
            raise fastq.Fail("as asked")
        return value

    return app, ran


def put(app: fastq.FastQ, queue: str = "default", **jobs: bytes) -> None:
    """What somebody with a connection to Redis can do."""
    connection = SyncConnection.to(app.endpoint())
    connection.connect()
    command = enqueue(app.keys(queue), 5, "p", connection.clock.now_us(), [NewJob(i, e) for i, e in jobs.items()])
    connection.call(command)
    connection.close()


async def letters(shop: Workshop, app: fastq.FastQ, count: int, queue: str | None = None) -> dict[str, tuple[str, str]]:
    """The dead letters, once there are so many: id -> reason and message."""
    async with asyncio.timeout(20):
        while len(found := await app.dead.list(queue=queue, limit=5_000)) < count:
            await asyncio.sleep(0.01)
    return {letter.id: (letter.reason, letter.error_message) for letter in found}


# -- what is signed runs ----------------------------------------------------------------------------------------------


async def test_signed_jobs_of_every_producer_run(redis_url: str, raw: Any) -> None:
    """Enqueued one by one, in bulk, from blocking code, delayed, retried, uniquely, in steps, and the jobs of workflows."""
    app, ran = make_app(redis_url)
    task = app.tasks["t"]
    async with working(app) as shop:
        jobs = [
            await app.enqueue("t", 1),
            await app.options(expires=60, timeout=5, max_attempts=2, result_ttl=50, priority=8).enqueue("t", 2),
            await app.options(delay=0.2).enqueue("t", 3),
            await app.options(unique=True).enqueue("t", 4),
            await app.enqueue("t", "fails once"),
            await asyncio.to_thread(app.enqueue_sync, "t", 5),
        ]
        assert all(data[1:3] != b"\x05\x01" for data in raw.hvals(JOBS) if data), "they are signed"
        bulk = await task.enqueue_many([(6,), (7,)])  # type: ignore[attr-defined]
        assert [(await shop.ended(job)).state for job in jobs] == [JobState.SUCCESS] * 6
        assert [(await shop.ended(fastq.JobHandle(app, i, "default"))).state for i in bulk.ids] == [
            JobState.SUCCESS
        ] * 2
        flow = await fastq.chain(task.s(8), fastq.group([task.s(), task.s()]), task.s()).enqueue()
        assert await flow.result(timeout=10) == [8, 8]
        await fastq.chain(task.s("fails")).enqueue(on_failure=task.si("told"))
        async with asyncio.timeout(10):
            while "told" not in ran:
                await asyncio.sleep(0.01)
        ran.clear()
        await app.enqueue_batch("t", [(9,), (10,)], on_complete=task.si("complete"), on_success=task.si("success"))
        async with asyncio.timeout(10):
            while set(ran) != {9, 10, "complete", "success"}:
                await asyncio.sleep(0.01)
        assert {letter.reason for letter in await app.dead.list()} == {"fail"}


async def test_a_replay_needs_no_key(redis_url: str) -> None:
    """The operator's command line has none: what its replay changes is not in the signature."""
    app, ran = make_app(redis_url)
    keyless = fastq.FastQ(redis_url)
    async with working(app) as shop:
        job = await app.enqueue("t", "fails")
        assert (await shop.ended(job)).state is JobState.FAILED
        assert await keyless.dead.replay(ids=[job.id]) == 1
        async with asyncio.timeout(10):
            while len(ran) < 2:
                await asyncio.sleep(0.01)
        found = await letters(shop, app, 1)
        assert found[job.id][0] == "fail"
    await keyless.aclose()


async def test_the_first_key_signs_and_all_verify(redis_url: str, raw: Any) -> None:
    """Rotation: a new key is put in front everywhere, then the old one is taken away; in between both are good."""
    before, _ = make_app(redis_url, f"old={OLD}")
    worker, ran = make_app(redis_url)
    await before.enqueue("t", "old")
    await worker.enqueue("t", "new")
    marks = {decode_envelope(data).extra.signature.key for data in raw.hvals(JOBS)}  # type: ignore[union-attr]
    assert marks == {"old", "new"}
    async with working(worker):
        async with asyncio.timeout(10):
            while len(ran) < 2:
                await asyncio.sleep(0.01)
    await before.aclose()


async def test_while_producers_get_their_keys(redis_url: str) -> None:
    """signing_required=False: unsigned jobs run as well; signed ones have to fit."""
    app, ran = make_app(redis_url, signing_required=False)
    seal = Signer({"new": FOREIGN}, app.now_ms).seal
    now = app.now_ms()
    plain = encode(Envelope(5, 1, "t", encode(["plain"]), now))
    put(app, plain=plain, foreign=seal("default", "foreign", plain))
    stripped = decode_envelope(seal("default", "x", plain))
    assert stripped.extra is not None
    stripped.extra.signature = None
    put(app, stripped=encode(stripped))
    await app.enqueue("t", "signed")
    async with working(app) as shop:
        found = await letters(shop, app, 2)
    assert {job: reason for job, (reason, _) in found.items()} == {"foreign": "signature", "stripped": "signature"}
    assert sorted(ran) == ["plain", "signed"]


async def test_without_keys_nothing_is_verified(redis_url: str, raw: Any) -> None:
    """Workers first get the release, then the keys: a signed job runs where nobody has a key, also at its second attempt."""
    signing, _ = make_app(redis_url)
    plain, ran = make_app(redis_url, "")
    async with working(plain) as shop:
        job = await signing.enqueue("t", "fails once")
        assert (await shop.ended(job)).state is JobState.SUCCESS
        job = await plain.enqueue("t", "plain")
        assert (await shop.ended(job)).state is JobState.SUCCESS
    assert ran == ["fails once", "fails once", "plain"]
    await signing.aclose()


# -- what is not, does not ----------------------------------------------------------------------------------------------


async def test_unsigned_foreign_and_forgotten_keys(redis_url: str) -> None:
    app, ran = make_app(redis_url)
    now = app.now_ms()
    plain = encode(Envelope(5, 1, "t", encode(["no"]), now))
    wrong = Signer({"new": FOREIGN}, app.now_ms).seal("default", "wrong", plain)
    gone = Signer({"2019": OLD}, app.now_ms).seal("default", "gone", plain)
    marked = msgspec.structs.replace(decode_envelope(plain), version=2)
    put(app, unsigned=plain, wrong=wrong, gone=gone, marked=encode(marked))
    async with working(app) as shop:
        found = await letters(shop, app, 4)
    assert {reason for reason, _ in found.values()} == {"signature"}
    assert "not signed" in found["unsigned"][1]
    assert "not signed" in found["marked"][1]
    assert "does not fit" in found["wrong"][1]
    assert "'2019'" in found["gone"][1]
    assert "among signing_keys" in found["gone"][1]
    assert ran == []


async def test_every_flipped_bit_of_a_signed_body_is_found(redis_url: str, raw: Any) -> None:
    app, ran = make_app(redis_url)
    job = await app.enqueue("t", "pay 100 to bob")
    data = raw.hget(JOBS, job.id)
    raw.delete(JOBS, "fastq:{default}:ready:5")
    body = decode_envelope(data).body
    at = data.index(body)
    forged = {}
    for position in range(at, at + len(body)):
        for bit in (1, 128):
            changed = bytearray(data)
            changed[position] ^= bit
            raw.hset(JOBS, job.id, bytes(changed))
            forged[f"{position}.{bit}"] = bytes(changed)
    raw.delete(JOBS)
    signer = signer_of(KEYS, app.now_ms)
    assert signer is not None
    for changed in forged.values():
        with pytest.raises(UndecodableJob):
            signer.open("default", job.id, changed)
    assert signer.open("default", job.id, data).body == body
    put(app, **{job.id: forged[f"{at + 3}.1"]})  # and one through a live worker
    async with working(app) as shop:
        assert (await letters(shop, app, 1))[job.id][0] == "signature"
    assert ran == []


async def test_parts_of_two_valid_jobs_do_not_make_a_third(redis_url: str, raw: Any) -> None:
    """Ids, queues, tasks, bodies, options and signatures of two signed jobs in every combination: only the two run."""
    app, ran = make_app(redis_url, queues="default,other")
    a = await app.options(priority=5, timeout=9).enqueue("t", "a")
    b = await app.options(priority=6, expires=500, queue="other").enqueue("t", "b")
    first, second = raw.hget(JOBS, a.id), raw.hget("fastq:{other}:jobs", b.id)
    signer = signer_of(KEYS, app.now_ms)
    assert signer is not None
    one, two = decode_envelope(first), decode_envelope(second)
    assert one.extra is not None
    assert two.extra is not None
    swapped = [
        ("default", b.id, one), ("other", a.id, one), ("default", a.id, two), ("other", b.id, one),
        *(("default", a.id, msgspec.structs.replace(one, **{field: getattr(two, field)})) for field in ("priority", "body")),
        ("default", a.id, msgspec.structs.replace(one, task="u")),
        ("default", a.id, msgspec.structs.replace(one, enqueued_at=one.enqueued_at + 1)),
        ("default", a.id, msgspec.structs.replace(one, version=1)),
        *(
            ("default", a.id, msgspec.structs.replace(one, extra=msgspec.structs.replace(one.extra, **change)))
            for change in (
                {"timeout": 10.0}, {"timeout": None}, {"max_attempts": 99}, {"result_ttl": 1e6}, {"schedule": "s"}, {"takes": 0},
                {"signature": two.extra.signature},
            )
        ),
    ]  # fmt: skip
    for queue, job_id, envelope in swapped:
        with pytest.raises(BadSignature):
            signer.open(queue, job_id, encode(envelope))
    put(app, queue="other", **{a.id: first})  # replayed into another queue, through a live worker
    async with working(app) as shop:
        assert (await letters(shop, app, 1, "other"))[a.id][0] == "signature"
        await shop.ended(a)
        await shop.ended(b)
    assert sorted(ran) == ["a", "b"]


def test_any_damage_is_one_error() -> None:
    """Random bytes anywhere in a signed envelope: it is read as it was, or refused; nothing else comes out (A-10)."""
    seed = random.SystemRandom().randrange(10**9)
    dice = random.Random(seed)
    signer = Signer({"k": OLD}, lambda: 1_000)
    data = signer.seal("q", "i", encode(Envelope(5, 1, "t", b"\x91\x01", 900, 0, Extra(due_at=950, timeout=3.0))))
    body = decode_envelope(data).body
    for _ in range(20_000):
        changed = bytearray(data)
        for _ in range(dice.randint(1, 3)):
            changed[dice.randrange(len(changed))] = dice.randrange(256)
        try:
            opened = signer.open("q", "i", bytes(changed))
        except UndecodableJob:
            continue
        assert (opened.task, opened.body, opened.priority, opened.enqueued_at) == ("t", body, 5, 900), seed


# -- time -------------------------------------------------------------------------------------------------------------


async def test_a_signed_job_cannot_be_made_to_run_early(redis_url: str, raw: Any) -> None:
    """Moved from the scheduled jobs to the ready ones by hand, it goes back until it is due."""
    app, ran = make_app(redis_url)
    job = await app.options(delay=600).enqueue("t", "later")
    raw.zrem("fastq:{default}:due", job.id)
    raw.rpush("fastq:{default}:ready:5", job.id)
    raw.rpush("fastq:{default}:wake", "1")
    async with working(app):
        async with asyncio.timeout(10):
            while not raw.zcard("fastq:{default}:due"):
                await asyncio.sleep(0.01)
        due = raw.zscore("fastq:{default}:due", job.id)
        assert abs(due - (time.time() + 600) * 1_000) < 15_000
        assert ran == []


def test_an_expiry_that_was_taken_away_counts_all_the_same() -> None:
    """A captured job cannot be run for ever: what was signed with an expiry is refused after it, replayed or not."""
    now = 1_000_000
    signer = Signer({"k": OLD}, lambda: now)
    data = signer.seal("q", "i", encode(Envelope(5, 1, "t", b"\x90", now, 0, Extra(expires_at=now + 5_000))))
    envelope = decode_envelope(data)
    assert envelope.extra is not None
    assert signer.open("q", "i", data) == envelope
    now += 5_001
    assert signer.open("q", "i", data) == envelope, "the executor ends it as expired, as any other"
    for expires_at in (None, now + 99_999):
        changed = msgspec.structs.replace(
            envelope, extra=msgspec.structs.replace(envelope.extra, expires_at=expires_at)
        )
        with pytest.raises(BadSignature, match="expiry"):
            signer.open("q", "i", encode(changed))


def test_the_times_are_signed() -> None:
    signer = Signer({"k": OLD}, lambda: 5_000)
    data = signer.seal("q", "i", encode(Envelope(5, 1, "t", b"\x90", 0, 0, Extra(due_at=9_000, expires_at=19_000))))
    with pytest.raises(GivenBack) as caught:
        signer.open("q", "i", data)
    assert caught.value.delay_ms == 4_000
    envelope = decode_envelope(data)
    assert envelope.extra is not None
    mark = envelope.extra.signature
    assert mark is not None
    for change in ({"not_before": 0}, {"expires": 0}, {"mac": b""}, {"mac": mark.mac[:-1]}, {"mac": mark.mac + b"\0"}):
        envelope.extra.signature = msgspec.structs.replace(mark, **change)
        with pytest.raises(BadSignature):
            signer.open("q", "i", encode(envelope))
    envelope.extra.signature = Signature("k", 0, 0)
    with pytest.raises(BadSignature):
        signer.open("q", "i", encode(envelope))


# -- schedules, consumers ------------------------------------------------------------------------------------------------


async def test_a_consumer_verifies(redis_url: str) -> None:
    app, _ = make_app(redis_url)
    put(app, forged=encode(Envelope(5, 1, "t", b"\x90", app.now_ms())))
    good = await app.enqueue("t", 1)
    async with app.consume("default") as consumer:
        message = await anext(consumer)
        assert message.id == good.id
        await message.ack()
    assert [(letter.id, letter.reason) for letter in await app.dead.list()] == [("forged", "signature")]
    await app.aclose()


# -- keys ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["k", "=x", f"k={OLD},", "k=short", f"k={OLD},k={NEW}", f"two words={OLD}", f"{'k' * 33}={OLD}"]
)
def test_keys_that_cannot_be_used_are_refused_without_being_shown(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        signer_of(text, lambda: 0)
    assert OLD not in str(caught.value)
    assert "short" not in str(caught.value)


def test_a_secret_is_never_shown() -> None:
    from fastq.config import load, shown

    settings = load(arguments={"signing_keys": KEYS}, environ={}).settings
    signer = signer_of(KEYS, lambda: 0)
    for text in (repr(settings), shown(settings, "signing_keys"), repr(signer), str(signer)):
        assert NEW not in text
        assert OLD not in text


async def test_arguments_of_another_job_cannot_be_signed(redis_url: str) -> None:
    app, _ = make_app(redis_url)
    with pytest.raises(InvalidOption, match="replace"):
        await app.options(unique=fastq.Unique(on_duplicate="replace")).enqueue("t", 1)
    await app.aclose()


def test_the_comparison_takes_the_same_time_for_all() -> None:
    """Held by the code, not by a stopwatch: signatures are compared by hmac.compare_digest, and by nothing else."""
    import ast
    from pathlib import Path

    import fastq.signing

    tree = ast.parse(Path(fastq.signing.__file__).read_text())
    compared = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    assert not [text for text in compared if "mac" in text]
    assert "hmac.compare_digest(" in ast.unparse(tree)


async def test_only_schedules_of_the_code_are_signed(redis_url: str, raw: Any) -> None:
    """A schedule is data in Redis, too: the scheduler does not lend its key to whoever wrote one there."""
    app, ran = make_app(redis_url)

    @app.every(0.3, name="ours")
    async def tick() -> None:
        ran.append("tick")

    rig = Rig(redis_url, app, signing_keys=KEYS)
    (ours,) = (each.definition for each in declared_by(app, "jobs:app"))
    connection = SyncConnection.to(app.endpoint())
    connection.run(Planner("fastq").put("default", msgspec.structs.replace(ours, name="theirs", source="")))
    connection.close()
    async with rig.running("lead", "periodic", "declare"), working(app) as shop:
        found = await letters(shop, app, 1)
        async with asyncio.timeout(10):
            while len(ran) < 2:
                await asyncio.sleep(0.01)
    assert {job.partition("@")[0] for job in found} == {"theirs"}
    assert {reason for reason, _ in found.values()} == {"signature"}
