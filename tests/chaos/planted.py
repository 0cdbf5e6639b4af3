"""The command ``fastq`` with a crash or a bug planted into it: ``planted.py PLANT[,PLANT] supervise app:app …``.

The product has no hooks for this: its functions and scripts are replaced from outside, before the supervisor forks, so
every process of the fleet has them. A crash point ends its worker by ``os._exit(137)``, ``CRASHES`` times in the whole
fleet (files in the working directory count them). The bugs are there to prove that the tests find them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastq import context, job, monitor
from fastq.broker import cluster, connection, keys, schema, scripts, topology
from fastq.errors import BrokerUnavailable
from fastq.supervisor import post
from fastq.worker import lane, loop, stopping

CRASHES = 3


def crash(point: str, jobs: list[str]) -> None:
    """End this process, if the point still has a crash left; the file says who it was and whom it concerned."""
    for number in range(CRASHES):
        try:
            with Path(f"crash-{point}-{number}").open("x") as file:
                file.write(json.dumps({"pid": os.getpid(), "jobs": jobs}))
        except FileExistsError:
            continue
        os._exit(137)


def before(name: str, point: str, concerned: Callable[..., list[str]]) -> None:
    """Crash when a method of the worker's loop is called and there are jobs that it concerns."""
    method = getattr(loop.WorkerLoop, name)

    def planted(self: Any, *args: Any) -> Any:
        if jobs := concerned(*args):
            crash(point, jobs)
        return method(self, *args)

    setattr(loop.WorkerLoop, name, planted)


def rewrite(name: str, old: str, new: str) -> None:
    """Change the text of a script, as it is after what was planted before."""
    text = scripts.load(name).text.decode()
    assert text.count(old) == 1, f"{name}.lua has changed: plant the bug anew"
    changed, load = scripts.Script(name, text.replace(old, new)), scripts.load
    scripts.load = lambda wanted: changed if wanted == name else load(wanted)  # type: ignore[assignment]


def forget_lost_replies() -> None:
    """After a lost connection the worker does not ask what it holds."""

    async def reconcile(self: Any, lane: Any) -> None:
        lane.sent = None

    loop.WorkerLoop._reconcile = reconcile  # type: ignore[method-assign]


def shorten_the_cancel_grace() -> None:
    """Neither crash nor bug: a handler that does not stop is given up after 0.3 s."""
    loop.CANCEL_GRACE = stopping.CANCEL_GRACE = 0.3  # type: ignore[misc]


def rename_ready_lists() -> None:
    """A layout of its own, which the releases before it do not know."""
    made = keys.QueueKeys.__init__

    def init(self: Any, *args: Any) -> None:
        made(self, *args)
        self.ready = tuple(key.replace(b":ready:", b":prompt:") for key in self.ready)
        self.levels = self.ready[::-1]

    keys.QueueKeys.__init__ = init  # type: ignore[method-assign]


def leak_descriptors() -> None:
    """A connection that is made leaves a descriptor behind."""
    dial = connection.AsyncConnection._dial

    async def leaking(self: Any, loop: Any, wire: Any, *rest: Any) -> None:
        await dial(self, loop, wire, *rest)
        os.dup(wire.transport.get_extra_info("socket").fileno())

    connection.AsyncConnection._dial = leaking  # type: ignore[method-assign]


def hoard() -> None:
    """A worker keeps a MiB for each batch of outcomes."""
    confirm, kept = loop.WorkerLoop._confirm, list[bytes]()

    def hoarding(self: Any, *args: Any) -> None:
        kept.append(os.urandom(1 << 20))
        confirm(self, *args)

    loop.WorkerLoop._confirm = hoarding  # type: ignore[method-assign]


def give_up_without_redis() -> None:
    """A worker ends when Redis goes away."""
    connect = connection.AsyncConnection.connect

    async def once(self: Any) -> None:
        try:
            await connect(self)
        except BrokerUnavailable:
            if self.connects:
                os._exit(1)
            raise

    connection.AsyncConnection.connect = once  # type: ignore[method-assign]


