"""What is wanted of fastq, held against a saved run: each line says what was found, what was wanted and whether that is so.

What is compared was measured in turns, so of several rounds the median of the rounds' ratios counts. Goals in jobs, ms or µs are
those of the machine on which they were set; what a floor has in the same run tells how far they are off on another one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.load import rows
from benchmarks.load.candidates import FASTQ, FLOORS, NAMES, about

__all__ = ["Goal", "beside", "goals", "table"]

US = FASTQ.name
TRIP = "a bare round trip"


class Goal(NamedTuple):
    """One line."""

    what: str
    found: str
    wanted: str
    met: bool


class Run:
    """The rows of a saved run, as ratios and medians."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._rows: Mapping[str, Mapping[str, Any]] = data["rows"]

    def names(self, row: str) -> Collection[str]:
        return self._rows.get(row, {}).keys()

    def samples(self, row: str, who: str = US) -> list[float]:
        """
        Raises:
            KeyError: it was not measured.
        """
        found: list[float] = self._rows[row][who]["samples"]
        return found

    def median(self, row: str, who: str = US) -> float:
        return statistics.median(self.samples(row, who))

    def ratio(self, row: str, base: str, base_row: str = "", who: str = US) -> float:
        """Of one candidate to another, or of one row to another."""
        ours, theirs = self.samples(row, who), self.samples(base_row or row, base)
        if len(ours) != len(theirs):
            return statistics.median(ours) / statistics.median(theirs)
        return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))

    def best(self, row: str, among: Collection[str], *, least: bool = False) -> str:
        """The fastest of those that were measured.

        Raises:
            KeyError: none of them was.
        """
        measured = [name for name in self.names(row) if name in among]
        if not measured:
            raise KeyError(row)
        return (min if least else max)(measured, key=lambda name: self.median(row, name))


def goals(data: Mapping[str, Any]) -> list[Goal]:
    """Every goal of which the run has the rows; without the rivals there are fewer."""
    run = Run(data)
    found: list[Goal] = []
    for line in LINES:
        try:
            found += line(run)
        except KeyError:
            continue
    return found


def table(data: Mapping[str, Any]) -> str:
    """As Markdown."""
    lines = ["| | found | wanted | |", "|---|---|---|---|"]
    lines += [f"| {g.what} | {g.found} | {g.wanted} | {'yes' if g.met else '**no**'} |" for g in goals(data)]
    return "\n".join(lines)


BESIDE = (
    (rows.DRAIN, "one worker process drains", True),
    (rows.TWO, "two of them", True),
    (rows.SYNC, "plain functions, in threads", True),
    (rows.TOGETHER, "a producer and a worker at the same time", True),
    (rows.MANY, "enqueue in bulk", True),
    (rows.ONE, "enqueue one after another", True),
    (rows.P50, "an idle worker begins after, p50", False),
    (rows.P99, "p99", False),
    (rows.WORKER_US, "CPU of the worker, per job", False),
    (rows.BYTES, "memory of Redis, per pending job", False),
)


def beside(data: Mapping[str, Any]) -> str:
    """The README's table: fastq beside the best of the others."""
    run = Run(data)
    lines = ["| | fastq | the best that loses no job | the best of all |", "|---|---|---|---|"]
    for row, what, more in BESIDE:
        if US not in run.names(row):
            continue
        cells = [_shown(run.median(row), data["rows"][row][US]["unit"])]
        for among in (_at_least_once(), NAMES):
            try:
                other = run.best(row, among, least=not more)
            except KeyError:
                cells.append("")
            else:
                cells.append(f"{_shown(run.median(row, other), '')} ({other})")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _least(what: str, found: float, wanted: float, unit: str = "", beside: str = "") -> Goal:
    return Goal(what, _shown(found, unit) + beside, f"at least {_shown(wanted, unit)}", found >= wanted)


def _most(what: str, found: float, wanted: float, unit: str = "", beside: str = "") -> Goal:
    return Goal(what, _shown(found, unit) + beside, f"at most {_shown(wanted, unit)}", found <= wanted)


def _shown(value: float, unit: str) -> str:
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2 if value >= 0.1 else 4
    return f"{value:,.{digits}f}{' ' + unit if unit else ''}"


def _at_least_once() -> list[str]:
    return [name for name in NAMES if about(name).once]


# -- the lines, in the order of the rows --------------------------------------------------------


def _drain_of_rivals(run: Run) -> Iterator[Goal]:
    safe, any_ = run.best(rows.DRAIN, _at_least_once()), run.best(rows.DRAIN, NAMES)
    yield _least(
        f"drain, beside the fastest that loses nothing ({safe})",
        run.median(rows.DRAIN) / run.median(rows.DRAIN, safe), 3, "×",
    )  # fmt: skip
    yield _least(f"drain, beside the fastest ({any_})", run.median(rows.DRAIN) / run.median(rows.DRAIN, any_), 1.5, "×")


def _drain_of_floors(run: Run) -> Iterator[Goal]:
    for floor, wanted in (("redis-py", 1.0), ("protocol", 0.5)):
        yield _least(f"drain, beside the floor `{floor}`", run.ratio(rows.DRAIN, floor), wanted, "×")
    yield _least("drain", run.median(rows.DRAIN), 100_000, "jobs/s")
    yield _most("worker CPU per job", run.median(rows.WORKER_US), 10, "µs")


def _drain_with_more(run: Run) -> Iterator[Goal]:
    yield _least("results kept for 1 h, beside the drain", run.ratio(rows.KEPT, US, rows.DRAIN), 0.6, "×")
    yield _least("one limit that never denies, beside the drain", run.ratio(rows.LIMITED, US, rows.DRAIN), 0.9, "×")
    yield _least("two worker processes, beside one", run.ratio(rows.TWO, US, rows.DRAIN), 1.3, "×")


