"""What a producer's jobs become without the objects in between: the very bytes that msgspec and hiredis make of them."""

# ruff: noqa: TID251  the core itself is tested here
from __future__ import annotations

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import hiredis
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fastq
from fastq import _core
from fastq.broker.command import Command, Packed
from fastq.broker.commands import Batch, NewJob, Once, enqueue, reserve, settle
from fastq.broker.connection import pack
from fastq.broker.keys import NORMAL, QueueKeys
from fastq.job import (
    PLAIN,
    Envelope,
    JobPriority,
    check_id,
    decode_envelope,
    encode,
    new_id,
    plain_envelope,
    plain_head,
)
from fastq.task import Call

pytestmark = pytest.mark.versions

Q = QueueKeys("fastq", "q")
TASK = st.from_regex(re.compile(r"[A-Za-z0-9_.:-]{1,200}", re.ASCII), fullmatch=True)
ENVELOPE = st.binary(max_size=300)
PLAIN_JOB = st.tuples(TASK.map(lambda name: name[:120]), ENVELOPE, st.integers(-(2**63), 0)).map(
    lambda job: NewJob(*job)
)
EDGES = [0, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**64 - 1]


def expected(command: Command[Any]) -> bytes:
    """A call as hiredis packs it."""
    words = (b"EVALSHA", pack(command).split(b"\r\n")[4], len(command.keys), *command.keys, *command.args)
    return cast(Any, hiredis.pack_command)(words)


@given(st.integers(0, 10), TASK, st.binary(max_size=70_000), st.integers(0, 2**64 - 1))
@example(5, "t", b"x" * 255, 1)
@example(5, "t" * 200, b"x" * 256, 1)
@example(5, "t", b"x" * 65_535, 1)
@example(5, "t", b"x" * 65_536, 1)
def test_an_envelope_is_what_msgspec_makes_of_it(priority: int, task: str, body: bytes, at: int) -> None:
    assert plain_envelope(plain_head(priority, task), body, at) == encode(Envelope(priority, PLAIN, task, body, at))


@pytest.mark.parametrize("at", EDGES)
def test_times_of_every_width(at: int) -> None:
    data = plain_envelope(plain_head(5, "send"), b"\x91\x01", at)
    assert data == encode(Envelope(5, PLAIN, "send", b"\x91\x01", at))
    assert decode_envelope(data) == Envelope(5, PLAIN, "send", b"\x91\x01", at)


@pytest.mark.parametrize("at", [-1, 2**64])
def test_a_time_that_msgpack_has_no_word_for(at: int) -> None:
    with pytest.raises(OverflowError):
        plain_envelope(plain_head(5, "send"), b"", at)


@given(st.lists(PLAIN_JOB, min_size=1, max_size=150), st.integers(0, 2**63), TASK)
def test_a_call_is_what_hiredis_makes_of_it(jobs: list[NewJob], number: int, producer: str) -> None:
    command = enqueue(Q, 5, producer, number, jobs)
    assert isinstance(command, Packed)
    assert pack(command) == expected(command)
    assert command.args == [producer, number, *(word for job in jobs for word in job[:2])]


@pytest.mark.parametrize("number", EDGES)
def test_numbers_of_every_width(number: int) -> None:
    command = enqueue(Q, 5, "p", number, [NewJob("a" * 9, b"A" * 9), NewJob("a" * 10, b"A" * 10), NewJob("b", b"")])
    assert pack(command) == expected(command)


@given(st.lists(TASK, min_size=1, max_size=150), st.integers(0, 2**40))
def test_the_end_of_plain_jobs_is_what_hiredis_makes_of_it(ids: list[str], dead_max: int) -> None:
    batch = Batch()
    batch.succeeded = ids
    command = settle(Q, "w", batch, dead_max)
    assert isinstance(command, Packed)
    assert pack(command) == expected(command)
    assert command.args == [dead_max, len(ids), *ids, 0, 0, 0, 0]


@pytest.mark.parametrize("want", [0, 1, 9, 10, 2_000])
@pytest.mark.parametrize("worker", ["w", "host.1.abc~2", "w\xe4"])
def test_a_reserve_is_what_hiredis_makes_of_it(worker: str, want: int) -> None:
    command = reserve(Q, worker, want)
    assert pack(command) == expected(command)
    assert command.args == (worker, want)


def test_the_usual_priority_has_one_number() -> None:
    assert NORMAL == JobPriority.NORMAL


@pytest.mark.parametrize("odd", ["\xe4", b"a", None])
def test_an_end_that_the_core_does_not_know_goes_the_general_way(odd: Any) -> None:
    batch = Batch()
    batch.succeeded = ["a", odd]
    assert _core.pack_listed(b"", 0, batch.succeeded, b"", 0) is None
    assert type(settle(Q, "w", batch, 9)) is Command


@pytest.mark.parametrize("kind", ["recorded", "later", "failed", "released", "outputs"])
def test_a_batch_of_more_than_successes_goes_the_general_way(kind: str) -> None:
    batch = Batch()
    batch.succeeded = ["a"]
    rows: dict[str, Any] = {
        "recorded": ("b", 1, "c", b""),
        "later": ("b", 1, b""),
        "failed": ("b", b"", b""),
        "released": "b",
    }
    getattr(batch, kind).append(rows.get(kind, ("a", b"r")))
    assert type(settle(Q, "w", batch, 9)) is Command