def forget_steps() -> None:
    """A job does not look whether a step was done."""
    recall = context.recall
    context.recall = lambda keys, job_id, step: recall(keys, job_id, f"not {step}")  # type: ignore[assignment]


def stay_put() -> None:
    """Nobody follows the keys of a cluster that move."""
    cluster.redirection = lambda reply: None  # type: ignore[assignment]
    topology.Topology.suspect = lambda self, *nodes: None  # type: ignore[method-assign]


def stay_with_the_first_master() -> None:
    """The Sentinels are asked once."""
    locate, found = connection.locate, list[Any]()

    def first(endpoint: Any) -> Any:
        if not found:
            found.append(locate(endpoint))
        return found[0]

    connection.locate = connection.find_master = first  # type: ignore[assignment]


def next_schema() -> None:
    """Neither crash nor bug: a release that knows only the version of the keys after ours."""
    schema.SCHEMA, schema.KNOWN = 2, (2,)


def look_closer() -> None:
    """Neither crash nor bug: readiness is judged by the last 2.5 s; an idle worker reserves every 2 s."""
    monitor.READY_WITHIN = 2.5  # type: ignore[misc]


def never_back_off() -> None:
    """Neither crash nor bug: workers that are killed once a second are replaced at once, or after 60 kills none would be left."""
    post.QUICK_DEATH = 0.0  # type: ignore[misc]


PLANTS: dict[str, Callable[[], None]] = {
    "after_reserve": lambda: before("_take_in", "after_reserve", lambda lane, got: [i.decode() for i in got.ids]),
    "before_settle": lambda: before("_turn", "before_settle", lambda lane, ask: lane.batch.ids()),
    "after_settle": lambda: before("_confirm", "after_settle", lambda lane, stale: lane.sent.ids()),
    "rename_ready_lists": rename_ready_lists,
    "leaks_descriptors": leak_descriptors,
    "next_schema": next_schema,
    "look_closer": look_closer,
    "hardy": never_back_off,
    "impatient": shorten_the_cancel_grace,
    "recover_drops": lambda: rewrite("recover", "redis.call('LPUSH', ready_list(envelope, KEYS, 17), id)", "do end"),
    "unfenced_settle": lambda: rewrite(
        "settle",
        "if #ids <= 5000 then return redis.call('SMISMEMBER', running, unpack(ids)) end",
        "local all = {}; for i = 1, #ids do all[i] = 1 end; do return all end",
    ),
    "forgets_lost_replies": forget_lost_replies,
    "litters": lambda: rewrite(
        "settle", "local stale, finished", "redis.call('SET', KEYS[2] .. ':x', 1)\nlocal stale, finished"
    ),
    "hoards": hoard,
    "gives_up": give_up_without_redis,
    "forgets_steps": forget_steps,
    "leaky_decoder": lambda: setattr(lane, "decode_envelope", job.read_envelope),
    "overbooks": lambda: rewrite("acquire", "if not mine and free < 1 then break end", ""),
    "spends_nothing": lambda: rewrite("acquire", "if n < 1 or r.kind == 'none' then return end", "do return end"),
    "never_extends": lambda: setattr(monitor.Keeper, "_extend", lambda self, now: None),
    "sees_no_partitions": lambda: setattr(monitor.Keeper, "_look_for_partitions", lambda self: None),
    "deaf": lambda: setattr(connection.AsyncConnection, "_check", lambda self: None),
    "stays_put": stay_put,
    "stays_with_the_first": stay_with_the_first_master,
}


def plant(names: str) -> None:
    """Plant what is named, separated by commas."""
    for name in filter(None, names.split(",")):
        PLANTS[name]()


if __name__ == "__main__":
    plant(sys.argv[1])
    from fastq.cli.root import run

    sys.exit(run(sys.argv[2:]))
