"""``fastq workflow``: a workflow as a tree; cancel it, send it on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import click

from fastq.broker import flows
from fastq.broker.command import Operation
from fastq.broker.keys import QueueKeys
from fastq.cli.session import NotFound, Session, with_session
from fastq.cli.table import counted, moment
from fastq.errors import ExitCode, safe_text

__all__ = ["draw", "verbs"]

WORDS = {"w": "waiting", "a": "active", "s": "success", "f": "failed", "c": "cancelled", "g": "waiting", "G": "success"}
DRAWN = 20_000
"""Most nodes of a workflow that is drawn; of a larger one only the counts are shown."""


class Tree:
    """The nodes of a workflow with how far each is indented: what branches is, what comes together is not."""

    def __init__(self, found: flows.FlowView, children: Sequence[Sequence[int]]) -> None:
        self.letters, self.tasks, self.over = found.letters, found.tasks(), found.state != "running"
        self.children = [
            below if letter != flows.NOTHING else () for below, letter in zip(children, found.letters, strict=True)
        ]
        self.spawners = found.spawners()
        self.parents: list[list[int]] = [[] for _ in self.letters]
        for node, below in enumerate(self.children):
            for child in below:
                self.parents[child].append(node)
        self.depth: list[int] = []
        starts = [0, *sorted(self.spawners)]
        for start, end in zip(starts, [*starts[1:], len(self.letters)], strict=True):
            by = self.spawners.get(start)
            base = 0 if by is None else self.depth[by] + 1
            roots = sum(not parents for parents in self.parents[start:end])
            for node in range(start, end):
                self.depth.append(self._depth(node, base, roots))

    def _depth(self, node: int, base: int, roots: int) -> int:
        above = [each for each in self.parents[node] if each < node]  # what was added later joins an earlier list
        if not above:
            return base + int(roots > 1 and self.tasks[node] != "")
        if self.tasks[node] == "":
            return max(min(self.depth[each] for each in above) - 1, base)
        return self.depth[above[0]] + (len(self.children[above[0]]) > 1)

    def lines(self) -> Iterator[str]:
        """One line per job; neighbours that are alike share one."""
        node = 0
        while node < len(self.letters):
            last = node
            while last + 1 < len(self.letters) and self._alike(node, last + 1):
                last += 1
            if self.tasks[node]:
                yield self._line(node, last)
            node = last + 1

    def _alike(self, one: int, other: int) -> bool:
        same = self.tasks[one] == self.tasks[other] and self.depth[one] == self.depth[other]
        same = same and (other not in self.spawners or self.spawners[other] == self.spawners.get(one))
        return same and self.parents[one] == self.parents[other] and self.children[one] == self.children[other]

    def _line(self, first: int, last: int) -> str:
        mark = "  " * self.depth[first] + ("├ " if self.depth[first] else "")
        numbers = str(first) if first == last else f"{first}-{last}"
        name = safe_text(self.tasks[first]) + ("" if first == last else f" ×{last - first + 1:,}")
        counts = Counter(self._word(letter) for letter in self.letters[first : last + 1])
        said = next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n:,} {word}" for word, n in counts.items())
        added = f"  added by {self.spawners[first]}" if first in self.spawners else ""
        return f"{mark}{name}  [{numbers}]  {said}{added}"

    def _word(self, letter: str) -> str:
        return "skipped" if self.over and letter == "w" else WORDS[letter]


def draw(found: flows.FlowView, children: Sequence[Sequence[int]]) -> list[str]:
    """The lines of a tree."""
    return list(Tree(found, children).lines())


@click.command()
@click.argument("workflow_id")
@click.option("--queue", "-q", help="Its queue; default: every one is asked.")
@click.option("--cancel", "action", flag_value="cancel", help="Let nothing more of it begin, and cancel its jobs.")
@click.option("--retry", "action", flag_value="retry", help="Let its failed jobs run again, and what is behind them.")
@with_session
def workflow(session: Session, workflow_id: str, queue: str | None, action: str | None) -> int:
    """Draw a workflow with the states of its jobs; cancel it, or send it on.

    The numbers in brackets are those of its jobs: the id of job 3 is WORKFLOW_ID.3.
    """
    inspector = session.inspector
    queues = session.run(inspector.parts(session.known_queue(queue) if queue else None))
    place = session.run(_find(queues, workflow_id))
    if place is None:
        raise NotFound(f"no workflow {safe_text(workflow_id)!r}: there was none of this id, or its result_ttl is over")
    done = _act(session, place, workflow_id, action)
    found = session.run(flows.view(place, workflow_id))
    assert found is not None
    small = len(found.letters) <= DRAWN
    children = session.run(flows.edges(place, workflow_id, len(found.letters))) if small else []
    words = WORDS if found.state == "running" else {**WORDS, "w": "skipped"}
    counts = Counter(words[letter] for letter in found.letters if letter not in "gG-")
    tree = draw(found, children) if small else []
    head = {"id": workflow_id, "queue": place.queue, "name": found.fields.get("name", ""), "state": found.state}
    told = ", ".join(f"{number:,} {word}" for word, number in counts.items())

    def lines() -> Iterator[str]:
        name = safe_text(head["name"]) or "workflow"
        yield f"{name} {workflow_id}  {found.state}  queue {place.queue}  since {moment(found.started_ms / 1_000)}"
        yield from tree
        yield f"{counted(sum(counts.values()), 'job')}: {told}"

    session.answer({**head, "counts": counts, "tree": tree}, lines())
    if not done:
        click.echo(f"fastq: nothing to {action}: {_why_not(found, action)}", err=True)
    return ExitCode.OK if done else ExitCode.CRASH


def _act(session: Session, place: QueueKeys, workflow_id: str, action: str | None) -> bool:
    """Whether there was something to do."""
    if action == "cancel":
        ttl_ms = round(session.settings.result_ttl * 1_000)
        return session.run(flows.cancel(place, workflow_id, flows.ended_record("cancelled", "", 0), ttl_ms))
    return action is None or session.run(flows.retry(place, workflow_id)) > 0


def _why_not(found: flows.FlowView, action: str | None) -> str:
    if action == "cancel":
        return f"it has ended as {found.state}"
    return (
        "the dead letters of its failed jobs are gone" if flows.FAILED in found.letters else "no job of it has failed"
    )


def _find(queues: Sequence[QueueKeys], flow: str) -> Operation[QueueKeys | None]:
    for q in queues:
        if (yield from flows.view(q, flow)) is not None:
            return q
    return None


verbs = {"workflow": workflow}
