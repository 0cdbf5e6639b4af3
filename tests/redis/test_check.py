"""``fastq check``: every fault is found and told from what merely moves; what is mended is whole and runs (invariant I1)."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import pytest

from fastq.broker import checker, commands
from fastq.broker.checker import Fault, Row, ask, survey
from fastq.broker.commands import Batch, NewJob, Once, Parked
from fastq.broker.keys import PAD
from fastq.cli import root
from tests.conftest import MakeServer, connect
from tests.redis.lab import FAR, Lab, batch, envelope
from tests.sound import assert_sound, checked

Spoil = Callable[[Lab], Any]
ALL = [f"j{n}" for n in range(8)]


@pytest.fixture
def full(lab: Lab) -> Lab:
    """One queue with a job in every state: j0, j1 pending, j2 due, j3 parked, j4 and j5 running, j6 dead, j7 unique."""
    lab.raw.sadd("fastq:queues", "default")
    lab.take("j3", "j4", "j5", "j6")
    lab.call(commands.park(lab.q, "w", [Parked("j3", "x/~all", 1, FAR)]))
    lab.call(commands.settle(lab.q, "w", batch(failed=[("j6", envelope(), b"error")]), 100))
    lab.enqueue("j0", "j1")
    lab.enqueue(NewJob("j2", envelope(), FAR, chosen=True), NewJob("j7", envelope(), 0, "key", True, Once("started")))
    lab.raw.hset(lab.q.deliveries, "j4", 1)
    lab.call(commands.cancel(lab.q, "j5", ["w"], b"", 0))
    lab.call(commands.follow(lab.q, "told", ["j0"], FAR))
    return lab


def codes(faults: list[Fault]) -> set[tuple[str, str, str]]:
    return {(fault.code, fault.name, fault.state) for fault in faults}


def test_a_queue_with_a_job_in_every_state_is_sound(full: Lab, redis_url: str) -> None:
    found = assert_sound(redis_url)
    assert (found.queues, found.jobs, found.complete) == (1, 7, True)
    assert found.keys == len(full.raw.keys("*"))


def test_nothing_at_all_is_sound(redis_url: str) -> None:
    assert assert_sound(redis_url).queues == 0


SPOILED: dict[str, tuple[Spoil, set[tuple[str, str]]]] = {
    "a job that nobody has": (lambda lab: lab.raw.lrem(lab.q.ready[5], 0, "j0"), {("lost", "j0")}),
    "a running job that nobody holds": (lambda lab: lab.raw.srem(lab.q.running("w"), "j4"), {("lost", "j4")}),
    "a job twice in a list": (lambda lab: lab.raw.rpush(lab.q.ready[5], "j0"), {("twice", "j0")}),
    "a job in two lists": (lambda lab: lab.raw.rpush(lab.q.ready[9], "j0"), {("twice", "j0")}),
    "a running job that is ready": (lambda lab: lab.raw.rpush(lab.q.ready[5], "j4"), {("twice", "j4")}),
    "a due job that is ready": (lambda lab: lab.raw.rpush(lab.q.ready[5], "j2"), {("twice", "j2")}),
    "a parked job that is due": (lambda lab: lab.raw.zadd(lab.q.due, {"j3": 1}), {("twice", "j3")}),
    "an entry without a job": (lambda lab: lab.raw.rpush(lab.q.ready[5], "gone"), {("empty", "gone")}),
    "a due entry without a job": (lambda lab: lab.raw.zadd(lab.q.due, {"gone": 1}), {("empty", "gone")}),
    "an id that runs without a job": (lambda lab: lab.raw.sadd(lab.q.running("w"), "gone"), {("empty", "gone")}),
    "an envelope that is gone": (lambda lab: lab.raw.hdel(lab.q.jobs, "j2"), {("empty", "j2")}),
    "a ghost without an entry": (lambda lab: lab.raw.hset(lab.q.ghosts, "gone", 2), {("ghost", "gone")}),
    "more ghosts than entries": (lambda lab: lab.raw.hset(lab.q.ghosts, "j0", 2), {("ghost", "j0"), ("lost", "j0")}),
    "a delivery of no job": (lambda lab: lab.raw.hset(lab.q.deliveries, "gone", 1), {("stray", "gone")}),
    "a request for no job": (lambda lab: lab.raw.hset(lab.q.cancels, "gone", "c0:"), {("stray", "gone")}),
    "a waiter for no job": (lambda lab: lab.raw.hset(lab.q.awaited, "gone", "told"), {("stray", "gone")}),
    "a unique key that names no job": (lambda lab: lab.raw.hset(lab.q.unique, "old", "gone"), {("stray", "gone")}),
    "a unique key without its way back": (lambda lab: lab.raw.hdel(lab.q.unique_of, "j7"), {("stray", "j7")}),
    "a unique key that was taken": (lambda lab: lab.raw.hset(lab.q.unique, "key", "j0"), {("unique", "j7"), ("stray", "j0")}),
    "a unique key that is gone": (lambda lab: lab.raw.hdel(lab.q.unique, "key"), {("unique", "j7")}),
    "a start that belongs to no key": (lambda lab: lab.raw.hset(lab.q.unique_start, "j0", "k"), {("stray", "j0")}),
    "a job whose parking is unknown": (lambda lab: lab.raw.hdel(lab.q.parked_of, "j3"), {("stray", "j3")}),
    "a parking without its job": (lambda lab: lab.raw.zrem(lab.q.parked_by("x/~all"), "j3"), {("stray", "j3"), ("lost", "j3"), ("stray", "x/~all")}),
    "a limit that nobody looks after": (lambda lab: lab.raw.zrem(lab.q.parked, "x/~all"), {("limit", "x/~all")}),
    "a limit without jobs": (lambda lab: lab.raw.zadd(lab.q.parked, {"y/~all": 1}), {("stray", "y/~all")}),
    "a worker without a lease": (lambda lab: lab.raw.zrem(lab.q.workers, "w"), {("orphan", "w"), ("stray", "jobs")}),
    "a worker without its pad": (lambda lab: lab.raw.srem(lab.q.running("w"), PAD), {("pad", "w")}),
    "the card of nobody": (lambda lab: lab.raw.hset(lab.q.info, "v", "card"), {("stray", "v")}),
    "jobs without the pad": (lambda lab: lab.raw.hdel(lab.q.jobs, PAD), {("pad", "jobs")}),
    "a dead letter that no list names": (lambda lab: lab.raw.zrem(lab.q.dead, "j6"), {("letter", "j6")}),
    "a dead letter without its error": (lambda lab: lab.raw.hdel(lab.q.dead_errors, "j6"), {("letter", "j6")}),
    "an error of no dead letter": (lambda lab: lab.raw.hset(lab.q.dead_errors, "gone", "e"), {("stray", "gone")}),
    "a queue that nobody announced": (lambda lab: lab.raw.srem("fastq:queues", "default"), {("unannounced", "default")}),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_wrong_is_found_and_mended(full: Lab, redis_url: str, name: str) -> None:
    """Each fault by itself; afterwards the queue is sound, and every job that there was is still there, and only once."""
    spoil, expected = SPOILED[name]
    before = full.jobs()
    spoil(full)
    spoiled = full.keys()
    found = checked(redis_url).faults
    assert full.keys() == spoiled, "a look changes nothing"
    assert {(fault.code, fault.name) for fault in found} == expected
    assert all(fault.queue == "default" and str(fault) for fault in found)
    mended = checked(redis_url, repair=True)
    assert {fault.state for fault in mended.faults} == {"repaired"}
    assert_sound(redis_url)
    assert before - {"j2"} <= full.jobs()
    assert full.jobs() == before - ({"j2"} if name == "an envelope that is gone" else set())


TOGETHER = [
    ("jobs without the pad", "a worker without a lease"),
    ("a dead letter that no list names", "a dead letter without its error"),
    ("a parked job that is due", "a job whose parking is unknown"),
    tuple(name for name in SPOILED if name != "an envelope that is gone"),
]


@pytest.mark.parametrize("names", TOGETHER, ids=["pads", "letter", "parking", "everything"])
def test_one_repair_leaves_nothing_for_a_second(full: Lab, redis_url: str, names: tuple[str, ...]) -> None:
    """What is mended may show what else is wrong: a lease that is back wants the pad, a letter that is listed its error."""
    before = full.jobs()
    for name in names:
        SPOILED[name][0](full)
    mended = checked(redis_url, repair=True)
    assert {fault.state for fault in mended.faults} == {"repaired"}
    assert mended.jobs == 7, "of one pass"
    assert_sound(redis_url)
    assert full.jobs() == before


def test_what_is_left_open_is_told_once(full: Lab, redis_url: str) -> None:
    """The second pass finds it again."""
    full.raw.lrem(full.q.ready[5], 0, "j0")
    full.raw.hset(full.q.cancels, "j1", "c0:")
    assert codes(checked(redis_url, repair=True).faults) == {("lost", "j0", "repaired"), ("stray", "j1", "open")}
    assert len(checked(redis_url, repair=True).faults) == 1


def test_repairs_are_bounded(full: Lab, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who breaks it again while it is mended keeps no check busy for ever."""
    walks = []

    def spoilt(self: Any) -> Any:
        walks.append(self)
        full.raw.lrem(full.q.ready[5], 0, "j0")
        return walk(self)

    walk = checker._Queue.walk
    monkeypatch.setattr(checker._Queue, "walk", spoilt)
    assert len(checked(redis_url, repair=True).faults) == len(walks) == checker.PASSES
    walks.clear()
    assert len(checked(redis_url).faults) == len(walks) == 1


