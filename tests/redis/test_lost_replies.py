"""F-33, F-37: the script ran and its reply was lost, 200 times each; whoever repeats the call gets the effect once.

A proxy drops the reply and resets the connection: the worst kind of loss, because nobody can tell it from a call that
never arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fastq.broker import commands
from fastq.broker.calls import Numbers, Target, enqueue_sync
from fastq.broker.command import Command
from fastq.broker.commands import NewJob, Refused
from fastq.broker.connection import SyncConnection
from fastq.broker.embedded import EmbeddedServer
from fastq.broker.keys import PAD
from fastq.broker.url import parse_url
from fastq.errors import BrokerUnavailable
from tests.chaos.proxy import FaultProxy
from tests.redis.lab import FAR, LEASE, Lab, envelope, texts

E = envelope()
TIMES = 200


class Lossy:
    """Calls through the proxy: the first reply of each is lost, the repetition's arrives."""

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self.connection = SyncConnection.to(parse_url(proxy.url))

    def lose(self, command: Command[object]) -> None:
        self.proxy.rule = lambda names: "drop"
        with pytest.raises(BrokerUnavailable):
            self.connection.call(command)
        self.proxy.rule = lambda names: "pass"

    def repeat(self, command: Command[object]) -> object:
        self.lose(command)
        return self.connection.call(command)


@pytest.fixture
def lossy(redis_server: EmbeddedServer, lab: Lab) -> Iterator[Lossy]:
    for command in (  # every script is known: one that is not is sent again by its text, which the proxy does not know
        lab.enqueue_command("a"),
        lab.enqueue_command(NewJob("d", E, FAR)),
        lab.enqueue_command(NewJob("u", E, unique="k")),
        commands.register(lab.q, "w", LEASE, b"info"),
        commands.reserve(lab.q, "w", 1),
        lab.settle_command(succeeded=["a"]),
        commands.extend(lab.q, LEASE, ["w"]),
        lab.recover_command(),
    ):
        lab.call(command)
    lab.raw.flushdb()
    with FaultProxy(redis_server.url) as proxy:
        lossy = Lossy(proxy)
        yield lossy
        lossy.connection.close()


@pytest.mark.parametrize(
    "job",
    [
        lambda i: NewJob(f"j{i}", E),
        lambda i: NewJob(f"j{i}", E, FAR),
        lambda i: NewJob(f"j{i}", E, 0, f"key{i}"),
        lambda i: NewJob(f"j{i}", E, chosen=True),
    ],
    ids=["plain", "delayed", "unique", "chosen"],
)
def test_enqueue(lab: Lab, lossy: Lossy, job: Callable[[int], NewJob]) -> None:
    for i in range(TIMES):
        assert lossy.repeat(lab.enqueue_command(job(i))) == []
    assert lossy.proxy.dropped["enqueue"] + lossy.proxy.dropped["enqueue_once"] == TIMES
    assert len(lab.jobs()) == TIMES
    assert len(lab.ready()) + len(lab.value("due") or ()) == TIMES


def test_enqueue_of_a_unique_key_that_is_held(lab: Lab, lossy: Lossy) -> None:
    """The caller is told of the job that there is, not given an id that there is not."""
    lab.enqueue(NewJob("holder", E, unique="k"))
    for i in range(20):
        assert lossy.repeat(lab.enqueue_command(NewJob(f"j{i}", E, unique="k"))) == [Refused(0, "unique", b"holder")]
    assert lab.jobs() == {"holder"}


def test_enqueue_of_a_unique_key_whose_holder_ends_meanwhile(lab: Lab, lossy: Lossy) -> None:
    """What the first call refused is said again, although the key is free by now."""
    lab.register()
    for i in range(20):
        lab.enqueue(NewJob(f"holder{i}", E, unique="k"))
        command = lab.enqueue_command(NewJob(f"j{i}", E, unique="k"))
        lossy.lose(command)
        lab.reserve()
        lab.settle(succeeded=[f"holder{i}"])
        assert lossy.connection.call(command) == [Refused(0, "unique", f"holder{i}".encode())]
    assert lab.jobs() == set()


