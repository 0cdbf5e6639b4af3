"""Commands are pure: what goes to which key in which order, and how a reply is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastq.broker import batches, flows, leases, pauses, schema, scripts, tags, timing
from fastq.broker import commands as c
from fastq.broker.command import Command, raw
from fastq.broker.commands import Batch, NewJob
from fastq.broker.keys import PAD, GlobalKeys, LeaseKeys, QueueKeys

Q = QueueKeys("fastq", "q")
BUCKET = ("1000:7", 9_000)

ONE_OF_EACH: dict[str, Callable[[], Command[Any]]] = {
    "agree": lambda: next(schema.agree("fastq")),
    "batch_call": lambda: batches.batch_call(Q, "ab", "complete", b"E"),
    "batch_close": lambda: batches.batch_close(Q, "ab", "whole"),
    "batch_open": lambda: batches.batch_open(Q, "ab", {"task": "t"}),
    "cancel": lambda: c.cancel(Q, "a", ["v", "w"], b"record", 60_000),
    "clamp": lambda: c.clamp(Q, [("w", 1)]),
    "discard": lambda: c.discard(Q, ids=["a"]),
    "enqueue": lambda: c.enqueue(Q, 5, "p", 1, [NewJob("a", b"e")], None, "ab"),
    "enqueue_once": lambda: c.enqueue(
        Q, 5, "p", 1, [NewJob("a", b"A", unique="k")], c.Bound(9, "drop_oldest", 9), "ab"
    ),
    "enqueue_plain": lambda: c.enqueue(Q, 5, "p", 1, [NewJob("a", b"e")]),
    "extend": lambda: c.extend(Q, 1_000, ["v", "w"]),
    "fire": lambda: timing.fire(Q, 5, "s", 1, "a", b"e", b"d"),
    "flow_add": lambda: flows.flow_add(Q, "ab", 0, "w", ["e0", b"E"]),
    "flow_cancel": lambda: flows.flow_cancel(Q, "ab"),
    "flow_grow": lambda: flows.flow_grow(Q, "ab", 0, "1", 1, 100),
    "flow_spawn": lambda: flows.flow_spawn(Q, "ab", 0, "1", 1, flows.Spawned([flows.Node([], b"E")], [1], "t*1", -1)),
    "flow_unfold": lambda: flows.flow_unfold(Q, "ab"),
    "flow_retry": lambda: flows.flow_retry(Q, "ab", [(0, b"E")]),
    "flow_start": lambda: flows.flow_start(Q, "ab", 1, [0], {"policy": "fail"}),
    "describe": lambda: c.describe(Q, "w", b"info"),
    "announce": lambda: c.announce(GlobalKeys("fastq").queues, "mail", "other"),
    "pause": lambda: pauses.suspend_queue(Q),
    "revise": lambda: timing.revise(GlobalKeys("fastq").schedules, "mail"),
    "follow": lambda: c.follow(Q, "told", ["a", "b"], 1_000),
    "lead": lambda: c.lead(GlobalKeys("fastq"), "s", 1),
    "park": lambda: c.park(Q, "w", [c.Parked("a", "x/~all", 1, 5), c.Parked("b", "y/k", 1, 5)]),
    "lease": lambda: leases.take_lease(LeaseKeys("fastq", "leader", "x"), "o", 1_000),
    "promote": lambda: c.promote(Q),
    "prune": lambda: c.prune(Q, 1),
    "purge": lambda: c.purge(Q),
    "recover": lambda: c.recover(Q, "w", expired=True, charge="all", max_deliveries=3, dead_max=9),
    "register": lambda: c.register(Q, "w", 1, b"info"),
    "remember": lambda: c.remember(Q, "a", "step", b"result", 9),
    "replay": lambda: c.replay(Q, [("a", b"e")]),
    "report": lambda: c.report(Q, "w", "a", b"progress", 1_000, 5, ["line"]),
    "reserve": lambda: c.reserve(Q, "w", 1),
    "resume": lambda: c.resume(Q, "w"),
    "schedule": lambda: timing.schedule(Q, "s", b"", b"d", begin=True, most=9),
    "settle": lambda: c.settle(Q, "w", filled(), 9),
    "watch": lambda: c.watch(Q, 1_000, ["*", "a"]),
    "status": lambda: c.status(Q, "a", ["v", "w"]),
    "tag": lambda: tags.tag(Q, "t", ["a", "b"], 1_000),
    "unpark": lambda: c.unpark(Q, "w", "x/~all", 1, 5),
    "unpark_due": lambda: c.unpark_due(Q),
    "unpause": lambda: pauses.unpause(Q, pauses.Pause("t")),
    "suspend": lambda: timing.suspend(Q, "s", pause=True),
    "trace": lambda: timing.trace(Q, ["s"]),
    "unschedule": lambda: timing.unschedule(Q, "s"),
}
LIMITS = {"acquire", "give_back", "hold", "limit_state", "penalize"}  # tests/unit/test_limits.py
CHECKS = {"check", "mend", "survey"}  # tests/redis/test_check.py


def filled() -> Batch:
    batch = Batch()
    batch.succeeded = ["s"]
    batch.recorded = [("1000:7", 9_000, "r", b"R"), ("60000:1", 99_000, "t", b"T"), ("1000:7", 9_000, "u", b"U")]
    batch.later = [("l", 5, b"L")]
    batch.failed = [("f", b"F", b"error")]
    batch.released = ["x", "y"]
    return batch


def test_every_script_has_a_command() -> None:
    assert set(ONE_OF_EACH) | LIMITS | CHECKS == set(scripts.names())
    for name, make in ONE_OF_EACH.items():
        assert make().script == name


# -- the keys that a command sends are the ones that the head of its script names --------------------------


def named_keys(script: str) -> list[str]:
    """The KEYS paragraph of a head, with `{q}:ready:10 ... {q}:ready:0` written out."""
    head = re.search(r"-- KEYS (.*?)\n(?=-- (?:ARGV|[A-Z])|local)", scripts.expand(script), re.DOTALL)
    assert head is not None
    words = head[1].replace("--", " ").split()
    found: list[str] = []
    for i, word in enumerate(words):
        if word == "..." and i + 1 < len(words):
            first, last = (int(words[at].removeprefix("{q}:ready:")) for at in (i - 1, i + 1))
            found += [f"{{q}}:ready:{priority}" for priority in range(first - 1, last, -1)]
        elif word == "...":
            found.append(f"{words[i - 1]} again")
        else:
            found.append(word)
    return found


def shape(name: str) -> str:
    """A pattern for what stands in angle brackets; `KEY again` may come any number of times."""
    word = re.escape(name.removesuffix(" again").replace("{q}", "fastq:{q}").replace("{n}", "fastq:{lease/leader/x}"))
    word = re.sub(r"<ttl>:<n>", r"\\d+:\\d+", word)
    word = re.sub(r"<(\w+)>", r"[^:]+", word)
    return f"(?:{word} )*" if name.endswith(" again") else f"{word} "


@pytest.mark.parametrize("script", ONE_OF_EACH)
def test_the_head_names_the_keys_in_their_order(script: str) -> None:
    sent = "".join(key.decode() + " " for key in ONE_OF_EACH[script]().keys)
    pattern = "".join(shape(name) for name in named_keys(script))
    pattern = re.sub(r"^(leader|schema|queues|schedules) ", r"fastq:\1 ", pattern)  # of no queue
    assert re.fullmatch(pattern, sent), f"\n{pattern}\n{sent}"


@pytest.mark.parametrize("script", ONE_OF_EACH)
def test_all_keys_of_a_call_are_in_one_slot(script: str) -> None:
    tags = {re.search(rb"\{(.*?)\}", key) for key in ONE_OF_EACH[script]().keys} - {None}
    assert {match[1] for match in tags if match} in ({b"q"}, {b"lease/leader/x"}, set())


# -- arguments -----------------------------------------------------------------------------------------


def test_plain_jobs_take_the_short_path() -> None:
    command = c.enqueue(Q, 7, "p", 3, [NewJob("a", b"A"), NewJob("b", b"B", delay_ms=-1)])
    assert command.args == ["p", 3, "a", b"A", "b", b"B"]
    assert command.keys[1] == b"fastq:{q}:ready:7"


@pytest.mark.parametrize("job", [NewJob("b", b"B", delay_ms=1), NewJob("b", b"B", chosen=True)])
def test_one_job_that_is_not_plain_makes_the_call_full(job: NewJob) -> None:
    command = c.enqueue(Q, 5, "p", 3, [NewJob("a", b"A"), job])
    assert command.args == ["p", 3, "full", "a", b"A", 0, "b", b"B", job.delay_ms]


def test_one_job_with_a_unique_key_makes_it_another_script() -> None:
    command = c.enqueue(Q, 5, "p", 3, [NewJob("a", b"A"), NewJob("b", b"B", 9, "k", once=c.Once("ttl", 60, "keep", 7))])
    assert command.script == "enqueue_once"
    assert command.args[:6] == ["p", 3, 0, 0, 0, ""]
    assert command.args[6:] == ["a", b"A", 0, "", "executed", 0, "keep", 0, "b", b"B", 9, "k", "ttl", 60, "keep", 7]


def test_a_bounded_queue_takes_the_other_script() -> None:
    command = c.enqueue(Q, 5, "p", 3, [NewJob("a", b"A")], c.Bound(9, "raise", 60_000))
    assert (command.script, command.args[2:6]) == ("enqueue_once", [9, 0, 60_000, ""])


def test_settle_lays_its_sections_out_in_order() -> None:
    command = c.settle(Q, "w", filled(), 9)
    assert command.args == [
        9,
        *(1, "s"),
        *(2, "1000:7", 9_000, 2, "r", b"R", "u", b"U", "60000:1", 99_000, 1, "t", b"T"),
        *(1, "l", 5, b"L"),
        *(1, "f", b"F", b"error"),
        *(2, "x", "y"),
    ]
    assert command.keys[-2:] == (b"fastq:{q}:done:1000:7", b"fastq:{q}:done:60000:1")


def test_an_empty_batch() -> None:
    assert len(Batch()) == 0
    assert Batch().ids() == []
    assert c.settle(Q, "w", Batch(), 9).args == [9, 0, 0, 0, 0, 0]


def test_a_batch_counts_and_names_what_is_in_it() -> None:
    assert len(filled()) == 8
    assert filled().ids() == ["s", "r", "t", "u", "l", "f", "x", "y"]


ids = st.lists(st.text("abc", min_size=1, max_size=3), max_size=6)


@given(ids, ids, ids, ids, ids)
def test_the_counts_of_settle_always_fit(
    succeeded: list[str], recorded: list[str], later: list[str], failed: list[str], released: list[str]
) -> None:
    """Walk the arguments as the script does: every section is where the counts say, and nothing is left over."""
    batch = Batch()
    batch.succeeded, batch.released = succeeded, released
    batch.recorded = [(f"{len(i)}:1", len(i), i, b"R") for i in recorded]
    batch.later = [(i, 1, b"L") for i in later]
    batch.failed = [(i, b"F", b"E") for i in failed]
    command = c.settle(Q, "w", batch, 9)
    args, position, found = list(command.args), 1, []
    for width in (1, 0, 3, 3, 1):
        if not width:
            assert args[position] == len(command.keys) - 27
            for _ in range(args[position]):
                count = args[position + 3]
                found += args[position + 4 : position + 4 + 2 * count : 2]
                position += 3 + 2 * count
            position += 1
            continue
        count = args[position]
        found += [args[position + 1 + i * width] for i in range(count)]
        position += 1 + count * width
    assert sorted(found) == sorted(batch.ids())
    assert len(args) == position


def test_recover_says_when_and_whom_it_charges() -> None:
    options: dict[str, Any] = {
        "charge": "started",
        "max_deliveries": 3,
        "dead_max": 9,
        "error": b"E",
        "started": ["a", "b"],
    }
    command = c.recover(Q, "w", expired=False, limit=7, **options)
    assert command.args == ("w", "now", "started", 3, 7, PAD, 9, b"E", "a", "b")
    assert c.recover(Q, "w", expired=True, **options).args[1] == "expired"


def test_replay_takes_any_iterable() -> None:
    assert c.replay(Q, iter([("a", b"A"), ("b", b"B")])).args == ["a", b"A", "b", b"B"]


def test_raw_is_a_plain_command() -> None:
    command = raw("LLEN", Q.ready[5], decode=int)
    assert (command.script, command.keys, command.args) == (None, (), ("LLEN", b"fastq:{q}:ready:5"))
    assert command.decode(b"7") == 7
    assert raw("PING").decode(b"PONG") == b"PONG"


# -- replies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "reply", "decoded"),
    [
        ("cancel", b"cancelled", "cancelled"),
        ("discard", 3, 3),
        ("enqueue", [0], []),
        ("enqueue", [1], []),
        (
            "enqueue",
            [0, [1, b"unique", b"holder"], [4, b"finished", b"\xff"]],
            [c.Refused(1, "unique", b"holder"), c.Refused(4, "finished", b"\xff")],
        ),
        ("extend", [1, 0], [True, False]),
        ("fire", 1, timing.Fired.ENQUEUED),
        ("fire", -2, timing.Fired.CHANGED),
        ("lead", 1, True),
        ("promote", [2, 1_000, -1], c.Promoted(2, 1_000, -1)),
        ("purge", [5, 1], (5, True)),
        ("purge", [0, 0], (0, False)),
        ("recover", [1, 2, -1], c.Recovered(1, 2, -1)),
        ("register", 1_000, 1_000),
        ("replay", 2, 2),
        ("reserve", [2, [b"a"], [None], []], c.Reserved(2, [b"a"], [None], [])),
        ("reserve", b"1 3 a b\x05 \xff", c.Reserved(1, [b"a b"], [b"\x05 \xff"], [])),
        ("resume", [1, [b"a"], [b"A"]], c.Held(1, [b"a"], [b"A"])),
        ("settle", [-1, [b"a"]], c.Settled(-1, [b"a"])),
        ("settle", 3, c.Settled(3, [])),
        ("status", [b"pending", b"E"], [b"pending", b"E"]),
    ],
)
def test_replies(command: str, reply: Any, decoded: Any) -> None:
    assert ONE_OF_EACH[command]().decode(reply) == decoded


# -- scripts -------------------------------------------------------------------------------------------


def test_scripts_are_expanded_and_addressed_by_their_sha() -> None:
    import hashlib

    for name in scripts.names():
        script = scripts.load(name)
        assert b"@include" not in script.text
        assert script.sha.decode() == hashlib.sha1(script.text).hexdigest()
        assert scripts.load(name) is script
