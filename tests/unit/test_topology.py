"""Slots, redirections and the layout of a cluster: no server is asked."""

from __future__ import annotations

from typing import Any

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastq.broker import commands
from fastq.broker.command import raw
from fastq.broker.commands import NewJob
from fastq.broker.keys import GlobalKeys, LeaseKeys, LimitKeys, QueueKeys
from fastq.broker.topology import Node, Redirection, Topology, key_of, redirection, slot_of
from fastq.broker.url import parse_url
from fastq.errors import BrokerReplyError, BrokerUnavailable

URL = "redis+cluster://app:s3cret@seed:7000,seed:7001/"
A, B = Node("a", 1), Node("b", 2)
LAYOUT = [[0, 8_191, [b"a", 1, b"id", []], [b"r", 9, b"id", []]], [8_192, 16_383, [b"b", 2, b"id", []]]]


def learnt() -> Topology:
    topology = Topology(parse_url(URL))
    topology.learn(LAYOUT, A)
    return topology


def test_what_any_master_can_answer_is_asked_of_one_that_is_up() -> None:
    ping, topology = raw("PING"), learnt()
    assert topology.owner(ping) == A
    topology.suspect(A)
    assert topology.owner(ping) == B
    topology.suspect(B)
    assert topology.owner(ping) == B, "whoever is asked: nobody is left"
    topology.learn(LAYOUT, B)
    assert topology.owner(ping) == B, "it has just answered"
    topology.learn(LAYOUT, Node("seed", 7000))  # a name of one of them, or a replica
    assert topology.owner(ping) == A


@given(st.binary() | st.sampled_from([b"{}", b"{", b"}{", b"{a}{b}", b"x{{y}}z", b"fastq:{q}:jobs"]))
def test_slots_are_those_of_redis(key: bytes) -> None:
    from redis.crc import key_slot

    assert slot_of(key) == key_slot(key)


def test_the_key_of_a_command() -> None:
    q = QueueKeys("fastq", "default")
    for command in (
        commands.enqueue(q, 5, "p", 1, [NewJob("a", b"e")]),
        raw("LLEN", q.jobs),
        raw("EVAL", "return 1", 1, q.jobs, "x"),
        raw("XREAD", "COUNT", 5, "BLOCK", 9, "STREAMS", q.events, b"0"),
        raw("BLPOP", q.wake, 1),
    ):
        assert slot_of(key_of(command) or b"") == slot_of("default")
    assert key_of(raw("TIME")) is None
    assert key_of(raw("CLUSTER", "SLOTS")) is None


def test_keys_of_one_call_share_a_slot() -> None:
    """What each kind of key carries in braces; the scripts themselves are run in tests/redis/test_cluster.py."""
    limit, lease = LimitKeys("fastq", "api", "tenant-42"), LeaseKeys("fastq", "leader", "daily")
    assert len({slot_of(key) for key in (limit.rule, limit.state, limit.slots, limit.wake, limit.given("t"))}) == 1
    assert slot_of(lease.lease) == slot_of(lease.wake)
    q = QueueKeys("fastq", "mail:3")
    assert {slot_of(key) for key in (q.jobs, *q.ready, q.running("w"), q.flow("x"))} == {slot_of("mail:3")}
    assert slot_of(GlobalKeys("fastq").queues) != slot_of(q.jobs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MOVED 3999 127.0.0.1:6381", Redirection("MOVED", 3999, Node("127.0.0.1", 6381))),
        ("ASK 1 ::1:6381", Redirection("ASK", 1, Node("::1", 6381))),
        ("MOVED 3999 :6381", Redirection("MOVED", 3999, Node("", 6381))),
        ("TRYAGAIN Multiple keys request during rehashing of slot", Redirection("TRYAGAIN")),
        ("CLUSTERDOWN The cluster is down", None),
        ("MOVED", None),
        ("ERR wrong", None),
    ],
)
def test_redirections(text: str, expected: Redirection | None) -> None:
    assert redirection(hiredis.ReplyError(text)) == expected


def test_what_is_no_error_is_no_redirection() -> None:
    assert redirection(b"MOVED 1 a:1") is None


def test_the_owner_of_a_command() -> None:
    topology = learnt()
    assert slot_of("bar") == 5_061
    assert slot_of("foo") == 12_182
    assert topology.owner(raw("GET", "bar")) == A
    assert topology.owner(raw("GET", "foo")) == B
    assert topology.owner(raw("TIME")) == A
    assert topology.owner(raw("TIME"), near=raw("GET", "foo")) == B
    assert topology.at(B).host == "b"
    assert topology.at(B).nodes == ()
    assert "s3cret" not in topology.at(B).shown
    assert topology.at(B).shown.startswith("b:2 of redis+cluster://")


def test_a_move_is_remembered_and_everything_is_asked_for_again() -> None:
    topology = learnt()
    assert topology.settled
    topology.move(Redirection("MOVED", slot_of("bar"), B))
    assert topology.owner(raw("GET", "bar")) == B
    assert not topology.settled
    topology.move(Redirection("MOVED", slot_of("bar"), Node("", 3)))
    assert topology.owner(raw("GET", "bar")) == Node("b", 3)


def test_a_slot_that_nobody_serves() -> None:
    topology = Topology(parse_url(URL))
    topology.learn(LAYOUT[:1], A)
    with pytest.raises(BrokerUnavailable, match=r"no node of redis\+cluster://.* serves slot 12182"):
        topology.owner(raw("GET", "foo"))
    assert not topology.settled


def test_a_node_that_does_not_say_its_name_is_the_one_that_was_asked() -> None:
    for nameless in (None, b""):
        topology = Topology(parse_url(URL))
        topology.learn([[0, 16_383, [nameless, 7, b"id", []]]], Node("here", 1))
        assert topology.masters == (Node("here", 7),)


def test_whom_to_ask() -> None:
    """Suspects last, and no node twice; the seeds stay known, should every other node have gone."""
    topology = learnt()
    topology.suspect(A)
    order = list(topology.asked())
    assert order[0] == B
    assert order[-1] == A
    assert sorted(order) == sorted([A, B, Node("seed", 7000), Node("seed", 7001)])


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        ([], BrokerUnavailable, "no node that serves any slot"),
        (hiredis.ReplyError("ERR This instance has cluster support disabled"), BrokerReplyError, "use redis://a:1/0"),
        (hiredis.ReplyError("NOPERM no permissions"), BrokerReplyError, r"\+cluster\|slots"),
    ],
)
def test_a_node_without_a_layout(reply: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        Topology(parse_url(URL)).learn(reply, A)


def test_scan_walks_every_node() -> None:
    """The cursor that a caller sees says which node it has come to."""
    topology, seen, cursor = learnt(), [], b"0"
    answers = {A: [(b"77", [b"1"]), (b"0", [b"2"])], B: [(b"0", [b"3"])]}
    for _ in range(3):
        node, command = topology.spread(raw("SCAN", cursor, "COUNT", 9))
        assert node is not None
        left, names = answers[node].pop(0)
        cursor, found = command.decode([left, names])
        seen += found
    assert (cursor, seen) == (b"0", [b"1", b"2", b"3"])
    assert topology.spread(raw("GET", "x"))[0] is None
