"""Random workflows on the scripts alone: failures, lost leases, poison, cancellations, double settles, replays, and a model
that says what must come of it (F-59, F-60, F-61).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from fastq import job
from fastq.broker import flows, scripts
from fastq.broker.commands import Batch, recover, replay, reserve, settle
from fastq.broker.commands import cancel as cancel_command
from fastq.broker.flows import Node
from fastq.broker.keys import GlobalKeys
from fastq.errors import Fail, FastQError, InvalidOption
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

    def __init__(self, lab: Lab, sketch: Sketch, policy: str, *, lazy: bool) -> None:
        self.lazy = lazy  # the client that started it is gone: what is ripe begins as workers ask for it
        self.lab, self.model = lab, Model(sketch, policy)
        self.begun: list[int] = []
        self.held: dict[int, str] = {}  # job -> worker
        self.settled: list[Any] = []  # every settle that was sent
        self.workers = 0
        self.failures = 0
        self.names: set[str] = set()  # of what jobs have added
        self.frozen: set[int] = set()  # what had begun when it was cancelled: nothing else will
        fields = {
            "policy": policy,
            "ttl": 60_000,
            "failure": ENVELOPE,
            "success": b"S",
            "failed": b"F",
            "cancelled": b"C",
        }
        operation = flows.submit(lab.q, FLOW, sketch.nodes(), sketch.roots, fields, QUEUES)
        step: Any = next(operation)
        with contextlib.suppress(StopIteration):
            while not (lazy and step.script == "flow_unfold"):
                step = operation.send(lab.call(step))
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

    def unfolding(self) -> bool:
        """Whether there is more of it than has begun."""
        later = self.lab.raw.hexists(self.lab.q.flow(FLOW), "later")
        assert later == self.lab.raw.sismember(self.lab.q.unfolding, FLOW)
        return bool(later)

    def unfold(self) -> None:
        turns = iter(range(100))
        while self.lab.call(flows.flow_unfold(self.lab.q, FLOW)):
            assert next(turns, None) is not None, "it unfolds for ever"
        assert not self.unfolding()

    def settle(self, *ended: tuple[int, str]) -> None:
        """Jobs that one worker holds end at once."""
        batch = Batch()
        for node, kind in ended:
            job_id = f"{FLOW}.{node}"
            if kind == "s":
                batch.recorded.append(("60000:1", self.lab.started + 10**9, job_id, b"\x98\xa7success"))
                batch.outputs.append((job_id, job.encode([node])))
            elif kind == "f":
                batch.failed.append((job_id, ENVELOPE, b"error"))
            else:
                batch.succeeded.append(job_id)  # cancelled, and its task keeps no records
            self.model.ended[node] = kind
        (worker,) = {self.held.pop(node) for node, _ in ended}
        command = settle(self.lab.q, worker, batch, 100)
        self.lab.twice(command)
        self.settled.append(command)

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
        if not self.model.stopped and self.model.final(self.model.ripe()) is not None and not self.unfolding():
            return
        if self.model.stopped and self.model.final(self.frozen) is not None:
            return
        pending = self.pending()
        assert self.lab.conn.run(flows.cancel(self.lab.q, FLOW, b"record", 60_000))
        self.model.stopped = True
        self.frozen = set(self.begun) | pending
        for node in pending:
            if node not in self.begun:
                self.begun.append(node)
            self.back.discard(node)
            self.model.ended[node] = "c"

    def spawn(self, node: int, number: int) -> None:
        """A held job adds one; its first attempt may die after each command, and does the same again, or has done it before."""
        sketch, join = self.model.sketch, number % 3 == 0
        behind = [n for n, parents in enumerate(sketch.parents) if node in parents]
        name, (first, cut) = f"{node}-{number}", (len(sketch.parents), number % 4)
        again = name in self.names
        if again and self.lazy:
            return
        before = self.lab.raw.hgetall(self.lab.q.flow(FLOW))
        for most in (cut, 9):
            operation = spawning(self.lab.q, node, name, join=join)
            step = next(operation)
            try:
                for _ in range(most):
                    unfolds = step.script == "flow_unfold"  # sent twice, it goes on
                    step = operation.send(self.lab.call(step) if unfolds else self.lab.twice(step)[0])
            except StopIteration:
                assert not self.model.stopped
            except InvalidOption:
                assert join
                assert not behind or not set(behind) <= sketch.gathers
            except FastQError:
                assert self.model.stopped
        if again:
            assert self.lab.raw.hgetall(self.lab.q.flow(FLOW)) == before
        elif not self.model.stopped:
            self.names.add(name)
            sketch.parents.append([])
            if not join or (behind and set(behind) <= sketch.gathers):
                sketch.jobs.append(first)
                for gather in behind if join else ():
                    sketch.parents[gather].append(first)

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
            after = self.lab.raw.hgetall(self.lab.q.flow(FLOW))
            assert after == before or (self.lazy and after[b"bad"] == before[b"bad"])  # it unfolds

    def ready(self) -> list[str]:
        """What lies in the ready lists; a cancelled job lies there as a ghost."""
        stored = self.lab.jobs()
        return [job_id for job_id in self.lab.ready() if job_id in stored]

    def pending(self) -> set[int]:
        return {int(i.partition(".")[2]) for i in self.ready() if not i.endswith("failure")}

    def check(self) -> None:
        """After every step: what is under way is exactly what the model says; or less, when it begins as workers ask for it."""
        if not self.lazy:
            self.unfold()
        model, under_way = self.model, set(self.held) | self.pending()
        begun = set(self.begun) | under_way
        view = self.lab.conn.run(flows.view(self.lab.q, FLOW))
        letters = {n: view.letters[n] for n in model.sketch.jobs}
        ripe = self.frozen if model.stopped else model.ripe()
        assert begun <= ripe
        assert begun == ripe or self.unfolding()
        if not model.stopped and not self.unfolding():
            assert {n for n in model.sketch.gathers if view.letters[n] == "G"} == set(
                filter(model.passes, model.sketch.gathers)
            )
        assert {n for n, letter in letters.items() if letter == "a"} == under_way == begun - model.ended.keys()
        assert {n: letter for n, letter in letters.items() if letter in "sfc"} == model.ended
        final = model.final(ripe)
        if self.unfolding() and begun == ripe:
            assert view.state == "running"
            return  # gathers alone are left
        assert view.state == (final or "running")
        groups = self.lab.raw.zscore(self.lab.q.groups, FLOW)
        assert (groups is None) == (final is not None)
        assert (self.lab.raw.pttl(self.lab.q.flow(FLOW)) > 0) == (final is not None)

    def finish(self) -> None:
        """To the end, and then everything that was ever settled comes a second time."""
        turns = iter(range(100))
        while self.held or self.ready() or self.unfolding():
            assert next(turns, None) is not None, "it does not end"
            self.take()
            for node in list(self.held):
                self.settle((node, "s"))
            self.check()
        assert self.model.final(set(self.begun)) is not None
        before = self.lab.keys()
        for command in self.settled:
            self.lab.call(command)
        assert self.lab.keys() == before
        expected = self.model.final(set(self.begun)) == "failed"
        assert self.failures == expected
        assert len(self.begun) == len(set(self.begun))


def spawning(q: Any, node: int, name: str, *, join: bool) -> Any:
    """A job adds another one."""
    first, _, begun = yield from flows.grow(q, FLOW, node, name, 1, 1_000)
    if not begun:
        spawned = flows.Spawned([Node([], ENVELOPE)], [first], "t*1", first if join else -1)
        yield from flows.spawn(q, FLOW, node, name, first, spawned)


WEIGHTS = {
    "success": 4, "fail": 3, "together": 2, "cancelled": 1, "lose": 1, "poison": 1, "take": 1, "cancel": 3, "stop": 1,
    "replay": 3, "spawn": 3,
}  # fmt: skip
STEPS = st.tuples(st.sampled_from([step for step, weight in WEIGHTS.items() for _ in range(weight)]), st.integers(0, 7))


def drive(lab: Lab, choices: list[list[int]], policy: str, steps: list[tuple[str, int]], *, lazy: bool = False) -> None:
    lab.raw.flushall()
    run = Run(lab, Sketch(choices), policy, lazy=lazy)
    run.check()
    for step, number in steps:
        if not run.held:
            run.take()
        held = sorted(run.held)
        if step in ("success", "fail", "cancelled") and held:
            run.settle((held[number % len(held)], step[0] if step != "cancelled" else "c"))
        elif step == "together" and held:
            worker = run.held[held[number % len(held)]]
            run.settle(*((node, "sssf"[(node + number) % 4]) for node in held if run.held[node] == worker))
        elif step in ("lose", "poison") and held:
            run.lose(held[number % len(held)], poison=step == "poison")
        elif step == "take":
            run.take()
        elif step == "cancel":
            run.cancel_pending()
        elif step == "stop":
            run.stop()
        elif step == "replay":
            run.replay_some()
        elif step == "spawn" and held:
            run.spawn(held[number % len(held)], number)
        run.check()
    run.finish()


GRAPHS = st.one_of(
    st.lists(st.lists(st.integers(0, 50), max_size=3), min_size=1, max_size=8),
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=3), min_size=4, max_size=8),
)
WALKS = st.lists(STEPS, min_size=2, max_size=14)


@hypothesis.settings(max_examples=120, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(choices=GRAPHS, policy=st.sampled_from(["fail", "continue", "ignore"]), steps=WALKS)
def test_every_workflow_ends_as_it_must(lab: Lab, choices: Any, policy: str, steps: Any) -> None:
    """F-59, F-60, F-61: nothing begins twice, nothing waits for ever, the failure callback comes once."""
    drive(lab, choices, policy, steps)


@hypothesis.settings(max_examples=120, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    choices=GRAPHS, policy=st.sampled_from(["fail", "continue", "ignore"]), steps=WALKS, most=st.integers(1, 3)
)
@pytest.mark.parametrize("lazy", [False, True])
def test_every_workflow_ends_as_it_must_in_small_pieces(
    lab: Lab, choices: Any, policy: str, steps: Any, most: int, lazy: bool
) -> None:
    """F-59, F-60, F-61: the same where a call begins few jobs, and the client that started it may be gone: what is ripe
    begins with the next end of a job, or when a worker asks for more.
    """
    with pytest.MonkeyPatch.context() as patch:
        plant(lab, patch, dict.fromkeys(UNFOLDS, ("MOST_UNFOLDED = 250", f"MOST_UNFOLDED = {most}")))
        drive(lab, choices, policy, steps, lazy=lazy)


UNFOLDS = [name for name in scripts.names() if "MOST_UNFOLDED = 250" in scripts.expand(name)]


def plant(lab: Lab, patch: pytest.MonkeyPatch, changes: Mapping[str, tuple[str, str]]) -> None:
    """Other scripts than ours: name -> what is in it, and what is there instead."""
    original, planted = scripts.load, dict[str, scripts.Script]()
    for name, (sound, broken) in changes.items():
        text = scripts.expand(name)
        assert sound in text, f"{name}.lua has changed: plant the bug anew"
        planted[name] = scripts.Script(name, text.replace(sound, broken))
    patch.setattr(scripts, "load", lambda wanted: planted.get(wanted) or original(wanted))
    lab.conn.close()


# -- the test itself is tested: each of these bugs is found ---------------------------------------------------

BUGS = {
    "a job that counts twice": ("settle", "if letter == 97 and", "if"),
    "a failure that lets the next one run": ("settle", "if output or policy ~= 'fail' then", "if true then"),
    "a failure that stops everything": ("settle", "if output or policy ~= 'fail' then", "if output then"),
    "a gather that does not wait": ("settle", "-times[node]) == 0 then", "-times[node]) < 99 then"),
    "a gather that waits for one more": ("settle", "-times[node]) == 0 then", "-times[node]) < 0 then"),
    "a gather that counts two ends at once as one": ("settle", "-times[node]) == 0", "-1) == 0"),
    "an end that nobody notices": ("settle", "open == 0 then", "open == -1 then"),
    "poison that the workflow is not told of": ("recover", "flows_go_on(KEYS[16], now, ended, kinds, {}, 1)", ""),
    "a cancelled job that the workflow is not told of": (
        "cancel",
        "flows_go_on(KEYS[14], now_ms(), {id}, {[id] = 'cancelled'}, {}, 1)",
        "",
    ),
    "a cancelled workflow that goes on": ("settle", "stop and '' or freed_by", "freed_by"),
    "an addition that is repeated": (
        "flow_spawn",
        "if known == first .. ' ' .. #ARGV[5] .. ' 1' then return 0 end",
        "",
    ),
    "an addition that forgets its room": ("flow_grow", "if known then", "if false then"),
    "an addition that nobody waits for": ("flow_spawn", "add(flow, 'p' .. gather, 1)", ""),
    "an end that keeps its keys": ("settle", "redis.call('PEXPIRE', flow, ttl)", ""),
}


@pytest.mark.one_server("shows that the machine can fail, and it is the same machine there")
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(lab: Lab, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    name, sound, broken = BUGS[bug]
    plant(lab, monkeypatch, {name: (sound, broken)})

    @hypothesis.settings(
        max_examples=400,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        report_multiple_bugs=False,
    )
    @hypothesis.given(choices=GRAPHS, policy=st.sampled_from(["fail", "continue", "ignore"]), steps=WALKS)
    def search(choices: Any, policy: str, steps: Any) -> None:
        drive(lab, choices, policy, steps)

    with pytest.raises((AssertionError, FastQError, hypothesis.errors.Flaky)):
        search()
    lab.raw.flushall()


SMALL_BUGS = {
    "what is left over is forgotten": ("settle", "redis.call('HSET', flow, 'later', later)", ""),
    "what is left over begins twice": ("settle", "begun, list = unfold(", "begun = unfold("),
    "an end before all has begun": ("settle", "if later == '' and open == 0", "if open == 0"),
    "a worker that does not ask for more": ("reserve", "unfold_more(KEYS[8], clock, flow)", ""),
    "a cancelled workflow that still unfolds": ("flow_cancel", "redis.call('HDEL', flow, 'later')", ""),
}


@pytest.mark.one_server("shows that the machine can fail, and it is the same machine there")
@pytest.mark.parametrize("bug", SMALL_BUGS)
def test_a_planted_bug_in_pieces_is_found(lab: Lab, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    name, sound, broken = SMALL_BUGS[bug]
    monkeypatch.setattr(scripts, "expand", small(scripts.expand))
    plant(lab, monkeypatch, {name: (sound, broken)} | {each: ("= 1 --", "= 1 --") for each in UNFOLDS if each != name})

    @hypothesis.settings(
        max_examples=400,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        report_multiple_bugs=False,
    )
    @hypothesis.given(choices=GRAPHS, policy=st.sampled_from(["fail", "continue", "ignore"]), steps=WALKS)
    def search(choices: Any, policy: str, steps: Any) -> None:
        drive(lab, choices, policy, steps, lazy=True)

    with pytest.raises((AssertionError, FastQError, hypothesis.errors.Flaky)):
        search()
    lab.raw.flushall()


def small(expand: Callable[[str], str]) -> Callable[[str], str]:
    """Scripts that begin one job in a call."""
    return lambda name: expand(name).replace("MOST_UNFOLDED = 250", "MOST_UNFOLDED = 1 --")


# -- what the protocol above does not send twice -----------------------------------------------------------------


def begun(lab: Lab, **fields: Any) -> None:
    nodes = [Node([1], ENVELOPE), Node([], ENVELOPE)]
    known = {"policy": "fail", "ttl": 60_000, "success": b"S", "failed": b"F", "cancelled": b"C"} | fields
    assert lab.conn.run(flows.submit(lab.q, FLOW, nodes, [0], known, QUEUES))


def ended(lab: Lab, kind: str) -> None:
    lab.register()
    assert [raw.decode() for raw in lab.reserve().ids] == [f"{FLOW}.0"]
    lab.settle(**{kind: [(f"{FLOW}.0", ENVELOPE, b"error")] if kind == "failed" else [f"{FLOW}.0"]})


def test_a_part_that_is_missing_stops_the_start(lab: Lab) -> None:
    lab.call(flows.flow_add(lab.q, FLOW, 0, "w", ["e0", ENVELOPE]))
    assert lab.twice(flows.flow_start(lab.q, FLOW, 2, [0], {"policy": "fail", "ttl": 1})) == (-1, -1)
    assert lab.ready() == []


def test_start_sent_twice_begins_once(lab: Lab) -> None:
    begun(lab)
    assert lab.twice(flows.flow_start(lab.q, FLOW, 2, [0], {"policy": "fail", "ttl": 1})) == (0, 0)
    assert lab.twice(flows.flow_add(lab.q, FLOW, 0, "w", ["e0", b"other"])) == (0, 0)
    assert lab.ready() == [f"{FLOW}.0"]
    lab.conn.run(flows.cancel(lab.q, FLOW, b"record", 60_000))


def test_a_client_that_dies_before_the_start_leaves_nothing(lab: Lab) -> None:
    lab.call(flows.flow_add(lab.q, FLOW, 0, "w", ["e0", ENVELOPE]))
    assert 0 < lab.raw.pttl(lab.q.flow(FLOW)) <= 3_600_000
    assert 0 < lab.raw.pttl(lab.q.flow_states(FLOW)) <= 3_600_000


def test_cancel_sent_twice(lab: Lab) -> None:
    begun(lab)
    assert lab.twice(flows.flow_cancel(lab.q, FLOW)) == (b"aw", b"aw")
    ended(lab, "succeeded")
    assert lab.call(flows.flow_cancel(lab.q, FLOW)) is None
    assert lab.value(f"flow:{FLOW}")["state"] == b"cancelled"


def test_retry_sent_twice_runs_a_job_once(lab: Lab) -> None:
    begun(lab, failure=ENVELOPE)
    ended(lab, "failed")
    assert lab.ready() == [f"{FLOW}.failure"]
    command = flows.flow_retry(lab.q, FLOW, [(0, ENVELOPE)])
    assert lab.twice(command) == (1, 0)
    assert lab.ready() == [f"{FLOW}.failure", f"{FLOW}.0"]
    assert lab.raw.pttl(lab.q.flow(FLOW)) == -1
    batch = Batch()
    batch.succeeded = [f"{FLOW}.0"]
    batch.outputs = [(f"{FLOW}.0", b"\x01")]
    lab.reserve()
    lab.call(settle(lab.q, "w", batch, 100))
    assert lab.ready() == [f"{FLOW}.1"]
    lab.call(flows.flow_cancel(lab.q, FLOW))
    lab.conn.run(flows.cancel(lab.q, FLOW, b"record", 60_000))


def test_packed_lists() -> None:
    assert flows.numbers(flows.pack([0, 1, 2, 7, 9, 10])) == [0, 1, 2, 7, 9, 10]
    assert (flows.pack([]), flows.numbers("")) == ("", [])


def test_results_that_are_gone_are_said(lab: Lab) -> None:
    """F-61."""
    with pytest.raises(Fail, match="have expired"):
        lab.conn.run(flows.inputs(lab.q, f"{FLOW}.1", 0))
