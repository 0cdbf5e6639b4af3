"""follow.lua and the messages of every script that ends a job: no end is missed, and nobody pays when nobody waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastq.broker import commands
from fastq.broker.commands import NewJob
from tests.redis.lab import FAR, Lab, envelope

E = envelope()
TTL = 60_000
CANCELLED = b"\x98\xa9cancelled"
"""How the record of a cancelled job begins; settle.lua looks at these bytes."""


def follow(lab: Lab, *ids: str, channel: str = "fastq:told:1") -> list[list[bytes]]:
    return lab.call(commands.follow(lab.q, channel, ids, TTL))


class Ear:
    """What a process that has subscribed hears, read with redis-py."""

    def __init__(self, raw: Any, channel: str) -> None:
        self._pubsub = raw.pubsub()
        self._pubsub.subscribe(channel)
        assert self._pubsub.get_message(timeout=5)["type"] == "subscribe"

    def heard(self) -> list[str]:
        """One message; PUBLISH has answered before the script did, so it is there."""
        message = self._pubsub.get_message(timeout=0.2)
        return message["data"].decode().split(" ") if message else []

    def close(self) -> None:
        self._pubsub.close()


@pytest.fixture
def ear(lab: Lab) -> Iterator[Ear]:
    ear = Ear(lab.raw, "fastq:told:1")
    yield ear
    ear.close()


def test_every_answer(lab: Lab) -> None:
    lab.take("done", "dead", "gone", "running")
    lab.settle(
        succeeded=["gone"],
        recorded=[("60000:7", lab.started + FAR, "done", b"record")],
        failed=[("dead", E, b"error")],
    )
    lab.enqueue("pending", NewJob("scheduled", E, FAR))
    ids = ("done", "dead", "gone", "never", "running", "pending", "scheduled")
    done, dead, gone, never, *rest = follow(lab, *ids)
    assert done == [b"finished", b"record"]
    assert dead[:3] == [b"failed", E, b"error"]
    assert lab.near() == int(dead[3])
    assert gone == never == [b"unknown"]
    assert rest == [[b"open"]] * 3
    assert set(lab.value("awaited")) == {"running", "pending", "scheduled"}
    assert 0 < lab.raw.pttl(lab.q.awaited) <= TTL


def test_twice_is_once(lab: Lab) -> None:
    lab.enqueue("a")
    command = commands.follow(lab.q, "fastq:told:1", ["a"], TTL)
    assert lab.twice(command) == ([[b"open"]], [[b"open"]])
    follow(lab, "a", channel="fastq:told:2")
    assert lab.value("awaited") == {"a": b"fastq:told:1 fastq:told:2"}


def test_what_has_ended_registers_nothing(lab: Lab) -> None:
    follow(lab, "a", "b")
    assert lab.keys() == {}


def test_the_channels_of_a_job_are_bounded(lab: Lab) -> None:
    lab.enqueue("a")
    for n in range(400):
        follow(lab, "a", channel=f"fastq:told:{n:040}")
    names = lab.value("awaited")["a"].decode().split(" ")
    assert len(names) < 330
    assert names[-1] == f"fastq:told:{399:040}"


def settle(**sections: list[Any]) -> Callable[[Lab], object]:
    return lambda lab: lab.settle(**sections)


ENDINGS: dict[str, Callable[[Lab], object]] = {
    "succeeded": settle(succeeded=["a"]),
    "recorded": lambda lab: lab.settle(recorded=[("60000:7", lab.started + FAR, "a", b"record")]),
    "failed": settle(failed=[("a", E, b"error")]),
    "poison": lambda lab: lab.recover(charge="all", max_deliveries=1),
    "cancelled": lambda lab: lab.call(commands.cancel(lab.q, "p", ["w"], b"", 0)),
    "purged": lambda lab: lab.call(commands.purge(lab.q)),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_end_is_told_and_forgotten(lab: Lab, ear: Ear, ending: str) -> None:
    """Once, in one message, to those who wait and for the job that has ended only."""
    lab.take("a", "other")
    lab.enqueue("p")
    job = "p" if ending in {"cancelled", "purged"} else "a"
    follow(lab, job)
    follow(lab, job, channel="fastq:told:2")
    ENDINGS[ending](lab)
    assert ear.heard() == [lab.q.awaited.decode(), job]
    assert lab.value("awaited") is None
    assert lab.value("events") is None
    assert ear.heard() == []


@pytest.mark.parametrize(
    "move",
    [settle(later=[("a", FAR, E)]), settle(later=[("a", 0, E)]), settle(released=["a"]), lambda lab: lab.recover()],
    ids=["retried", "snoozed", "released", "recovered"],
)
def test_a_job_that_goes_on_stays_awaited(lab: Lab, ear: Ear, move: Callable[[Lab], object]) -> None:
    lab.take("a")
    follow(lab, "a")
    move(lab)
    assert ear.heard() == []
    assert lab.value("awaited") == {"a": b"fastq:told:1"}


def test_the_ends_of_a_batch_are_one_message(lab: Lab, ear: Ear) -> None:
    lab.take("a", "b", "c", "d")
    follow(lab, "a", "b", "c")
    lab.settle(succeeded=["a", "d"], failed=[("b", E, b"error")])
    assert ear.heard() == [lab.q.awaited.decode(), "a", "b"]
    assert lab.value("awaited") == {"c": b"fastq:told:1"}


def test_a_batch_that_lua_cannot_unpack(lab: Lab, ear: Ear) -> None:
    ids = [f"j{n}" for n in range(9_000)]
    for start in range(0, len(ids), 1_000):
        lab.take(*ids[start : start + 500])
        lab.take(*ids[start + 500 : start + 1_000])
        follow(lab, *ids[start : start + 1_000])
    lab.settle(succeeded=ids)
    assert ear.heard() == [lab.q.awaited.decode(), *ids]
    assert lab.value("awaited") is None


def test_a_stale_outcome_tells_nobody(lab: Lab, ear: Ear) -> None:
    """Who does not hold the job does not end it (the fence)."""
    lab.take("a")
    follow(lab, "a")
    lab.register("v")
    lab.settle("v", succeeded=["a"])
    assert ear.heard() == []
    assert lab.value("awaited") == {"a": b"fastq:told:1"}


def test_a_user_who_may_not_publish_settles_all_the_same(lab: Lab) -> None:
    """An ACL without the channel costs the waiters their message (they ask again), never the worker its outcome."""
    lab.take("a")
    follow(lab, "a")
    lab.raw.execute_command("ACL", "SETUSER", "default", "resetchannels")
    try:
        assert lab.settle(succeeded=["a"]).stale == []
    finally:
        lab.raw.execute_command("ACL", "SETUSER", "default", "allchannels")
    assert follow(lab, "a") == [[b"unknown"]]
    assert lab.value("awaited") is None


def watch(lab: Lab, field: str, value: str) -> None:
    lab.raw.hset(lab.q.awaited, field, value)


def events(lab: Lab) -> list[dict[str, str]]:
    rows = lab.raw.xrange(lab.q.events)
    return [{kind.decode(): job.decode() for kind, job in fields.items()} for _, fields in rows]


def test_all_jobs_can_be_watched(lab: Lab) -> None:
    watch(lab, "*", str(lab.now() + FAR))
    lab.raw.pexpire(lab.q.awaited, FAR)
    lab.take("a", "b", "c", "d")
    lab.enqueue("p")
    lab.settle(
        succeeded=["a"],
        recorded=[("60000:7", lab.started + FAR, "b", CANCELLED)],
        failed=[("c", E, b"error")],
        later=[("d", FAR, E)],
    )
    lab.call(commands.cancel(lab.q, "p", ["w"], b"", 0))
    started = [{"started": job} for job in "abcd"]
    ended = [{"succeeded": "a"}, {"cancelled": "b"}, {"failed": "c"}, {"retried": "d"}, {"cancelled": "p"}]
    assert events(lab) == started + ended
    assert 0 < lab.raw.pttl(lab.q.events) <= 600_000


def test_the_watching_ends(lab: Lab) -> None:
    watch(lab, "*", str(lab.now() - 1))
    lab.raw.pexpire(lab.q.awaited, FAR)
    lab.take("a")
    lab.settle(succeeded=["a"])
    assert lab.value("events") is None


def test_one_job_can_be_watched(lab: Lab, ear: Ear) -> None:
    lab.enqueue("a", "b")
    follow(lab, "a")
    watch(lab, "a", "! fastq:told:1")
    lab.register()
    lab.reserve()
    lab.settle(succeeded=["a", "b"])
    assert events(lab) == [{"started": "a"}, {"succeeded": "a"}]
    assert ear.heard() == [lab.q.awaited.decode(), "a"]


@pytest.mark.one_server("counts commands")
def test_who_is_not_waited_for_costs_one_command(lab: Lab) -> None:
    """A batch of outcomes asks once, and nothing more, whether anybody waits."""
    lab.take(*(f"j{n}" for n in range(101)))
    lab.settle(succeeded=["j100"])  # Redis knows the script from now on
    calls = commands_of(lab, lambda: lab.settle(succeeded=[f"j{n}" for n in range(100)]))
    assert calls == {"evalsha": 1, "smismember": 1, "srem": 1, "hdel": 1, "exists": 1, "scard": 1}


def commands_of(lab: Lab, act: Callable[[], object]) -> dict[str, int]:
    """The commands that Redis ran, those inside scripts included."""
    lab.raw.config_resetstat()
    act()
    stats = lab.raw.info("commandstats")
    ran = {name.removeprefix("cmdstat_"): values["calls"] for name, values in stats.items()}
    return {name: calls for name, calls in ran.items() if not name.startswith(("config", "info", "eval|"))}
