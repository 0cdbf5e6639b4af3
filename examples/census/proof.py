"""The judgement: what was read back against what had to come out, and the journal against what the queue may do."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from census.journal import Event
from census.measure import Measures
from census.tasks import planned_failures
from fastq import JobState, JobStatus

SHOWN = 5  # faults that are told one by one


@dataclass(frozen=True)
class Kill:
    """The worker that was killed, and when (`time.monotonic()`)."""

    pid: int
    at: float


@dataclass
class Verdict:
    """What became of the jobs."""

    enqueued: int
    done: int = 0
    dead: int = 0
    lost: int = 0
    different: int = 0
    retried: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.done == self.enqueued and not self.faults


def judge(jobs: Mapping[str, str], statuses: Sequence[JobStatus | None], direct: Mapping[str, Measures]) -> Verdict:
    """Compare. `jobs` is the id and file of each job, in the order of `statuses`."""
    verdict = Verdict(enqueued=len(jobs))
    for (job, name), status in zip(jobs.items(), statuses, strict=True):
        if status is None or not status.state.final:
            verdict.lost += 1
            verdict.faults.append(f"lost: job {job} of {name}: {'no trace' if status is None else status.state}")
        elif status.state is not JobState.SUCCESS:
            verdict.dead += 1
            verdict.faults.append(f"{status.state}: job {job} of {name}: {status.last_error}")
        else:
            verdict.done += 1
            verdict.retried += status.attempts - 1
            _compare(verdict, name, status, direct[name])
    return verdict


def _compare(verdict: Verdict, name: str, status: JobStatus, expected: Measures) -> None:
    if status.result != expected:
        verdict.different += 1
        verdict.faults.append(f"differs: {name}: {status.result!r:.300}, direct: {expected}")
    if status.attempts != planned_failures(name) + 1:
        planned = planned_failures(name) + 1
        verdict.faults.append(f"attempts: {name} took {status.attempts}, planned were {planned}")


@dataclass(frozen=True)
class Runs:
    """What the journal says about runs that were started more than once, and about the time after the kill."""

    duplicates: int  # runs that were started again because their worker was killed
    unexplained: int  # runs that were started again although nobody was killed
    cut: int  # of them, those whose handler was running; the others had ended and were not reported yet
    first_again: float | None  # seconds from the kill until a handler that was cut off ran again
    all_again: float | None  # … until the last of them did
    replaced: float | None  # … until a new worker started its first job


def read_runs(events: Sequence[Event], kill: Kill | None) -> Runs:
    """Count the runs. One run is one attempt of one job: it starts once, unless its worker dies."""
    starts: defaultdict[tuple[str, int], list[Event]] = defaultdict(list)
    ended: Counter[tuple[int, str, int]] = Counter()
    for event in events:
        run = (event.job, event.attempt)
        if event.what == "start":
            starts[run].append(event)
        elif event.what != "up":
            ended[event.pid, *run] += 1
    again = {run: found for run, found in starts.items() if len(found) > 1}
    if kill is None:
        return Runs(0, sum(len(found) - 1 for found in again.values()), 0, None, None, None)
    explained = {run for run, found in again.items() if found[0].pid == kill.pid and len(found) == 2}
    cut = {run for run, found in starts.items() if found[0].pid == kill.pid and not ended[kill.pid, *run]}
    after = sorted(again[run][1].at - kill.at for run in cut & explained)  # those that did not run again are lost
    serving = _first_of_successor(events, kill)
    return Runs(
        duplicates=len(explained),
        unexplained=sum(len(found) - 1 for run, found in again.items() if run not in explained),
        cut=len(after),
        first_again=after[0] if after else None,
        all_again=after[-1] if after else None,
        replaced=None if serving is None else serving - kill.at,
    )


def _first_of_successor(events: Sequence[Event], kill: Kill) -> float | None:
    """When a worker that came up after the kill started its first job; when it came up, if there was none left."""
    came = {event.pid: event.at for event in events if event.what == "up" and event.at > kill.at}
    started = [event.at for event in events if event.what == "start" and event.pid in came]
    return min(started or came.values(), default=None)
