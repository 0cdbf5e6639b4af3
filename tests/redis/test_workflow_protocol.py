"""Random workflows on the scripts alone: failures, lost leases, poison, cancellations, double settles, replays, and a model
that says what must come of it (F-59, F-60, F-61).
"""

from __future__ import annotations

from typing import Any

import hypothesis
from hypothesis import strategies as st

from fastq import job
from fastq.broker import flows
from fastq.broker.commands import Batch, recover, replay, reserve, settle
from fastq.broker.commands import cancel as cancel_command
from fastq.broker.flows import Node
from fastq.broker.keys import GlobalKeys
from tests.redis.lab import Lab

FLOW = "0123456789abcdef01234567"
ENVELOPE = job.encode(job.Envelope(5, 1, "t", b"\x90", 0, 0, job.Extra(takes=-1)))
QUEUES = GlobalKeys("fastq").queues


class Sketch:
    """A graph of up to 8 nodes. A job has one parent or none, a gather any number; parents come before children."""

    def __init__(self, choices: list[list[int]]) -> None:
        self.parents: list[list[int]] = []
        self.gathers: set[int] = set()
        for number, chosen in enumerate(choices):
            parents = sorted({parent % number for parent in chosen}) if number else []
            if len(parents) > 1 or (parents and chosen[0] % 5 == 0):
                self.gathers.add(number)
            self.parents.append(parents)
        self.jobs = [n for n in range(len(choices)) if n not in self.gathers]
        self.roots = [n for n, parents in enumerate(self.parents) if not parents]

    def nodes(self) -> list[Node]:
        children: list[list[int]] = [[] for _ in self.parents]
        for number, parents in enumerate(self.parents):
            for parent in parents:
                children[parent].append(number)
        return [
            Node(children[n], None, self.parents[n], max(len(self.parents[n]), 1))
            if n in self.gathers
            else Node(children[n], ENVELOPE)
            for n in range(len(self.parents))
        ]


class Model:
    """What a workflow is to do, said without counters: from its parents and how its jobs have ended."""

    def __init__(self, sketch: Sketch, policy: str) -> None:
        self.sketch = sketch
        self.policy = policy
        self.ended: dict[int, str] = {}  # job -> s f c
        self.stopped = False

    def passes(self, node: int) -> bool:
        """Whether what is behind a node may go on, as far as this node is concerned."""
        if node in self.sketch.gathers:
            return all(self.passes(parent) for parent in self.sketch.parents[node])
        ended = self.ended.get(node)
        return ended == "s" or (ended is not None and self.policy != "fail")

    def ripe(self) -> set[int]:
        """The jobs that are to have begun, unless it was stopped before."""
        return {n for n in self.sketch.jobs if all(self.passes(parent) for parent in self.sketch.parents[n])}

    def final(self, begun: set[int]) -> str | None:
        if begun - self.ended.keys():
            return None
        if self.stopped:
            return "cancelled"
        return "failed" if set(self.ended.values()) - {"s"} and self.policy != "ignore" else "success"


