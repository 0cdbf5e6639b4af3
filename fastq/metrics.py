"""Every metric in one table, counted in shared memory by the processes and summed by the monitor.

A process counts into the cells of its board slot: ``WorkerMetrics``, one compiled call per job. The monitor sums all slots
(``aggregate``) and writes them in Prometheus's text format (``Exposition``). Cells outlive the process that filled them, so
the sums only grow as long as the supervisor lives.

Labels (F-A15): a label value is a queue or task name that the worker registered, or ``other``; at most ``SERIES_LIMIT``
pairs of queue and task per process. Job ids, errors and text of users are never labels.

``python -m fastq.metrics`` prints the table of docs/metrics.md. The only module that knows prometheus_client, which it imports with the
first ``render()``; beside limits.py the only one that knows the compiled core.
"""

from __future__ import annotations

import functools
import platform
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Literal, get_args

from fastq._core import RUN_BUCKETS, RUN_CELL, SERIES_CELLS, STATUS_COUNT, WAIT_BUCKETS, WAIT_CELL, Ledger
from fastq.board import Slot, SlotState
from fastq.errors import FastQError

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

__all__ = [
    "CONTENT_TYPE",
    "COUNTERS",
    "METRICS",
    "NOT_RUN",
    "OTHER",
    "RUN_BUCKETS",
    "STATUSES",
    "WAIT_BUCKETS",
    "Change",
    "CounterName",
    "Exposition",
    "Histogram",
    "Metric",
    "ProcessGauge",
    "QueueGauge",
    "SeriesTable",
    "Snapshot",
    "Status",
    "TaskCounts",
    "WorkerMetrics",
    "aggregate",
    "change",
]

Status = Literal["success", "retry", "failed", "cancelled", "snoozed", "released", "lost"]
STATUSES: Final[tuple[Status, ...]] = get_args(Status)
"""What ended one run of a job; its index here is the ``status`` of ``WorkerMetrics.observe``."""

OTHER: Final = "other"
"""The label value of every name that the process did not register."""

NOT_RUN: Final = float("nan")
"""A waiting or run time that is not to be observed: the job was handed back before it ran."""