def _two(run: Run) -> Iterator[Goal]:
    other = run.best(rows.TWO, NAMES)
    yield _least(
        f"two, beside the fastest rival's two ({other})", run.median(rows.TWO) / run.median(rows.TWO, other), 1, "×"
    )


def _redis(run: Run) -> Iterator[Goal]:
    def both(who: str) -> float:
        return run.median(rows.REDIS_US, who) + run.median(rows.STORED_US, who)

    floors = sorted(both(name) for name in FLOORS)
    beside = f" (the floors, which do less: {floors[0]:.1f} to {floors[-1]:.1f})"
    yield _most("Redis CPU per job: enqueue, reserve and settle", both(US), 4, "µs", beside)


def _sync(run: Run) -> Iterator[Goal]:
    other = run.best(rows.SYNC, NAMES)
    yield _least(
        f"sync handlers, beside the fastest ({other})", run.median(rows.SYNC) / run.median(rows.SYNC, other), 3, "×"
    )


def _together(run: Run) -> Iterator[Goal]:
    other = run.best(rows.TOGETHER, _at_least_once())
    share = run.median(rows.TOGETHER) / run.median(rows.TOGETHER, other)
    yield _least(f"producer and worker together, beside the fastest that loses nothing ({other})", share, 3, "×")


def _bulk(run: Run) -> Iterator[Goal]:
    yield _least("enqueue many, beside Sidekiq", run.median(rows.MANY) / run.median(rows.MANY, "sidekiq"), 1.3, "×")


def _callers(run: Run) -> Iterator[Goal]:
    floor = run.best(rows.BURST, [name for name in run.names(rows.BURST) if name != US])
    beside = f" (the floor: {run.median(rows.BURST, floor):,.0f})"
    yield _least("500 concurrent callers of enqueue", run.median(rows.BURST), 60_000, "jobs/s", beside)


def _one(run: Run) -> Iterator[Goal]:
    floors = [name for name in run.names(rows.ONE) if name.startswith("floor")]
    shares = ", ".join(f"{name.removeprefix('floor: ')} {run.ratio(rows.ONE, TRIP, who=name):.2f}" for name in floors)
    for name, who in (("enqueue", US), ("enqueue_sync", f"{US}, enqueue_sync")):
        yield _least(
            f"{name} one at a time, beside a bare round trip",
            run.ratio(rows.ONE, TRIP, who=who),
            0.8,
            "×",
            f" ({shares})",
        )


def _latency(run: Run) -> Iterator[Goal]:
    for name, row, wanted in (("p50", rows.P50, 0.6), ("p99", rows.P99, 1.3)):
        yield _most(f"latency of an idle worker, {name}", run.median(row), wanted, "ms")
        other = run.best(row, NAMES, least=True)
        share = run.median(row) / run.median(row, other)
        yield _most(f"the same, beside the best rival ({other}, {run.median(row, other):.2f} ms)", share, 1, "×")


def _half(run: Run) -> Iterator[Goal]:
    each = ", ".join(f"{sample:.0f}" for sample in run.samples(rows.HALF))
    floor = run.median(rows.HALF, "floor: mixed")
    beside = f" ({each} at {run.median(rows.OFFERED):,.0f} jobs/s; the floor `mixed`: {floor:.1f})"
    yield _most("latency under half load, p99", run.median(rows.HALF), 10, "ms", beside)


def _counts(run: Run) -> Iterator[Goal]:
    yield _most("commands per job from the client", run.median(rows.SENT), 0.05)
    yield _most("round trips per job", run.median(rows.TRIPS), 0.02)


def _idle(run: Run) -> Iterator[Goal]:
    yield _most("idle worker, commands a second", run.median(rows.IDLE_COMMANDS), 2)
    yield _most("idle worker, CPU", run.median(rows.IDLE_CPU), 0.3, "% of a core")
    wake = run.median(rows.BUSY_CPU, "floor: wake")
    yield _most(
        "worker at 100 jobs/s, CPU", run.median(rows.BUSY_CPU), 4, "% of a core", f" (the floor `wake`: {wake:.1f})"
    )


def _backlog(run: Run) -> Iterator[Goal]:
    alone = "empty server"
    full = run.best(rows.BACKLOG, set(run.names(rows.BACKLOG)) - {alone})
    yield _least(f"drain beside {full}", run.ratio(rows.BACKLOG, alone, who=full), 0.9, "×")
    yield _least("promotion of due jobs", run.median(rows.PROMOTED), 50_000, "jobs/s")


def _sizes(run: Run) -> Iterator[Goal]:
    yield _most("Redis memory per pending job", run.median(rows.BYTES), 175, "bytes")
    jobs = run.best(rows.RSS, run.names(rows.RSS))
    yield _most(f"worker RSS ({jobs.partition(', ')[2]})", run.median(rows.RSS, jobs), 64, "MiB")
    yield _most("its growth in the second half", run.median(rows.SLOPE, jobs), 0.5, "MiB per 1 M jobs")


def _starts(run: Run) -> Iterator[Goal]:
    yield _most("`import fastq`", run.median(rows.IMPORT), 120, "ms")
    yield _most("start of a worker to its first job", run.median(rows.FIRST), 400, "ms")


LINES: tuple[Callable[[Run], Iterator[Goal]], ...] = (
    _drain_of_rivals, _drain_of_floors, _drain_with_more, _two, _redis, _sync, _together, _bulk, _callers, _one, _latency, _half,
    _counts, _idle, _backlog, _sizes, _starts,
)  # fmt: skip
