"""The envelope on the wire, ids, priorities and the moves between states."""

from __future__ import annotations

import doctest

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastq import job
from fastq.broker import views
from fastq.errors import InvalidJobId, InvalidOption, UndecodableJob
from fastq.job import Envelope, ErrorInfo, Extra, JobPriority, JobRecord, JobState, Outcome, encode

text = st.text()  # half surrogates, which msgpack cannot hold, are no part of it: a task name is ASCII
numbers = st.integers(0, 2**53)
extras = st.builds(
    Extra,
    timeout=st.none() | st.floats(0, 1e9),
    max_attempts=st.none() | st.integers(0, 1_000),
    expires_at=st.none() | numbers,
    result_ttl=st.none() | st.floats(0, 1e9),
    error=st.none() | st.text(st.characters(codec="utf-8")),
    due_at=st.none() | numbers,
    snoozes=st.integers(0, 1_000),
    strays=st.integers(0, 1_000),
    schedule=st.none() | st.text(st.characters(codec="ascii")),
    replayed_from=st.none() | numbers,
)
envelopes = st.builds(
    Envelope,
    priority=st.integers(0, 10),
    version=st.sampled_from((job.PLAIN, job.SIGNED)),
    task=st.from_regex(job.TASK_NAME, fullmatch=True),
    body=st.binary(max_size=100),
    enqueued_at=numbers,
    attempt=st.integers(0, 1_000),
    extra=st.none() | extras,
)


# -- the envelope -----------------------------------------------------------------------------------


@given(envelopes)
def test_an_envelope_comes_back_as_it_was(envelope: Envelope) -> None:
    assert job.decode_envelope(job.encode(envelope)) == envelope


@given(envelopes)
def test_the_second_byte_is_the_priority(envelope: Envelope) -> None:
    """Scripts read it with string.byte(envelope, 2) and decode nothing."""
    data = job.encode(envelope)
    assert data[1] == envelope.priority
    assert job.priority_of(data) == envelope.priority


def test_the_bytes_of_an_envelope() -> None:
    """Stored jobs outlive a release: this layout changes only with VERSION."""
    assert job.encode(Envelope(8, 1, "mail", b"\x91\x01", 1_700_000_000_000)) == bytes.fromhex(
        "97 08 01 a4 6d61696c c4 02 9101 cf 0000018bcfe56800 00 c0"
    )
    extra = Extra(timeout=1.5, max_attempts=3, snoozes=1)
    assert msgspec.msgpack.decode(job.encode(extra)) == {"t": 1.5, "m": 3, "s": 1}
    assert (job.PLAIN, job.VERSION) == (1, 2)


def test_the_names_of_the_rare_fields_are_one_byte_and_different() -> None:
    names = [field.encode_name for field in msgspec.structs.fields(Extra)]
    assert len(set(names)) == len(names) == 13
    assert {len(name) for name in names} == {1}


def test_an_envelope_without_rare_fields_spends_one_byte_on_them() -> None:
    assert job.encode(Envelope(5, 1, "t", b"", 0))[-1:] == b"\xc0"


def test_an_envelope_of_a_newer_release_may_have_more_fields() -> None:
    """F-42: additive changes only, so that old workers go on."""
    data = msgspec.msgpack.encode([5, 1, "t", b"", 7, 0, {"t": 1.0, "new": 1}, "more"])
    assert job.decode_envelope(data) == Envelope(5, 1, "t", b"", 7, 0, Extra(timeout=1.0))


@pytest.mark.parametrize("version", [0, 3, 99])
def test_another_version_is_said(version: int) -> None:
    with pytest.raises(UndecodableJob, match=f"version {version}"):
        job.decode_envelope(job.encode(Envelope(5, version, "t", b"", 0)))


@given(st.binary())
@example(b"")
@example(b"\x97\x05\x01\xa1\xff\xc4\x00\x00\x00\xc0")  # the task is no UTF-8: UnicodeDecodeError
@example(b"\x91" * 10_000)  # RecursionError
@example(b"\x97\x05\x01\xa1t\xc4\x00\x00\x00\xc1")
@example(b"\xdd\xff\xff\xff\xff")
def test_any_bytes_are_an_envelope_or_undecodable(data: bytes) -> None:
    """F-38: never another exception."""
    read = envelope_or_message(data)
    assert isinstance(read, Envelope) or len(read) < 500


def envelope_or_message(data: bytes) -> Envelope | str:
    try:
        return job.decode_envelope(data)
    except UndecodableJob as error:
        return str(error)


