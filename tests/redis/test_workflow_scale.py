"""Large workflows on the scripts alone: no call does much, whatever the client has died of (F-59, F-60, I12)."""

from __future__ import annotations

import pytest

from fastq import job
from fastq.broker import flows
from fastq.broker.commands import Batch, reserve, settle
from fastq.broker.flows import Node
from fastq.broker.keys import GlobalKeys
from tests.redis.lab import Lab

FLOW = "0123456789abcdef01234567"
KNOWN = {"policy": "fail", "ttl": 60_000, "success": b"S", "failed": b"F", "cancelled": b"C"}
PIECE = 250
"""Most nodes that one call frees (include/unfold.lua)."""


def envelope(size: int = 1) -> bytes:
    return job.encode(job.Envelope(5, 1, "t", b"\x90" * size, 0, 0, job.Extra(takes=-1)))


def chord(width: int, size: int = 1) -> list[Node]:
    header = [Node([width], envelope(size)) for _ in range(width)]
    return [*header, Node([width + 1], None, list(range(width)), width), Node([], envelope())]


def write_down(lab: Lab, nodes: list[Node], roots: list[int]) -> int:
    """Everything up to the start; then the client is gone."""
    for command in flows.submit(lab.q, FLOW, nodes, roots, KNOWN, GlobalKeys("fastq").queues):
        assert not isinstance(command, list)
        if command.script == "flow_start":
            break
        lab.call(command)
    return lab.call(flows.flow_start(lab.q, FLOW, len(nodes), roots, KNOWN))  # type: ignore[no-any-return]


def run(lab: Lab, want: int) -> list[str]:
    """One worker does everything; the ids in the order in which it got them."""
    lab.register()
    ran: list[str] = []
    while ids := [raw.decode() for raw in lab.call(reserve(lab.q, "w", want)).ids]:
        assert len(ids) <= want
        ran += ids
        batch = Batch()
        batch.succeeded = ids
        batch.outputs = [(job_id, b"\x01") for job_id in ids]
        before = lab.raw.llen(lab.q.ready[5])
        lab.call(settle(lab.q, "w", batch, 100))
        assert lab.raw.llen(lab.q.ready[5]) - before <= PIECE
    return ran


def test_a_chord_of_10_000_begins_in_pieces_and_ends_without_its_client(lab: Lab) -> None:
    assert write_down(lab, chord(10_000), list(range(10_000))) == 2
    assert len(lab.ready()) == PIECE
    assert lab.raw.hget(lab.q.flow(FLOW), "later") == b"250-9999/1*1,"
    ran = run(lab, 500)
    assert len(ran) == len(set(ran)) == 10_001
    assert ran[-1] == f"{FLOW}.10001"
    assert lab.value(f"flow:{FLOW}")["state"] == b"success"


def test_whoever_starts_it_sees_all_of_it_pending(lab: Lab) -> None:
    nodes = chord(1_000)
    lab.conn.run(flows.submit(lab.q, FLOW, nodes, list(range(1_000)), KNOWN, GlobalKeys("fastq").queues))
    assert len(lab.ready()) == 1_000
    assert not lab.raw.exists(lab.q.unfolding)
    assert len(run(lab, 100)) == 1_001


def test_large_messages_make_the_pieces_smaller(lab: Lab) -> None:
    """1 MiB of messages and what one command brings above it, not 250 times 100 kB."""
    assert write_down(lab, chord(200, 100_000), list(range(200))) == 2
    assert len(lab.ready()) == 50
    assert len(run(lab, 500)) == 201


@pytest.mark.parametrize("want", [7, 500])
def test_groups_of_groups_of_chains(lab: Lab, want: int) -> None:
    """Lists of nodes with a step, gathers that free gathers, one in the middle that frees 1,000."""
    nodes: list[Node] = [Node(list(range(1, 2_001, 2)), envelope())]
    for number in range(1, 2_001, 2):
        nodes += [Node([number + 1], envelope()), Node([2_001], envelope())]
    nodes += [
        Node([2_002], None, list(range(2, 2_001, 2)), 1_000),
        Node([2_003], None, [2_001], 1),
        Node([], envelope()),
    ]
    assert write_down(lab, nodes, [0]) == 1
    assert lab.raw.hget(lab.q.flow(FLOW), "c0") == b"1-1999/2"
    ran = run(lab, want)
    assert len(ran) == len(set(ran)) == 2_002
    assert (ran[0], ran[-1]) == (f"{FLOW}.0", f"{FLOW}.2003")


def test_a_group_of_10_000_groups_of_nothing(lab: Lab) -> None:
    """Gathers alone: no job begins for many calls, and it ends all the same."""
    gathers = [Node([10_000], None, [], 1) for _ in range(10_000)]
    nodes = [*gathers, Node([10_001], None, list(range(10_000)), 10_000), Node([], envelope())]
    assert write_down(lab, nodes, list(range(10_000))) == 2
    lab.register()
    calls = 0
    while not (ids := lab.call(reserve(lab.q, "w", 10)).ids):
        calls += 1
        assert calls < 200
    assert [raw.decode() for raw in ids] == [f"{FLOW}.10001"]
    assert calls > 30
    batch = Batch()
    batch.succeeded = [f"{FLOW}.10001"]
    batch.outputs = [(f"{FLOW}.10001", b"\x01")]
    lab.call(settle(lab.q, "w", batch, 100))
    assert lab.value(f"flow:{FLOW}")["state"] == b"success"