SERIES_LIMIT: Final = 1_000
"""Pairs of queue and task that one process counts apart; the rest is ``other`` (F-A15)."""

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Of what ``Exposition.render`` returns."""

# -- the table ------------------------------------------------------------------------------------

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One family of the exposition: its full name, kind, labels and meaning."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str


CounterName = Literal[
    "round_trips", "redis_errors", "reconnects", "leases_lost", "stale_outcomes", "recycled", "died", "killed",
    "loop_stalls", "recovered", "poisoned", "promoted", "fired", "pruned", "labels_dropped", "log_lines_dropped",
]  # fmt: skip


def _counter(name: str, text: str) -> Metric:
    return Metric(f"fastq_{name}_total", "counter", (), text)


COUNTERS: Final[dict[CounterName, Metric]] = {
    "round_trips": _counter("redis_round_trips", "Waits for an answer of Redis, whatever the number of commands."),
    "redis_errors": _counter("redis_errors", "Calls to Redis without an answer in time, or answered with an error."),
    "reconnects": _counter("redis_reconnects", "Connections to Redis that were made again after a loss."),
    "leases_lost": _counter("leases_lost", "Running jobs whose lease ran out or was taken: they may run twice."),
    "stale_outcomes": _counter("stale_outcomes", "Outcomes dropped because another worker owned the job by then."),
    "recycled": _counter("workers_recycled", "Workers that ended by themselves at max_jobs or max_rss."),
    "died": _counter("workers_died", "Workers that ended without being told to."),
    "killed": _counter("workers_killed", "Workers killed because their event loop was blocked for hang_timeout."),
    "loop_stalls": _counter("loop_stalls", "Times that a worker's event loop was blocked for more than a second."),
    "recovered": _counter("jobs_recovered", "Jobs of dead workers that were made ready again."),
    "poisoned": _counter("jobs_poisoned", "Jobs moved to the dead-letter queue because their workers kept dying."),
    "promoted": _counter("jobs_promoted", "Scheduled jobs and retries that became due and were made ready."),
    "fired": _counter("schedules_fired", "Jobs that a cron entry or an interval enqueued."),
    "pruned": _counter("records_pruned", "Old records and dead letters that were deleted."),
    "labels_dropped": _counter("labels_dropped", "Look-ups of a queue and task that are counted as `other`."),
    "log_lines_dropped": _counter("log_lines_dropped", "Log lines lost because nobody read them fast enough."),
}
"""Process-wide counters of workers, scheduler and monitor; position = cell."""

_JOB = ("queue", "task")

METRICS: Final[tuple[Metric, ...]] = (
    Metric("fastq_jobs_finished_total", "counter", (*_JOB, "status"), "Runs of jobs that ended, by how."),
    Metric("fastq_job_duration_seconds", "histogram", _JOB, "Run time of the handler."),
    Metric("fastq_job_wait_seconds", "histogram", _JOB, "Time from ready, or due, to the start of the handler."),
    *COUNTERS.values(),
    Metric("fastq_workers", "gauge", ("state",), "Worker processes."),
    Metric("fastq_worker_slots", "gauge", ("state",), "Jobs that the workers run (`busy`) and could start (`free`)."),
    Metric("fastq_worker_resident_bytes", "gauge", ("worker",), "Resident memory of a worker, by its board slot."),
    Metric("fastq_loop_blocked_seconds", "gauge", ("worker",), "Time since a worker's loop last turned, 0 if it does."),
    Metric("fastq_queue_depth", "gauge", ("queue", "state"), "Jobs `pending`, `scheduled`, `parked` and `running`."),
    Metric("fastq_queue_oldest_age_seconds", "gauge", ("queue",), "Age of the oldest pending job, 0 if there is none."),
    Metric("fastq_queue_paused", "gauge", ("queue",), "1 while the queue is paused, else 0."),
    Metric("fastq_dead_letters", "gauge", ("queue",), "Jobs in the dead-letter queue."),
    Metric("fastq_redis_up", "gauge", (), "1 if the queues could be read from Redis for this scrape, else 0."),
    Metric("fastq_build_info", "gauge", ("version", "python"), "1, with the versions that run."),
)
"""Every metric, in the order of the exposition."""

# -- layout: cells of a slot = counters, then one block per series --------------------------------------

_FIRST_SERIES: Final = 64  # room for counters to come; checked below
_CELL: Final[dict[CounterName, int]] = {name: i for i, name in enumerate(COUNTERS)}
_WAIT = slice(WAIT_CELL, WAIT_CELL + len(WAIT_BUCKETS) + 1)
_RUN = slice(RUN_CELL, RUN_CELL + len(RUN_BUCKETS) + 1)
_LAYOUT: Final = zlib.crc32(repr((STATUSES, tuple(COUNTERS), _FIRST_SERIES, WAIT_BUCKETS, RUN_BUCKETS)).encode()) | 1
"""Written into each slot: after an upgrade and SIGHUP a new worker writes another layout than the old monitor reads."""

if len(STATUSES) != STATUS_COUNT or len(COUNTERS) > _FIRST_SERIES:
    raise AssertionError("fastq/_core.pyx and fastq/metrics.py disagree on the layout of the cells")

# names of a slot: bytes used (4), layout (4), then per series a length (2) and "queue\0task"
_NAMES_AT: Final = 8


def _head(slot: Slot) -> memoryview[int]:
    return slot.names[:_NAMES_AT].cast("I")


def _read_names(slot: Slot) -> Iterator[tuple[str, str]]:
    """The (queue, task) of each series in the order of their cells; nothing if the layout is not ours."""
    used, layout = _head(slot)
    if layout != _LAYOUT:
        return
    data = bytes(slot.names[_NAMES_AT : _NAMES_AT + used])
    at = 0
    while at < len(data):
        end = at + 2 + int.from_bytes(data[at : at + 2], "little")
        queue, _, task = data[at + 2 : end].decode(errors="replace").partition("\0")
        yield queue, task
        at = end


# -- counting: the side of the processes ------------------------------------------------------------------


class SeriesTable:
    """Which cells count for a pair of queue and task, and their names, written where the monitor finds them.

    Names of an earlier process in the same slot keep their cells. ``dropped`` counts the look-ups that were answered
    with ``other`` for one of the names or, past the limit or the size of the name table, for both.
    """

    def __init__(self, slot: Slot, *, queues: Iterable[str], tasks: Iterable[str], limit: int = SERIES_LIMIT) -> None:
        self._queues = frozenset(queues)
        self._tasks = frozenset(tasks)
        self._slot = slot
        self._head = _head(slot)
        if self._head[1] != _LAYOUT:
            self._reset()
        self._limit = min(limit, (len(slot.cells) - _FIRST_SERIES) // SERIES_CELLS)
        if self._limit < 1:
            raise ValueError(
                f"{len(slot.cells)} cells hold no series: at least {_FIRST_SERIES + SERIES_CELLS} are needed"
            )
        self._bases = {name: _FIRST_SERIES + i * SERIES_CELLS for i, name in enumerate(_read_names(slot))}
        self._other = self._bases.get((OTHER, OTHER)) or self._append(OTHER, OTHER)
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._bases)

    def series(self, queue: str, task: str) -> int:
        """The base cell of ``queue`` and ``task``; names that are not registered share ``other``."""
        base = self._bases.get((queue, task))
        if base is not None:
            return base
        known_queue = queue if queue in self._queues else OTHER
        known_task = task if task in self._tasks else OTHER
        base = self._bases.get((known_queue, known_task)) or self._append(known_queue, known_task)
        self.dropped += base == self._other or (known_queue, known_task) != (queue, task)
        return base

    def _append(self, queue: str, task: str) -> int:
        name = f"{queue}\0{task}".encode(errors="replace")
        start = _NAMES_AT + self._head[0]
        end = start + 2 + len(name)
        if len(self._bases) >= self._limit or end > len(self._slot.names):
            return self._other
        self._slot.names[start:end] = len(name).to_bytes(2, "little") + name
        self._head[0] = end - _NAMES_AT  # last: a reader sees whole names only
        base = _FIRST_SERIES + len(self._bases) * SERIES_CELLS
        self._bases[queue, task] = base
        return base

    def _reset(self) -> None:
        used_before = self._head[1] != 0
        self._head[1] = 0  # readers skip the slot until it is of one layout again
        self._head[0] = 0
        cells = self._slot.cells
        if used_before:  # by another layout; a new slot is zero, and its untouched pages cost no memory
            for i in range(len(cells)):
                cells[i] = 0.0
        self._head[1] = _LAYOUT


class WorkerMetrics:
    """What a process counts, in its slot of the board. Without a supervisor: the slot of a private ``Board(1)``.

    ``observe(base, status, wait, run)``, once per job, counts in the series whose base cell ``series(queue, task)`` gave:
    ``status`` is an index of ``STATUSES``, times are in seconds, ``NOT_RUN`` where there is none.
    ``start(row, job_id)`` before a handler and ``finish(row)`` after it name the running jobs: the suspects, should
    the process die. All three are the compiled methods themselves; a number out of range is an IndexError.
    """

    __slots__ = ("_add", "_table", "finish", "observe", "start")

    def __init__(self, slot: Slot, *, queues: Iterable[str] = (), tasks: Iterable[str] = ()) -> None:
        self._table = SeriesTable(slot, queues=queues, tasks=tasks)
        ledger = Ledger(slot.cells, slot.rows)
        self._add = ledger.add
        self.observe: Final[Callable[[int, int, float, float], None]] = ledger.observe
        self.start: Final[Callable[[int, str | bytes], None]] = ledger.start
        self.finish: Final[Callable[[int], None]] = ledger.finish

    def series(self, queue: str, task: str) -> int:
        """The base cell for ``observe``; ask once per task and queue and keep it."""
        table = self._table
        dropped = table.dropped
        base = table.series(queue, task)
        if table.dropped != dropped:
            self.count("labels_dropped")
        return base

    def count(self, name: CounterName, n: int = 1) -> None:
        """Add ``n`` to a counter of this process."""
        self._add(_CELL[name], n)


# -- reading: the side of the monitor ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations in seconds: how many fell into each bucket (the last: above all bounds) and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Seconds; 0 without observations."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, q: float) -> float:
        """An estimate in seconds, linear within a bucket; the last bound if it lies above it, 0 without observations."""
        rank = q * self.count
        low, below = 0.0, 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count and below + count >= rank:
                return low + (bound - low) * max(rank - below, 0.0) / count
            low, below = bound, below + count
        return low if below < self.count else 0.0

    def since(self, earlier: Histogram) -> Histogram:
        """The observations made after ``earlier``."""
        counts = (max(b - a, 0) for a, b in zip(earlier.counts, self.counts, strict=True))
        return Histogram(self.bounds, tuple(counts), max(self.total - earlier.total, 0.0))


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """One queue and task: ended runs by status, waiting and run times."""

    queue: str
    task: str
    finished: dict[Status, int]
    wait: Histogram
    run: Histogram

    def since(self, earlier: TaskCounts) -> TaskCounts:
        """What was counted after ``earlier``."""
        finished: dict[Status, int] = {
            status: max(n - earlier.finished[status], 0) for status, n in self.finished.items()
        }
        return TaskCounts(self.queue, self.task, finished, self.wait.since(earlier.wait), self.run.since(earlier.run))


@dataclass(frozen=True, slots=True)
class ProcessGauge:
    """One child of the supervisor as the board shows it."""

    slot: int
    role: str
    state: str
    pid: int
    worker_id: str
    busy: int
    concurrency: int
    rss: int
    blocked: float
    """Seconds since its loop last turned, less the 0.1 s between two turns; 0 for a process without a loop."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All counters of a host at one moment. Plain data: ``msgspec.json.encode`` takes it as it is."""

    at: float
    """``time.monotonic()`` seconds."""
    tasks: tuple[TaskCounts, ...]
    counters: dict[CounterName, int]
    processes: tuple[ProcessGauge, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """What was counted between two snapshots, ``seconds`` apart."""

    seconds: float
    tasks: tuple[TaskCounts, ...]
    counters: dict[CounterName, int]

    def per_second(self, status: Status | None = None, *, queue: str | None = None, task: str | None = None) -> float:
        """Ended runs per second: of a status, a queue, a task, or all."""
        chosen = (t for t in self.tasks if queue in (None, t.queue) and task in (None, t.task))
        ended = sum(sum(t.finished.values()) if status is None else t.finished[status] for t in chosen)
        return ended / self.seconds if self.seconds > 0 else 0.0


def aggregate(board: Iterable[Slot], *, now: float | None = None) -> Snapshot:
    """The sum of every slot of ``board``, the ones of dead and replaced processes included.

    Rates are the difference of two: ``change(before, after)``.
    """
    now = time.monotonic() if now is None else now
    sums: dict[tuple[str, str], Sequence[float]] = {}
    counters: dict[CounterName, float] = dict.fromkeys(COUNTERS, 0.0)
    for slot in board:
        names = list(_read_names(slot))
        cells: Sequence[float] = slot.cells[: _FIRST_SERIES + len(names) * SERIES_CELLS].tolist() if names else []
        for at, name in enumerate(names):
            base = _FIRST_SERIES + at * SERIES_CELLS
            series = cells[base : base + SERIES_CELLS]
            known = sums.get(name)
            sums[name] = series if known is None else [a + b for a, b in zip(known, series, strict=True)]
        for counter, n in zip(COUNTERS, cells, strict=False):
            counters[counter] += n
    return Snapshot(
        at=now,
        tasks=tuple(_task_counts(*name, sums[name]) for name in sorted(sums)),
        counters={name: int(n) for name, n in counters.items()},
        processes=tuple(_process(slot, now) for slot in board if slot.state != SlotState.FREE),
    )


def change(before: Snapshot, after: Snapshot) -> Change:
    """What was counted from ``before`` to ``after``. A counter that started anew (a new supervisor) counts as 0."""
    old = {(t.queue, t.task): t for t in before.tasks}
    tasks = (t.since(old[t.queue, t.task]) if (t.queue, t.task) in old else t for t in after.tasks)
    counters: dict[CounterName, int] = {name: max(n - before.counters[name], 0) for name, n in after.counters.items()}
    return Change(after.at - before.at, tuple(tasks), counters)


def _task_counts(queue: str, task: str, cells: Sequence[float]) -> TaskCounts:
    numbers = [int(n) for n in cells]
    return TaskCounts(
        queue,
        task,
        finished=dict(zip(STATUSES, numbers, strict=False)),
        wait=Histogram(WAIT_BUCKETS, tuple(numbers[_WAIT]), cells[_WAIT.stop]),
        run=Histogram(RUN_BUCKETS, tuple(numbers[_RUN]), cells[_RUN.stop]),
    )


_TURNS = frozenset({SlotState.RUNNING, SlotState.QUIET, SlotState.DRAINING})
_TICK: Final = 0.1  # seconds between two turns of a healthy loop


def _process(slot: Slot, now: float) -> ProcessGauge:
    state = slot.state
    ticked = slot.ticked_at
    blocked = max(now - ticked - _TICK, 0.0) if ticked and state in _TURNS else 0.0
    return ProcessGauge(
        slot=slot.index,
        role=slot.role,
        state=state.name.lower(),
        pid=slot.pid,
        worker_id=slot.worker_id,
        busy=slot.busy,
        concurrency=slot.concurrency,
        rss=slot.rss,
        blocked=blocked,
    )


# -- exposition ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QueueGauge:
    """One configured queue as Redis has it now."""

    queue: str
    pending: int
    scheduled: int
    parked: int
    running: int
    dead: int
    oldest_age: float
    """Seconds that the oldest ready job has waited; 0 if there is none."""
    paused: bool = False


Value = float | Histogram
Samples = Iterator[tuple[str, tuple[str, ...], Value]]


class Exposition:
    """The metrics of one board in Prometheus's text format; also a collector for a registry of one's own.

    ``gauges`` reads the configured queues from Redis, once per scrape, in the thread that scrapes. While it raises a
    FastQError or OSError the queue gauges are missing and ``fastq_redis_up`` is 0: what the processes counted is still told.
    """

    def __init__(self, board: Iterable[Slot], gauges: Callable[[], Iterable[QueueGauge]] | None = None) -> None:
        self._board = board
        self._gauges = gauges

    def render(self) -> bytes:
        """The answer to a scrape; its type is ``CONTENT_TYPE``."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Family]:
        """One family per metric that has a sample, in the order of ``METRICS``."""
        samples: dict[str, list[tuple[tuple[str, ...], Value]]] = {}
        for name, labels, value in self._samples():
            samples.setdefault(name, []).append((labels, value))
        return (_family(metric, samples[metric.name]) for metric in METRICS if metric.name in samples)

    def _samples(self) -> Samples:
        snapshot = aggregate(self._board)
        for counts in snapshot.tasks:
            yield from _task_samples(counts)
        for name, count in snapshot.counters.items():
            yield COUNTERS[name].name, (), count
        yield from _process_samples(snapshot.processes)
        if self._gauges is not None:
            yield from _queue_samples(self._gauges)
        yield "fastq_build_info", (_version(), platform.python_version()), 1


def _task_samples(counts: TaskCounts) -> Samples:
    labels = (counts.queue, counts.task)
    for status, n in counts.finished.items():
        yield "fastq_jobs_finished_total", (*labels, status), n
    yield "fastq_job_duration_seconds", labels, counts.run
    yield "fastq_job_wait_seconds", labels, counts.wait


def _process_samples(processes: Iterable[ProcessGauge]) -> Samples:
    workers = [p for p in processes if p.role == "worker"]
    states = Counter(p.state for p in workers)
    for state in SlotState:
        if state != SlotState.FREE:
            yield "fastq_workers", (state.name.lower(),), states[state.name.lower()]
    serving = [p for p in workers if p.state in ("running", "quiet", "draining")]
    busy = sum(p.busy for p in serving)
    yield "fastq_worker_slots", ("busy",), busy
    yield "fastq_worker_slots", ("free",), sum(max(p.concurrency - p.busy, 0) for p in serving if p.state == "running")
    for p in serving:
        yield "fastq_worker_resident_bytes", (str(p.slot),), p.rss
        yield "fastq_loop_blocked_seconds", (str(p.slot),), p.blocked


def _queue_samples(read: Callable[[], Iterable[QueueGauge]]) -> Samples:
    try:
        gauges = list(read())[:SERIES_LIMIT]
    except (FastQError, OSError):
        yield "fastq_redis_up", (), 0
        return
    yield "fastq_redis_up", (), 1
    for gauge in gauges:
        yield "fastq_queue_depth", (gauge.queue, "pending"), gauge.pending
        yield "fastq_queue_depth", (gauge.queue, "scheduled"), gauge.scheduled
        yield "fastq_queue_depth", (gauge.queue, "parked"), gauge.parked
        yield "fastq_queue_depth", (gauge.queue, "running"), gauge.running
        yield "fastq_queue_oldest_age_seconds", (gauge.queue,), gauge.oldest_age
        yield "fastq_queue_paused", (gauge.queue,), gauge.paused
        yield "fastq_dead_letters", (gauge.queue,), gauge.dead


def _family(metric: Metric, samples: Iterable[tuple[tuple[str, ...], Value]]) -> Family:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, value in samples:
            if isinstance(value, Histogram):
                histogram.add_metric(labels, _cumulative(value), value.total)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels)
    for labels, value in samples:
        if not isinstance(value, Histogram):
            family.add_metric(labels, value)
    return family


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = (*(repr(bound) for bound in histogram.bounds), "+Inf")
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))


@functools.cache
def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fastq-jobs")
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"


# -- docs/metrics.md ------------------------------------------------------------------------------------------


def document() -> str:
    """The generated part of docs/metrics.md: the table, the statuses and the buckets."""
    rows = [f"| `{m.name}` | {m.kind} | {', '.join(f'`{x}`' for x in m.labels)} | {m.help} |" for m in METRICS]
    return "\n".join(
        (
            "| name | kind | labels | meaning |",
            "|---|---|---|---|",
            *rows,
            "",
            f"- `status`: {', '.join(f'`{status}`' for status in STATUSES)}.",
            f"- Buckets of `fastq_job_duration_seconds`: {', '.join(f'{bound:g}' for bound in RUN_BUCKETS)}.",
            f"- Buckets of `fastq_job_wait_seconds`: {', '.join(f'{bound:g}' for bound in WAIT_BUCKETS)}.",
            "",
        )
    )


if __name__ == "__main__":
    sys.stdout.write(document())