OPEN: dict[str, tuple[Spoil, set[tuple[str, str]]]] = {
    "two workers hold a job": (lambda lab: (lab.register("v"), lab.raw.sadd(lab.q.running("v"), "j4")), {("twice", "j4")}),
    "a dead letter without its envelope": (lambda lab: lab.raw.hdel(lab.q.dead_jobs, "j6"), {("letter", "j6")}),
    "a dead job that is pending": (lambda lab: lab.enqueue("j6"), {("twice", "j6")}),
    "a request for a job that does not run": (lambda lab: lab.raw.hset(lab.q.cancels, "j0", "c0:"), {("stray", "j0")}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN)
def test_what_would_be_a_guess_is_left_alone(full: Lab, redis_url: str, name: str) -> None:
    spoil, expected = OPEN[name]
    spoil(full)
    before = full.keys()
    found = checked(redis_url, repair=True)
    assert codes(found.faults) == {(code, job, "open") for code, job in expected}
    assert found.left == found.faults
    assert full.keys() == before


@pytest.mark.leaves_keys
def test_keys_that_nobody_knows(full: Lab, redis_url: str) -> None:
    full.raw.set("fastq:scratch", "1")
    full.raw.set(f"{full.q.base}jobz", "1")
    full.raw.set(f"{full.q.base}progress:j4", "1")
    full.raw.delete(full.q.paused)
    full.raw.rpush(full.q.paused, "1")
    full.raw.hset(f"{full.q.base}flow:ended", "state", "success")
    full.raw.hset(f"{full.q.base}flow:open", "state", "running")
    full.raw.zadd(f"{full.q.base}groups", {"open": 1})
    full.raw.set("other:key", "not ours")
    found = checked(redis_url, repair=True)
    assert codes(found.faults) == {
        ("unknown", "fastq:scratch", "open"),
        ("unknown", f"{full.q.base}jobz", "open"),
        ("endless", f"{full.q.base}progress:j4", "open"),
        ("endless", f"{full.q.base}flow:ended", "open"),
        ("type", f"{full.q.base}paused", "open"),
    }
    assert checked(redis_url, "other").faults == [], "of other queues only"


def test_a_mended_job_runs_and_a_worker_without_a_lease_is_recovered(full: Lab, redis_url: str) -> None:
    full.raw.zrem(full.q.workers, "w")
    full.raw.lrem(full.q.ready[5], 0, "j0")
    checked(redis_url, repair=True)
    full.recover("w", expired=True)
    assert_sound(redis_url)
    full.register("v")
    assert {i.decode() for i in full.reserve(10, "v").ids} >= {"j0", "j4"}


def test_the_scripts_twice(full: Lab) -> None:
    """A lost reply of a repair: what is mended is no fault any more, and nothing changes again."""
    full.raw.lrem(full.q.ready[5], 0, "j0")
    full.raw.rpush(full.q.ready[5], "j4", "gone")
    rows = [Row("job", job) for job in (b"j0", b"j4", b"gone", b"j1")]
    assert [[fault[0] for fault in row] for row in full.call(ask(full.q, "full", rows))] == [
        [b"lost"],
        [b"twice"],
        [b"empty"],
        [],
    ]
    assert full.call(ask(full.q, "look", rows)) == [[[b"ready", b"", 0]], [], [], [[b"ready", b"", 0]]]
    first, second = full.twice(ask(full.q, "mend", rows))
    assert [[fault[2] for fault in row] for row in first] == [[2], [2], [2], []]
    assert second == [[], [], [], []]


@pytest.mark.parametrize("kind", ["hash", "set", "zset", "list"])
def test_survey_reads_every_name_in_pages(lab: Lab, kind: str) -> None:
    names = {f"n{i}" for i in range(700)}
    fill = {
        "hash": lambda: lab.raw.hset("fastq:k", mapping=dict.fromkeys(names, "x" * 100)),
        "set": lambda: lab.raw.sadd("fastq:k", *names),
        "zset": lambda: lab.raw.zadd("fastq:k", dict.fromkeys(names, 1)),
        "list": lambda: lab.raw.rpush("fastq:k", *names),
    }
    fill[kind]()
    found, cursor, pages = set(), b"0", 0
    while True:
        cursor, page = lab.call(survey(b"fastq:k", kind, cursor, 100))
        found |= {name.decode() for name in page}
        pages += 1
        if cursor == b"0":
            break
    lab.raw.delete("fastq:k")
    assert found == names
    assert pages > 3


def test_it_is_bounded(full: Lab, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More faults, or more jobs, than are looked at: it says so, and what it says is true."""
    monkeypatch.setattr(checker, "MOST_FAULTS", 60)
    full.raw.hset(full.q.jobs, mapping={f"x{n}": envelope() for n in range(200)})
    found = checked(redis_url)
    assert 60 <= len(found.faults) <= 60 + checker.ROWS
    assert not found.complete
    monkeypatch.setattr(checker, "MOST_FAULTS", 1_000)
    monkeypatch.setattr(checker, "MOST_JOBS", 100)
    found = checked(redis_url)
    assert not found.complete
    assert {fault.code for fault in found.faults} <= {"lost"}
    checked(redis_url, repair=True)


# -- keys of a foreign type, and a Redis that refuses ---------------------------------------------------------


foreign = pytest.mark.leaves_keys("what somebody else has written")


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`fastq check` as a shell sees it."""

    def call(url: str, *arguments: str) -> Said:
        capsys.readouterr()
        code = root.run(["check", "--redis-url", url, *arguments])
        return Said(code, *capsys.readouterr())

    return call


NEEDED = {
    "jobs": "hash", "ready:0": "list", "ready:10": "list", "due": "zset", "workers": "zset", "info": "hash", "running:w": "set",
    "deliveries": "hash", "ghosts": "hash", "cancels": "hash", "unique": "hash", "unique:of": "hash", "unique:start": "hash",
    "parked": "zset", "parked:of": "hash", "parked:by:x/~all": "zset", "dead": "zset", "dead:jobs": "hash", "dead:errors": "hash",
    "awaited": "hash", "wake": "list",
}  # fmt: skip
"""Keys without which nothing can be said of a queue, and their types."""


@foreign
@pytest.mark.parametrize("name", NEEDED)
def test_a_key_of_a_foreign_type(full: Lab, redis_url: str, say: Callable[..., Said], name: str) -> None:
    """It is named with both types and what to do, and stays; every other queue is looked at and mended."""
    key, there, wanted = f"{full.q.base}{name}", "set" if name == "due" else "string", NEEDED[name]
    full.raw.delete(key)
    full.raw.sadd(key, "foreign") if there == "set" else full.raw.set(key, "foreign")
    with_lost_jobs(full, "after", "b3fore")
    for answer in (say(redis_url), say(redis_url, "--repair"), say(redis_url, "--repair", "default")):
        assert (answer.code, answer.err) == (5, "")
        line, advice = answer.out[answer.out.index(" FAULT  default") :].splitlines()[:2]
        assert line == f" FAULT  default      type        {key}: the key is of type {there}, not {wanted}"
        assert advice == f"        -> RENAME {key} foreign:{key} puts it away, DEL {key} loses what is in it"
        assert "nothing else of default was looked at: a key that this needs is of a wrong type" in answer.out
    assert full.raw.type(key) == there.encode()
    full.raw.rename(key, f"foreign:{key}")
    assert json.loads(say(redis_url, "--json", "--repair").out)["skipped"] == []
    assert {fault.state for fault in checked(redis_url).faults} <= {"open"}


def test_a_redis_that_takes_no_writes_can_be_looked_at(full: Lab, redis_url: str, say: Callable[..., Said]) -> None:
    """Who looks whether all is well does so when it is not: nothing is written without --repair."""
    with_lost_jobs(full, "after")
    full.raw.config_set("min-replicas-to-write", 1)
    try:
        answer, refused = say(redis_url), say(redis_url, "--repair")
    finally:
        full.raw.config_set("min-replicas-to-write", 0)
    assert (answer.code, answer.err) == (5, "")
    assert re.search(r"FAULT  after +lost ", answer.out)
    assert refused.code == 1
    assert "NOREPLICAS" in refused.err
    assert say(redis_url, "--repair").code == 0


def with_lost_jobs(lab: Lab, *queues: str) -> None:
    """More queues, each with a job in no place."""
    for queue in queues:
        lab.raw.sadd("fastq:queues", queue)
        lab.raw.hset(f"fastq:{{{queue}}}:jobs", "x", envelope())


@foreign
def test_other_queues_are_looked_at_beside_one_that_cannot_be(full: Lab, redis_url: str) -> None:
    full.raw.delete(full.q.jobs)
    full.raw.set(full.q.jobs, "foreign")
    full.raw.delete(full.q.info)
    full.raw.set(full.q.info, "foreign")
    with_lost_jobs(full, "after", "b3fore")
    found = checked(redis_url, repair=True)
    assert [(fault.code, fault.queue, fault.state) for fault in found.faults] == [
        *[("type", "default", "open")] * 2,
        ("lost", "after", "repaired"),
        ("lost", "b3fore", "repaired"),
    ]
    assert (found.queues, found.jobs, found.skipped) == (3, 2, ["default"])


@foreign
def test_a_key_that_no_check_needs(full: Lab, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, even when there are too many keys to look at all, and the jobs are looked at."""
    full.raw.set(full.q.ticks, "foreign")
    full.raw.lrem(full.q.ready[5], 0, "j0")
    ticks = ("type", f"{full.q.base}ticks", "open")
    found = checked(redis_url)
    assert codes(found.faults) == {ticks, ("lost", "j0", "reparable")}
    assert (len(found.faults), found.skipped) == (2, [])
    monkeypatch.setattr(checker, "_key_space", lambda *_: iter_of({}))
    assert ticks in codes(checked(redis_url).faults)


def iter_of(value: Any) -> Any:
    """An operation that asks nothing."""
    return value
    yield


@foreign
def test_the_set_of_queues_is_something_else(full: Lab, redis_url: str) -> None:
    """Queues are found by their keys then, and none is called unannounced."""
    full.raw.delete("fastq:queues")
    full.raw.set("fastq:queues", "foreign")
    full.raw.lrem(full.q.ready[5], 0, "j0")
    expected = {("type", "fastq:queues", "open"), ("lost", "j0", "reparable")}
    assert codes(checked(redis_url).faults) == codes(checked(redis_url, "default").faults) == expected
    assert full.raw.get("fastq:queues") == b"foreign"


def spoilt(url: str) -> None:
    """Two queues; to mend the first one nothing is pushed, to mend the second one something is."""
    with connect(url) as raw:
        raw.sadd("fastq:queues", "first", "second")
        raw.hset("fastq:{first}:deliveries", "gone", 1)
        raw.hset("fastq:{second}:deliveries", "gone", 1)
        raw.hset("fastq:{second}:jobs", "x", envelope())


def test_what_was_mended_before_a_refusal_is_told(make_server: MakeServer, say: Callable[..., Said]) -> None:
    server = make_server(port=0)
    spoilt(server.url)
    assert server.ask(b"ACL", b"SETUSER", b"fastq", b"on", b">s3cret", b"~*", b"+@all", b"-lpush") == b"+OK\r\n"
    url = f"redis://fastq:s3cret@127.0.0.1:{server.port}/0"
    answer = say(url, "--repair")
    assert answer.code == 1
    told = [line.split()[:3] for line in answer.out.splitlines()]
    assert told[:3] == [["mended", "first", "stray"], ["FAULT", "second", "lost"], ["FAULT", "second", "stray"]]
    assert "2 queues, 1 job, 4 keys: 2 faults, 1 mended" in answer.out
    assert "there is more than was looked at" in answer.out
    (line,) = answer.err.splitlines()
    assert line.startswith("fastq: queue 'second' was looked at in part: ")
    assert "lpush" in line
    assert "s3cret" not in line
    report = say(url, "--repair", "--json")
    assert (report.code, json.loads(report.out)["complete"]) == (1, False)


REFUSALS = {
    "NOREPLICAS": [b"CONFIG SET min-replicas-to-write 1"],
    "READONLY": [b"REPLICAOF 127.0.0.1 1"],
    "OOM": [b"SREM fastq:queues first second", b"CONFIG SET maxmemory 1"],
}


@pytest.mark.parametrize("why", REFUSALS)
def test_a_redis_that_takes_no_writes(make_server: MakeServer, say: Callable[..., Said], why: str) -> None:
    """It is there and says no, so the exit status is not that of a Redis that is away."""
    server = make_server()
    spoilt(server.url)
    with connect(server.url) as raw:
        raw.set("fastq:{first}:ticks", "foreign")
    for command in REFUSALS[why]:
        assert server.ask(*command.split()).startswith((b"+OK", b":2"))
    answer = say(server.url, "--repair")
    assert answer.code == 1
    assert " FAULT  first        type" in answer.out
    assert (" FAULT  first        unannounced" in answer.out) == (why == "OOM"), "which is where it was refused"
    (line,) = answer.err.splitlines()
    assert line.startswith("fastq: queue 'first' was looked at in part: ")
    assert f": {why} " in line


def test_a_redis_that_goes_away(
    make_server: MakeServer, say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server()
    spoilt(server.url)
    mend = checker._Queue._mend

    def and_gone(self: Any, *arguments: Any) -> Any:
        yield from mend(self, *arguments)
        server.kill()

    monkeypatch.setattr(checker._Queue, "_mend", and_gone)
    answer = say(server.url, "--repair")
    assert (answer.code, answer.out.startswith("mended  first        stray")) == (3, True)
    assert answer.err.startswith("fastq: queue 'first' was looked at in part: cannot reach ")


class Traffic:
    """Producers, two workers and an operator that never stop: every kind of move, as fast as they can."""

    def __init__(self, url: str) -> None:
        self.over = threading.Event()
        self.moves = 0
        self.errors: list[Exception] = []
        self.threads = [threading.Thread(target=self.run, args=(url, n)) for n in range(2)]

    def run(self, url: str, number: int) -> None:
        try:
            with connect(url) as raw:
                self.work(Lab(url, raw), f"w{number}")
        except Exception as error:
            self.errors.append(error)

    def work(self, lab: Lab, worker: str) -> None:
        turn = 0
        while not self.over.is_set():
            turn += 1
            if turn % 50 == 1:
                lab.register(worker)
            ids = [f"{worker}.{turn}.{n}" for n in range(12)]
            lab.enqueue(*ids, producer=worker)
            lab.enqueue(NewJob(f"{worker}.{turn}.late", envelope(), 1), producer=worker)
            lab.call(commands.cancel(lab.q, ids[0], [], b"", 0))
            taken = [i.decode() for i in lab.reserve(12, worker).ids]
            done = Batch()
            done.succeeded, done.released, rest = taken[:6], taken[6:8], taken[8:]
            done.later = [(i, 5, envelope()) for i in rest[:2]]
            lab.call(commands.settle(lab.q, worker, done, 100))
            if rest[2:]:
                lab.call(commands.park(lab.q, worker, [Parked(i, "x/~all", 1, FAR) for i in rest[2:]]))
            lab.call(commands.unpark(lab.q, worker, "x/~all", 2, FAR))
            lab.call(commands.promote(lab.q))
            if turn % 50 == 0:
                while lab.recover(worker).remaining > 0:
                    pass
            self.moves += 1
        lab.conn.close()

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(20)


def test_nothing_is_found_on_a_server_at_work(lab: Lab, redis_url: str) -> None:
    """Jobs move all the time, in long and in short queues; a fault among them is still found."""
    lab.raw.sadd("fastq:queues", "default")
    lab.enqueue(*(f"old{n}" for n in range(3_000)), priority=0)
    with Traffic(redis_url) as traffic:
        for _ in range(8):
            before = traffic.moves
            assert [str(fault) for fault in checked(redis_url).faults] == []
            assert traffic.errors == []
        assert traffic.moves > before, "it did not stop the server"
        lab.raw.lrem(lab.q.ready[0], 0, "old1500")
        assert codes(checked(redis_url).faults) == {("lost", "old1500", "reparable")}
        assert codes(checked(redis_url, repair=True).faults) == {("lost", "old1500", "repaired")}
    assert traffic.errors == []
    assert_sound(redis_url)