@given(envelopes, st.data())
def test_a_damaged_envelope_is_an_envelope_or_undecodable(envelope: Envelope, data: st.DataObject) -> None:
    stored = bytearray(job.encode(envelope))
    for _ in range(data.draw(st.integers(1, 4))):
        stored[data.draw(st.integers(0, len(stored) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(stored[: data.draw(st.integers(0, len(stored)))])
    assert envelope_or_message(cut)
    assert 0 <= job.priority_of(cut) <= 10


@pytest.mark.parametrize("data", [b"", b"\x97", b"\x97\x0b", b"\x97\xff", b"\x97\xc0\x00"])
def test_the_priority_of_no_envelope_is_normal(data: bytes) -> None:
    assert job.priority_of(data) == JobPriority.NORMAL


# -- ids and priorities -------------------------------------------------------------------------------


def test_new_ids_are_different_valid_and_short() -> None:
    ids = {job.new_id() for _ in range(10_000)}
    assert len(ids) == 10_000
    assert all(job.check_id(i) == i and len(i) == 24 for i in ids)


@pytest.mark.parametrize("job_id", ["a", "A-1_b.c:d@e/f+g=h", "x" * 120])
def test_an_id_may_be(job_id: str) -> None:
    assert job.check_id(job_id) == job_id


@pytest.mark.parametrize("job_id", ["", "x" * 121, "a b", "a\n", "ä", "a\x00", "{a}", "~", "a*", None, 7, b"a"])
def test_an_id_may_not_be(job_id: object) -> None:
    with pytest.raises(InvalidJobId) as caught:
        job.check_id(job_id)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("priority", [0, 5, 10, JobPriority.CRITICAL, JobPriority.LOW])
def test_a_priority_may_be(priority: int) -> None:
    checked = job.check_priority(priority)
    assert checked == priority
    assert type(checked) is int


@pytest.mark.parametrize("priority", [-1, 11, 5.0, "5", None, True, False])
def test_a_priority_may_not_be(priority: object) -> None:
    with pytest.raises(InvalidOption, match="from 0"):
        job.check_priority(priority)  # type: ignore[arg-type]


def test_named_priorities() -> None:
    assert [(p.name, int(p)) for p in JobPriority] == [("LOW", 0), ("NORMAL", 5), ("HIGH", 8), ("CRITICAL", 10)]


# -- states ---------------------------------------------------------------------------------------------


def test_states_are_their_names() -> None:
    assert {str(state) for state in JobState} == {
        "scheduled", "waiting", "pending", "parked", "running", "success", "failed", "cancelled",
    }  # fmt: skip
    assert JobState.SUCCESS == "success"
    assert {state for state in JobState if state.final} == {JobState.SUCCESS, JobState.FAILED, JobState.CANCELLED}


def test_every_state_has_its_moves() -> None:
    assert set(job.MOVES) == set(JobState)
    reached = set().union(*job.MOVES.values())
    assert reached == set(JobState) - {JobState.WAITING}  # a job begins scheduled, waiting or pending
    assert not job.MOVES[JobState.SUCCESS]
    assert not job.MOVES[JobState.CANCELLED]
    assert job.MOVES[JobState.FAILED] == {JobState.PENDING}  # replay


@pytest.mark.parametrize("start", [JobState.SCHEDULED, JobState.WAITING, JobState.PENDING])
def test_every_job_can_end(start: JobState) -> None:
    """I13: no state needs a human to move on."""
    seen, todo = set(), {start}
    while todo:
        seen |= todo
        todo = set().union(*(job.MOVES[state] for state in todo if not state.final)) - seen
    assert {JobState.SUCCESS, JobState.FAILED, JobState.CANCELLED} <= seen


def test_outcomes_are_the_sections_of_settle() -> None:
    from fastq.broker import scripts
    from fastq.broker.commands import Batch

    assert tuple(outcome.name.lower() for outcome in Outcome) == SECTIONS
    assert set(Batch.__slots__) - {"outputs", "parked"} == set(SECTIONS)  # besides a row; park.lua has the parked ones
    head = scripts.expand("settle").partition("local running")[0]
    places = [head.index(f"{name}:") for name in SECTIONS]
    assert places == sorted(places)


SECTIONS = ("succeeded", "recorded", "later", "failed", "released")


# -- records ----------------------------------------------------------------------------------------------


def test_an_error_comes_back_as_it_was() -> None:
    error = ErrorInfo(
        "exception", "ValueError", "bad\nthing", "Traceback …", 3, 1_700_000_000_000, "host", 1_699_999_999_000
    )
    assert job.decode_error(job.encode(error)) == error


def test_an_error_of_an_older_release_has_no_start() -> None:
    old = ["exception", "ValueError", "bad", "", 3, 1_700_000_000_000, "host"]
    assert job.decode_error(msgspec.msgpack.encode(old)) == ErrorInfo(*old, started_at=0)


@given(st.binary())
@example(b"")
@example(b"\x97\xa1\xff\xa0\xa0\xa0\x00\x00\xa0")
def test_an_unreadable_error_has_a_placeholder(data: bytes) -> None:
    """A-02: text only, from whoever could write to Redis."""
    assert isinstance(job.decode_error(data), ErrorInfo)


def test_a_record_keeps_its_result_as_bytes() -> None:
    record = job.JobRecord("success", "t", 1, 2, 3, 1, msgspec.Raw(b"\x93\x01\x02\x03"))
    back = job.decode_record(job.encode(record))
    assert bytes(back.result or b"") == b"\x93\x01\x02\x03"
    assert (back.state, back.error) == ("success", None)


def test_the_times_of_a_job_are_in_order_whoever_wrote_them() -> None:
    """The producer's and the worker's ideas of Redis's clock differ by a ms or two."""
    assert doctest.testmod(views).failed == 0
    record = JobRecord("success", "send", 1_714, 1_713, 1_712, 1)
    status = views.finished_status("q", "a", encode(record))
    assert (status.enqueued_at, status.started_at, status.finished_at) == (1.714, 1.714, 1.714)
    cancelled = views.finished_status("q", "a", encode(JobRecord("cancelled", "send", 1_714, 0, 1_713, 0)))
    assert (cancelled.enqueued_at, cancelled.started_at, cancelled.finished_at) == (1.714, None, 1.714)