class Run:
    """A workflow on its way, and the workers that have its jobs."""

    def __init__(self, lab: Lab, sketch: Sketch, policy: str) -> None:
        self.lab, self.model = lab, Model(sketch, policy)
        self.begun: list[int] = []
        self.held: dict[int, str] = {}  # job -> worker
        self.settled: list[Any] = []  # every settle that was sent
        self.workers = 0
        self.failures = 0
        fields = {
            "policy": policy,
            "ttl": 60_000,
            "failure": ENVELOPE,
            "success": b"S",
            "failed": b"F",
            "cancelled": b"C",
        }
        operation = flows.submit(lab.q, FLOW, sketch.nodes(), sketch.roots, fields, QUEUES)
        lab.conn.run(operation)
        begun_again = lab.conn.run(flows.submit(lab.q, FLOW, sketch.nodes(), sketch.roots, fields, QUEUES))
        assert begun_again is False
        self.take()

    def take(self) -> None:
        """A new worker reserves what is pending; no job of the workflow may ever be handed out twice but after a recovery."""
        self.workers += 1
        worker = f"w{self.workers}"
        self.lab.register(worker)
        for raw in self.lab.call(reserve(self.lab.q, worker, 100)).ids:
            _, _, node = raw.decode().partition(".")
            if node == "failure":
                self.failures += 1
                batch = Batch()
                batch.succeeded = [raw.decode()]
                self.lab.call(settle(self.lab.q, worker, batch, 100))
                continue
            assert int(node) not in self.held
            if int(node) not in self.begun:
                self.begun.append(int(node))
            else:
                assert int(node) in self.back
            self.held[int(node)] = worker
        self.back: set[int] = set()

    def settle(self, node: int, kind: str) -> None:
        batch, job_id = Batch(), f"{FLOW}.{node}"
        if kind == "s":
            batch.recorded = [("60000:1", self.lab.started + 10**9, job_id, b"\x98\xa7success")]
            batch.outputs = [(job_id, job.encode([node]))]
        elif kind == "f":
            batch.failed = [(job_id, ENVELOPE, b"error")]
        else:
            batch.succeeded = [job_id]  # cancelled, and its task keeps no records
        command = settle(self.lab.q, self.held.pop(node), batch, 100)
        self.lab.twice(command)
        self.settled.append(command)
        self.model.ended[node] = kind

    def lose(self, node: int, *, poison: bool) -> None:
        """The worker of this job dies; all it had goes back, or is buried as poison. Its own settle comes too late."""
        worker = self.held[node]
        mine = [n for n, owner in self.held.items() if owner == worker]
        late = Batch()
        late.succeeded = [f"{FLOW}.{n}" for n in mine]
        late.outputs = [(f"{FLOW}.{n}", b"\xc0") for n in mine]
        most = 1 if poison else 1_000
        self.lab.call(
            recover(self.lab.q, worker, expired=False, charge="all", max_deliveries=most, dead_max=100, error=b"poison")
        )
        before = self.lab.keys()
        self.lab.call(settle(self.lab.q, worker, late, 100))
        after = self.lab.keys()
        assert {**before, "wake": None} == {**after, "wake": None}
        for n in mine:
            del self.held[n]
            if self.model.stopped:  # it was asked to stop, so it does not run again
                self.model.ended[n] = "c"
            elif poison:
                self.model.ended[n] = "f"
            else:
                self.back.add(n)

    def cancel_pending(self) -> None:
        """Jobs that are pending are cancelled one by one."""
        for raw in self.ready():
            node = raw.partition(".")[2]
            workers = [w.decode() for w in self.lab.raw.zrange(self.lab.q.workers, 0, -1)]
            if node == "failure":
                continue
            answer = self.lab.call(cancel_command(self.lab.q, raw, workers, b"record", 60_000))
            if answer == "cancelled":
                if int(node) not in self.begun:
                    self.begun.append(int(node))
                self.back.discard(int(node))
                self.model.ended[int(node)] = "c"

    def stop(self) -> None:
        """workflow.cancel(): those that are held are asked, and end as cancelled when their workers settle."""
        if self.model.final(set(self.begun) | self.pending()) is not None:
            return
        pending = self.pending()
        assert self.lab.conn.run(flows.cancel(self.lab.q, FLOW, b"record", 60_000))
        self.model.stopped = True
        for node in pending:
            if node not in self.begun:
                self.begun.append(node)
            self.back.discard(node)
            self.model.ended[node] = "c"

    def replay_some(self) -> None:
        """A dead letter is replayed and succeeds: that is a job of its own, the workflow does not move for it."""
        letters = [n for n, kind in self.model.ended.items() if kind == "f"]
        for node in letters[:1]:
            before = self.lab.raw.hgetall(self.lab.q.flow(FLOW))
            if self.lab.call(replay(self.lab.q, [(f"{FLOW}.{node}", ENVELOPE)])):
                self.lab.register("replayer")
                ids = [raw.decode() for raw in self.lab.call(reserve(self.lab.q, "replayer", 100)).ids]
                batch = Batch()
                batch.released = [i for i in ids if i != f"{FLOW}.{node}"]
                batch.succeeded = [f"{FLOW}.{node}"]
                batch.outputs = [(f"{FLOW}.{node}", b"\xc0")]
                self.lab.call(settle(self.lab.q, "replayer", batch, 100))
            assert self.lab.raw.hgetall(self.lab.q.flow(FLOW)) == before

    def ready(self) -> list[str]:
        """What lies in the ready lists; a cancelled job lies there as a ghost."""
        stored = self.lab.jobs()
        return [job_id for job_id in self.lab.ready() if job_id in stored]

    def pending(self) -> set[int]:
        return {int(i.partition(".")[2]) for i in self.ready() if not i.endswith("failure")}

    def check(self) -> None:
        """After every step: what is under way is exactly what the model says."""
        model, under_way = self.model, set(self.held) | self.pending()
        begun = set(self.begun) | under_way
        view = self.lab.conn.run(flows.view(self.lab.q, FLOW))
        letters = {n: view.letters[n] for n in model.sketch.jobs}
        if not model.stopped:
            assert begun == model.ripe()
        assert {n for n, letter in letters.items() if letter == "a"} == under_way == begun - model.ended.keys()
        assert {n: letter for n, letter in letters.items() if letter in "sfc"} == model.ended
        final = model.final(begun)
        assert view.state == (final or "running")
        groups = self.lab.raw.zscore(self.lab.q.groups, FLOW)
        assert (groups is None) == (final is not None)
        assert (self.lab.raw.pttl(self.lab.q.flow(FLOW)) > 0) == (final is not None)

    def finish(self) -> None:
        """To the end, and then everything that was ever settled comes a second time."""
        while self.held or self.ready():
            self.take()
            for node in list(self.held):
                self.settle(node, "s")
            self.check()
        assert self.model.final(set(self.begun)) is not None
        before = self.lab.keys()
        for command in self.settled:
            self.lab.call(command)
        assert self.lab.keys() == before
        expected = self.model.final(set(self.begun)) == "failed"
        assert self.failures == expected
        assert len(self.begun) == len(set(self.begun))