def test_enqueue_while_the_jobs_are_run_at_once(lab: Lab, lossy: Lossy) -> None:
    """Between the loss and the repetition the job has finished and left no trace: it is still not run again."""
    lab.register()
    for i in range(TIMES):
        command = lab.enqueue_command(f"j{i}")
        lossy.lose(command)
        assert lab.reserve().ids == [f"j{i}".encode()]
        lab.settle(succeeded=[f"j{i}"])
        assert lossy.connection.call(command) == []
        assert lab.reserve().ids == []


def test_the_blocking_enqueuer_repeats_by_itself(lab: Lab, lossy: Lossy) -> None:
    """F-37: 200 replies lost, 200 jobs."""
    numbers = Numbers(lossy.connection.clock)
    lossy.proxy.rule = lambda names: "drop" if lossy.proxy.seen["enqueue"] % 2 else "pass"
    for i in range(TIMES):
        target = Target(lab.q, 5)
        assert enqueue_sync(lossy.connection, numbers, target, [NewJob(f"j{i}", E)], 5.0) == []
    assert lossy.proxy.dropped["enqueue"] == TIMES
    assert lab.ready() == [f"j{i}" for i in range(TIMES)]


def test_reserve_and_settle(lab: Lab, lossy: Lossy) -> None:
    """The lost batch is asked for with resume; a settle that was lost finds everything done."""
    lab.register()
    executions = 0
    for i in range(TIMES):
        lab.enqueue(f"a{i}", f"b{i}")
        lossy.lose(commands.reserve(lab.q, "w", 10))
        held = lossy.connection.call(commands.resume(lab.q, "w"))
        ids = sorted(texts(held.ids))
        assert ids == [f"a{i}", f"b{i}"]
        executions += len(ids)
        settled = lossy.repeat(lab.settle_command(succeeded=ids))
        assert settled == (0, [i.encode() for i in ids])
    assert executions == 2 * TIMES
    assert (lossy.proxy.dropped["reserve"], lossy.proxy.dropped["settle"]) == (TIMES, TIMES)
    assert lab.keys("producers", "wake") == {**lab.worker_keys(), "jobs": {PAD: b""}}


@pytest.mark.parametrize("outcome", ["later", "failed", "released", "recorded"])
def test_settle_of_every_outcome(lab: Lab, lossy: Lossy, outcome: str) -> None:
    for i in range(50):
        lab.take(f"j{i}")
        row = {
            "later": (f"j{i}", FAR, E),
            "failed": (f"j{i}", E, b"error"),
            "recorded": ("60000:1", lab.started + FAR, f"j{i}", b"record"),
        }.get(outcome, f"j{i}")
        assert lossy.repeat(lab.settle_command(**{outcome: [row]})) == (0, [f"j{i}".encode()])
        if outcome == "released":
            assert lab.ready() == [f"j{i}"]
            lab.reserve()
            lab.settle(succeeded=[f"j{i}"])
    places = {"later": "due", "failed": "dead", "recorded": "done:60000:1"}
    assert len(lab.value(places[outcome]) if outcome in places else range(50)) == 50


def test_recover(lab: Lab, lossy: Lossy) -> None:
    """A charge is made once: else a lost reply would bring a job nearer to the dead letters."""
    for i in range(TIMES):
        lab.take(f"j{i}", worker=f"w{i}")
        assert lossy.repeat(lab.recover_command(f"w{i}", charge="all")) == (0, 0, 0)
        assert lab.value("deliveries") == {f"j{i}": b"1"}
        lab.register("cleaner")
        lab.reserve(1, "cleaner")
        lab.settle("cleaner", succeeded=[f"j{i}"])
    assert lab.jobs() == set()


def test_register_and_extend(lab: Lab, lossy: Lossy) -> None:
    for i in range(TIMES):
        lossy.repeat(commands.register(lab.q, f"w{i}", LEASE, b"info"))
        assert lossy.repeat(commands.extend(lab.q, LEASE, [f"w{i}", "nobody"])) == [True, False]
    assert len(lab.value("workers")) == len(lab.value("info")) == TIMES