def test_a_script_that_redis_has_not_got_goes_by_its_text() -> None:
    command = enqueue(Q, 5, "p", 7, [NewJob("a", b"A")])
    by_text = pack(command, by_text=True)
    assert by_text.startswith(b"*11\r\n$4\r\nEVAL\r\n")
    assert by_text.endswith(b"$1\r\np\r\n$1\r\n7\r\n$1\r\na\r\n$1\r\nA\r\n")


ODD: dict[str, Any] = {
    "delayed": NewJob("a", b"A", 1),
    "keyed": NewJob("a", b"A", unique="k"),
    "chosen": NewJob("a", b"A", chosen=True),
    "not ASCII": NewJob("\xe4", b"A"),
    "no text": NewJob(cast(Any, b"a"), b"A"),
    "no bytes": NewJob("a", cast(Any, bytearray(b"A"))),
    "half a ms": NewJob("a", b"A", cast(Any, -0.5)),
    "too short": ("a", b"A"),
    "a list": ["a", b"A", 0, "", False, None],
    "nothing": None,
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_what_is_not_plain_is_left_to_others(odd: Any) -> None:
    assert _core.pack_plain(b"", 0, "p", 1, [NewJob("a", b"A"), odd]) is None


@pytest.mark.parametrize("jobs", [(), (NewJob("a", b"A"),), None, "a"])
def test_only_a_list_is_packed(jobs: Any) -> None:
    assert _core.pack_plain(b"", 0, "p", 1, jobs) is None


def test_threads_that_enqueue_for_the_first_time_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that comes second finds all or nothing of what the first one is working out."""
    app, begun, go_on = fastq.FastQ("redis://nowhere"), threading.Event(), threading.Event()

    @app.task
    def send(to: str) -> None: ...

    def slow_head(priority: int, name: str) -> bytes:
        if not begun.is_set():
            begun.set()
            assert go_on.wait(10)
        return plain_head(priority, name)

    monkeypatch.setattr("fastq.task.plain_head", slow_head)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(send._call, ("a",), {}, app)
        assert begun.wait(10)
        try:
            second = send._call(("a",), {}, app)
        finally:
            go_on.set()
        assert first.result(10).queue == second.queue == "default"


def test_nothing_is_no_bytes() -> None:
    nothing = cast(Any, None)
    for wrong in (
        lambda: plain_envelope(nothing, b"", 1),
        lambda: plain_envelope(b"", nothing, 1),
        lambda: _core.pack_plain(nothing, 0, "p", 1, []),
        lambda: _core.pack_plain(b"", 0, nothing, 1, []),
        lambda: _core.PlainCalls(EXAMPLE, b"", 0).make(nothing, 1),
    ):
        with pytest.raises(TypeError):
            wrong()


EXAMPLE = Call("mail", 7, NewJob("", b""))


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1))
def test_a_call_of_a_task_is_like_the_example(body: bytes, at: int) -> None:
    calls = _core.PlainCalls(EXAMPLE, plain_head(7, "send"), 300)
    call = calls.make(body, at)
    envelope = encode(Envelope(7, PLAIN, "send", body, at))
    assert call == EXAMPLE._replace(job=NewJob(call.job.id, envelope))
    assert (type(call), type(call.job), len(call.job.id)) == (Call, NewJob, 24)
    assert calls.make(body, at).job.id != call.job.id
    assert calls.max_body == 300


@pytest.mark.parametrize(
    "example", [None, (), ("mail", 7), ["mail", 7, NewJob("", b"")], ("mail", 7, None), ("mail", 7, ("",))]
)
def test_what_is_no_example(example: Any) -> None:
    with pytest.raises(TypeError):
        _core.PlainCalls(example, b"", 0)


def test_calls_leave_nothing_behind() -> None:
    """Classes, items and the calls themselves are counted right: when nobody has 10,000 calls any more, they are gone."""

    class OwnJob(NewJob):
        pass

    class OwnCall(Call):
        pass

    rest = Once(ttl_ms=1)
    example = OwnCall("mail", 7, OwnJob("", b"", once=rest))
    calls = _core.PlainCalls(example, plain_head(7, "send"), 300)
    before = [sys.getrefcount(thing) for thing in (OwnCall, OwnJob, rest, example)]
    made = [calls.make(b"x", 1) for _ in range(10_000)]
    assert [sys.getrefcount(thing) for thing in (rest, example)] == [before[2] + 10_000, before[3]]
    del made
    assert [sys.getrefcount(thing) for thing in (OwnCall, OwnJob, rest, example)] == before


def test_ids_are_24_hexadecimal_characters_and_never_the_same() -> None:
    ids = [new_id() for _ in range(20_000)]
    assert all(re.fullmatch("[0-9a-f]{24}", check_id(job_id)) and job_id.isascii() for job_id in ids)
    assert len(set(ids)) == len(ids)
    # Each of the 96 bits is set in about half of them: 10,000 of 20,000, seven standard deviations on either side.
    for bit in range(96):
        assert 9_500 < sum(int(job_id, 16) >> bit & 1 for job_id in ids) < 10_500