STEPS = st.tuples(
    st.sampled_from(["success", "success", "fail", "cancelled", "lose", "poison", "take", "cancel", "stop", "replay"]),
    st.integers(0, 7),
)


def drive(lab: Lab, choices: list[list[int]], policy: str, steps: list[tuple[str, int]]) -> None:
    lab.raw.flushall()
    run = Run(lab, Sketch(choices), policy)
    run.check()
    for step, number in steps:
        held = sorted(run.held)
        if step in ("success", "fail", "cancelled") and held:
            run.settle(held[number % len(held)], step[0] if step != "cancelled" else "c")
        elif step in ("lose", "poison") and held:
            run.lose(held[number % len(held)], poison=step == "poison")
        elif step == "take":
            run.take()
        elif step == "cancel":
            run.cancel_pending()
        elif step == "stop" and number < 2:
            run.stop()
        elif step == "replay":
            run.replay_some()
        run.check()
    run.finish()


GRAPHS = st.lists(st.lists(st.integers(0, 50), max_size=4), min_size=1, max_size=8)


@hypothesis.settings(max_examples=120, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    choices=GRAPHS, policy=st.sampled_from(["fail", "continue", "ignore"]), steps=st.lists(STEPS, max_size=14)
)
def test_every_workflow_ends_as_it_must(lab: Lab, choices: Any, policy: str, steps: Any) -> None:
    """F-59, F-60, F-61: nothing begins twice, nothing waits for ever, the failure callback comes once."""
    drive(lab, choices, policy, steps)
