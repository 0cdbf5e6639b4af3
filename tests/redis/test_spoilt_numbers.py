"""A number in a field or a score may be anything, as a foreign writer left it: no script ends of that half-way, and no job is lost (A-18).

A script that fails is not undone: what it has popped would be in no place. So each script that counts with what is stored is
called here on garbage, and afterwards every job is still in exactly one place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from fastq import job
from fastq.broker import batches, commands, flows, leases, scripts, timing
from fastq.broker.checker import check
from fastq.broker.commands import Bound, NewJob, Once, Parked
from fastq.broker.flows import Node
from fastq.broker.keys import GlobalKeys, LeaseKeys
from fastq.errors import BrokerReplyError
from fastq.limits import FixedWindow, Rule, SlidingWindow, TokenBucket
from tests.redis.lab import LEASE, Lab, envelope, texts
from tests.redis.limit_lab import LimitLab

NO_NUMBERS = [b"", b"x", b"nan", b"inf", b"-inf", b"1e400", b"99999999999999999999", b"0.5", b"\xff\x00"]
SPOILT = [*NO_NUMBERS, b"-7", b"9223372036854775807", b"-9223372036854775808"]
FAR_OFF = (b"99999999999999999999", b"9223372036854775807")
BATCH = "0123456789abcdef01234567"
JOB = job.encode(job.Envelope(5, 1, "t", b"\x90", 0, 0, job.Extra(takes=-1)))
ENDLESS = "18446744073709551615-18446744073709551615"


@pytest.fixture
def limits(redis_url: str, raw: Any) -> Iterator[LimitLab]:
    lab = LimitLab(redis_url, raw)
    yield lab
    lab.conn.close()


pytestmark = pytest.mark.leaves_keys("a foreign writer gives its keys no lifetime")
spoilt = pytest.mark.parametrize("value", SPOILT)


@pytest.fixture
def two(lab: Lab) -> Iterator[Lab]:
    """A worker that may take jobs, and two pending ones; in the end none may be without a place."""
    lab.raw.sadd("fastq:queues", "default")
    lab.register()
    lab.enqueue("a", "b")
    yield lab
    lab.raw.delete(lab.q.events)
    found = lab.conn.run(check("fastq"))
    assert [str(fault) for fault in found.faults if fault.code in ("lost", "twice")] == []


@spoilt
@pytest.mark.parametrize("charge", ["all", "started"])
def test_deliveries(two: Lab, value: bytes, charge: str) -> None:
    """A count that is none begins anew: the job runs again, and its neighbours too."""
    two.reserve()
    two.raw.hset(two.q.deliveries, "a", value)
    got = two.recover(charge=charge, started=["a", "b"], max_deliveries=3)
    assert (got.ready, got.dead, got.remaining) == (2, 0, 0)
    assert int(two.raw.hget(two.q.deliveries, "a")) <= 1
    two.raw.hset(two.q.deliveries, "a", value)
    two.register()
    got = two.reserve()
    assert len(got.deliveries) == len(got.ids) == 2, "a hole in a reply ends it"


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_ghosts(two: Lab, value: bytes) -> None:
    """A count that is none hides no job, whoever looks for one."""
    two.raw.hset(two.q.ghosts, "a", value)
    assert texts(two.reserve().ids) == ["a", "b"]
    two.enqueue("c", "d", "e")
    two.raw.hset(two.q.ghosts, mapping={"c": value, "d": value})
    full = commands.enqueue(two.q, 5, "q", 1, [NewJob("f", envelope())], Bound(1, "drop_oldest", 0))
    assert two.call(full) == []
    assert two.call(commands.cancel(two.q, "d", ["w"], b"", 0)) == "cancelled"
    assert texts(two.reserve().ids) == ["e", "f"]
    two.enqueue("g")
    two.raw.hset(two.q.ghosts, "g", value)
    assert two.call(commands.purge(two.q))[0] == 1
    assert not two.raw.exists(two.q.ghosts)


@spoilt
@pytest.mark.parametrize("how", ["later", "released", "failed", "succeeded", "park", "recover"])
def test_requests_to_cancel(two: Lab, value: bytes, how: str) -> None:
    """What asks for the end of a running job says nothing else that can be read: it ends, or it has ended."""
    two.reserve()
    for request in (value, b"t" + value + b":record", b"c:"):
        two.raw.hset(two.q.cancels, "a", request)
    if how == "park":
        settled = two.call(commands.park(two.q, "w", [Parked("a", "x/~all", 1, 9), Parked("b", "x/~all", 2, 9)]))
    elif how == "recover":
        assert two.recover().remaining == 0
        return
    else:
        row = {"later": ("a", 0, envelope()), "failed": ("a", envelope(), b"error")}.get(how, "a")
        settled = two.settle(**{how: [row]}, **({"succeeded": ["b"]} if how != "succeeded" else {"released": ["b"]}))
    assert (settled.held, settled.stale) == (0, [])


@spoilt
@pytest.mark.parametrize("field", ["*", "a"])
def test_who_watches(two: Lab, value: bytes, field: str) -> None:
    """Whoever wants to know of a job is no reason to lose it."""
    two.raw.hset(two.q.awaited, field, value)
    two.raw.hset(two.q.awaited, "b", "!")
    two.raw.xadd(two.q.events, {"x": "y"}, id=ENDLESS)
    assert texts(two.reserve().ids) == ["a", "b"]
    two.settle(later=[("a", 0, envelope())], succeeded=["b"])
    assert texts(two.reserve().ids) == ["a"]
    assert two.recover(charge="all", max_deliveries=1).dead == 1
    two.enqueue("c")
    two.raw.hset(two.q.awaited, field, value)
    assert two.call(commands.cancel(two.q, "c", [], b"", 0)) == "cancelled"
    assert not two.raw.exists(two.q.running("w"))


@spoilt
@pytest.mark.parametrize("field", ["total", "success", "failed", "cancelled", "ttl", "next", "torn"])
def test_batches(two: Lab, value: bytes, field: str) -> None:
    """A batch that somebody has spoilt may end too early or never; its jobs, and those of others, end as they should."""
    two.call(batches.batch_open(two.q, BATCH, {"task": "t", "ttl": LEASE}))
    two.raw.hset(two.q.batch(BATCH), field, value)
    ids = [f"{BATCH}-{n}" for n in range(4)]
    assert two.call(commands.enqueue(two.q, 5, "q", 1, [NewJob(i, envelope()) for i in ids[:3]], None, BATCH)) == []
    keyed = [NewJob(ids[3], envelope(), 0, "k")]
    assert two.call(commands.enqueue(two.q, 5, "q", 2, keyed, None, BATCH)) == []
    two.call(batches.batch_close(two.q, BATCH, "whole"))
    two.reserve()
    two.raw.hset(two.q.batch(BATCH), field, value)
    assert two.settle(succeeded=["a", *ids[:2]], failed=[(ids[2], envelope(), b"e")]).stale == []
    assert two.settle(succeeded=["b", ids[3]]).held == 0
    assert not two.raw.exists(two.q.unique), "what comes after the batch is done, too"


@spoilt
@pytest.mark.parametrize("field", ["open", "bad", "ttl", "policy", "later", "p2", "c0", "c2", "nodes", "state", "g2"])
def test_workflows(two: Lab, value: bytes, field: str) -> None:
    """A workflow that somebody has spoilt may stand still; nobody else does."""
    nodes = [Node([2], JOB), Node([2], JOB), Node([3], None, [0, 1], 2), Node([], JOB)]
    fields = {"policy": "fail", "ttl": LEASE, "success": b"S", "failed": b"F", "cancelled": b"C"}
    two.conn.run(flows.submit(two.q, BATCH, nodes, [0, 1], fields, GlobalKeys("fastq").queues))
    spoil = {field: value}
    if field == "c0":  # lists that would never end
        spoil["c1"] = b"3-9/0," + b"9" * 400 + b"*" + b"9" * 400
    two.raw.hset(two.q.flow(BATCH), mapping=spoil)
    two.raw.sadd(two.q.unfolding, BATCH)
    assert set(texts(two.reserve(want=99).ids)) >= {"a", "b", f"{BATCH}.0", f"{BATCH}.1"}
    two.raw.hset(two.q.flow(BATCH), mapping=spoil)
    assert two.settle(succeeded=["a", f"{BATCH}.0"]).stale == []
    assert two.settle(failed=[(f"{BATCH}.1", JOB, b"e")], succeeded=["b"]).stale == []
    two.reserve()
    two.raw.hset(two.q.flow(BATCH), mapping={field: value, "state": "failed"})
    two.call(flows.flow_retry(two.q, BATCH, [(1, JOB)]))
    two.call(flows.flow_cancel(two.q, BATCH))


@spoilt
@pytest.mark.parametrize(
    "fields", [["debt"], ["at"], ["total"], ["oldest"], ["count"], ["start"], ["until"], ["pace"], ["since"], ["recovery"], ["halved"], ["7"],
               ["nan"], ["debt", "at", "total", "oldest", "count", "start", "pace", "since", "recovery", "halved", "99999999999999999999"]],
    ids="+".join,
)  # fmt: skip
@pytest.mark.parametrize("rate", [TokenBucket(10, burst=5), SlidingWindow(5, 10), FixedWindow(5, "hour")], ids=type)
def test_limits(limits: LimitLab, rate: Any, fields: list[str], value: bytes) -> None:
    """What a limiter has granted may be lost, and grants begin anew; it never fails for good."""
    lab = limits
    lab.use(Rule(rate, 2))

    def spoil() -> None:
        lab.raw.hset(lab.keys.state, mapping=dict.fromkeys(fields, value))

    lab.acquire(need=2)
    lab.penalize(0.001, 10.0)
    lab.after(1.0)
    for _ in range(2):
        spoil()
        granted = lab.acquire(need=2)
        spoil()
        lab.give_back(2, granted.now_us)
        spoil()
        lab.state()
        spoil()
        lab.slots("p:1", "p:2", most=2)
        spoil()
        lab.penalize(0.001, 10.0)
        lab.after(3_600.0).use(Rule(rate, 2))
    lab.penalize(0.0)
    lab.after(3_600.0).use(Rule(rate, 2))
    assert lab.acquire(need=1).status == b"granted" or value in FAR_OFF, "a far time is one, too"


@pytest.mark.parametrize("score", [float("inf"), float("-inf"), 1e300, -1e300, 0.5])
def test_scores(two: Lab, limits: LimitLab, raw: Any, score: float) -> None:
    """Times that are none: nothing is due, or everything."""
    limits.use(Rule(TokenBucket(10, burst=5), 3))
    raw.zadd(limits.keys.slots, {"foreign": score})
    assert limits.slots("p:1", "p:2", most=3).status == b"granted"
    limits.hold("foreign")
    limits.state()
    two.enqueue(NewJob("late", envelope(), 1_000_000))
    raw.zadd(two.q.due, {"late": score})
    two.enqueue(NewJob("later", envelope(), 1_000_000), NewJob("keyed", envelope(), 9, "k", True, Once()))
    two.call(commands.promote(two.q))
    raw.zadd(two.q.workers, {"dead": score})
    two.call(commands.clamp(two.q, [("dead", LEASE), ("w", LEASE)]))
    two.recover("dead", expired=True)
    raw.zadd(two.q.parked, {"x/~all": score})
    two.call(commands.unpark_due(two.q))
    for key in (limits.keys.slots, limits.keys.state, limits.keys.wake):
        raw.delete(key)


@spoilt
def test_leases_and_locks(lab: Lab, value: bytes) -> None:
    """Whoever holds a lock that says no time holds nothing."""
    keys = LeaseKeys("fastq", "lock", "l")
    for field in ("until", "token"):
        lab.raw.hset(keys.lease, mapping={"owner": "dead", "until": 1, "token": 1, field: value})
        taken = lab.call(leases.take_lease(keys, "me", 1_000))
        assert taken.token > 0 or value in FAR_OFF
        lab.call(leases.renew_lease(keys, "me", 1_000))
        lab.call(leases.release_lease(keys, "me"))
        lab.raw.delete(keys.lease, keys.wake)


@pytest.mark.parametrize("value", [*NO_NUMBERS, b"-7"])
def test_ticks(two: Lab, value: bytes) -> None:
    two.call(timing.schedule(two.q, "s", b"", b"d", begin=True, most=9))
    two.raw.hset(two.q.ticks, "s", value)
    two.raw.hset(two.q.runs, "s", value)
    assert two.call(timing.suspend(two.q, "s", pause=True))
    assert two.call(timing.suspend(two.q, "s", pause=False))
    two.raw.hset(two.q.ticks, "s", value)
    fired = two.call(timing.fire(two.q, 5, "s", two.now(), "tick", envelope(), b"d", overlap="skip"))
    two.call(timing.trace(two.q, ["s"]))
    assert fired is timing.Fired.ENQUEUED or value in FAR_OFF, "a far tick is one, too"


@spoilt
def test_what_was_said(two: Lab, value: bytes) -> None:
    """A producer that asks once more gets an answer of the size of its question."""
    jobs = [NewJob("a", envelope(), 0, "k"), NewJob("new", envelope(), 0, "k")]
    command = commands.enqueue(two.q, 5, "q", 1, jobs)
    two.call(command)
    for text in (value, b"0 full " + value, b"9999999 finished -", b"1 full 99999999999999999999"):
        two.raw.set(f"{two.q.base}said:q:1", text, keepttl=True)
        with contextlib.suppress(IndexError, KeyError):
            assert len(two.call(command)) <= 2 + len(jobs)


def test_one_that_counts_blindly_is_found(two: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: recover.lua as it was, which ended between taking a job and putting it back."""
    text = scripts.expand("recover")
    sound = "add(deliveries, id, 1) >= most"
    assert sound in text
    blind = scripts.Script("recover", text.replace(sound, "redis.call('HINCRBY', deliveries, id, 1) >= most"))
    original = scripts.load
    monkeypatch.setattr(scripts, "load", lambda name: blind if name == "recover" else original(name))
    two.reserve()
    two.raw.hset(two.q.deliveries, mapping={"a": "x", "b": "x"})
    for _ in range(2):
        with pytest.raises(BrokerReplyError, match="not an integer"):
            two.recover(charge="all")
    assert two.recover(charge="all").ready == 0
    found = two.conn.run(check("fastq", repair=True))
    assert {(fault.name, fault.code) for fault in found.faults} >= {("a", "lost"), ("b", "lost")}


@spoilt
@pytest.mark.parametrize("unique", ["", "key"])
def test_the_last_number_of_a_producer(lab: Lab, value: bytes, unique: str) -> None:
    """A number far ahead of Redis's clock would have all that this producer sends pass for repeated, and so for stored."""
    lab.raw.hset(lab.q.producers, "p", value)
    assert lab.enqueue(NewJob("c", envelope(), unique=unique)) == []
    assert texts(lab.raw.hkeys(lab.q.jobs)) == ["c"]
    assert lab.raw.llen(lab.q.ready[5]) == 1
