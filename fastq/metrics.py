"""Every metric in one table, counted in shared memory by the processes and summed by the monitor.

A process counts into the cells of its board slot: ``WorkerMetrics``, one compiled call per job. The monitor sums all slots
(``aggregate``); fastq/exposition.py writes them in Prometheus's text format. Cells outlive the process that filled them, so
the sums only grow as long as the supervisor lives.

Labels (A-15): a label value is a queue or task name that the worker registered, or ``other``; at most ``SERIES_LIMIT``
pairs of queue and task per process. Of limiters: their ids and the types of jobs, at most ``LIMIT_SERIES`` pairs. Job ids, errors and text of users are never labels.

``python -m fastq.metrics`` prints the table of docs/metrics.md. Beside limits.py the only module that knows the compiled core.
"""

from __future__ import annotations

import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from fastq._core import RUN_BUCKETS, RUN_CELL, SERIES_CELLS, STATUS_COUNT, WAIT_BUCKETS, WAIT_CELL, Ledger
from fastq.board import Slot, SlotState

__all__ = [
    "COUNTERS",
    "LIMIT_COUNTERS",
    "METRICS",
    "NOT_RUN",
    "OTHER",
    "RUN_BUCKETS",
    "STATUSES",
    "WAIT_BUCKETS",
    "Change",
    "CounterName",
    "Histogram",
    "LimitCounter",
    "LimitWaits",
    "Metric",
    "ProcessGauge",
    "SeriesTable",
    "Snapshot",
    "Status",
    "TaskCounts",
    "WorkerMetrics",
    "aggregate",
    "change",
    "count_limits_in",
]

Status = Literal["success", "retry", "failed", "cancelled", "snoozed", "released", "lost"]
STATUSES: Final[tuple[Status, ...]] = get_args(Status)
"""What ended one run of a job; its index here is the ``status`` of ``WorkerMetrics.observe``."""

OTHER: Final = "other"
"""The label value of every name that the process did not register."""

NOT_RUN: Final = float("nan")
"""A waiting or run time that is not to be observed: the job was handed back before it ran."""

LIMIT_SERIES: Final = 200
"""Pairs of limiter and job type that one process counts apart; the rest is ``other``. A part of ``SERIES_LIMIT``."""

NOTED_WAIT: Final = 0.1
"""Seconds: waits for a limiter above this are what ``background_job_rate_limit_waits_total`` counts."""

SERIES_LIMIT: Final = 1_000
"""Pairs of queue and task that one process counts apart; the rest is ``other`` (A-15)."""

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

LimitCounter = Literal[
    "granted", "returned", "expired", "denied", "requests", "penalties", "errors", "passed", "late"
]  # fmt: skip


def _of_limiter(name: str, text: str) -> Metric:
    return Metric(f"fastq_limit_{name}_total", "counter", ("limiter",), text)


LIMIT_COUNTERS: Final[dict[LimitCounter, Metric]] = {
    "granted": _of_limiter("units_granted", "Units that Redis granted; used are those neither returned nor expired."),
    "returned": _of_limiter(
        "units_returned", "Units given back unused: a waiter was cancelled, or others were missing."
    ),
    "expired": _of_limiter("units_expired", "Units that nobody used within `use_within`, given back then."),
    "denied": _of_limiter("denials", "Requests that Redis granted nothing: units or slots are short, or a penalty."),
    "requests": _of_limiter("requests", "Round trips to Redis for the limiter."),
    "penalties": _of_limiter("penalties", "Calls of `penalize`."),
    "errors": _of_limiter("errors", "Requests without an answer, or answered with an error."),
    "passed": _of_limiter("passed", "Acquires that passed unchecked, `on_error` being `open`."),
    "late": _of_limiter(
        "late", "Answers that came, and waiters that ran, too late for their units to be used: raise `use_within`."
    ),
}
"""Counters of one limiter, all its partitions together; position = cell of its series."""

_JOB = ("queue", "task")
_LIMIT = ("limiter", "job_type")
_ALIAS = ("limiter_id", "job_type")

METRICS: Final[tuple[Metric, ...]] = (
    Metric("fastq_jobs_finished_total", "counter", (*_JOB, "status"), "Runs of jobs that ended, by how."),
    Metric("fastq_job_duration_seconds", "histogram", _JOB, "Run time of the handler."),
    Metric("fastq_job_wait_seconds", "histogram", _JOB, "Time from ready, or due, to the start of the handler."),
    Metric("fastq_limit_wait_seconds", "histogram", _LIMIT, "Acquires that could not be served at once: their waits."),
    Metric("fastq_limit_timeouts_total", "counter", _LIMIT, "Acquires that ended with LimitTimeout."),
    *LIMIT_COUNTERS.values(),
    Metric("background_job_rate_limit_waits_total", "counter", _ALIAS, "Waits for a limiter above 0.1 s."),
    Metric("background_job_rate_limit_wait_seconds", "histogram", _ALIAS, "Waits for a limiter above 0.1 s."),
    Metric("background_job_rate_limit_timeouts_total", "counter", _ALIAS, "As `fastq_limit_timeouts_total`."),
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
_LAYOUT: Final = (
    zlib.crc32(
        repr((STATUSES, tuple(COUNTERS), tuple(LIMIT_COUNTERS), _FIRST_SERIES, WAIT_BUCKETS, RUN_BUCKETS)).encode()
    )
    | 1
)
"""Written into each slot: after an upgrade and SIGHUP a new worker writes another layout than the old monitor reads."""

if len(STATUSES) != STATUS_COUNT or len(COUNTERS) > _FIRST_SERIES:
    raise AssertionError("fastq/_core.pyx and fastq/metrics.py disagree on the layout of the cells")

# Series of limiters have names that no queue has, and put other things into the same cells:
# ("limit/", limiter): LIMIT_COUNTERS in their order | ("limit/<limiter>", job type): waits as status 0 and "wait", those
# above NOTED_WAIT as "run", timeouts as status 1
_OF_LIMIT: Final = "limit/"
_WAITED: Final = 0
_TIMED_OUT: Final = 1
_LIMIT_CELL: Final[dict[LimitCounter, int]] = {name: i for i, name in enumerate(LIMIT_COUNTERS)}
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
        self._lock = threading.Lock()
        self._limit_series = sum(name.startswith(_OF_LIMIT) for name, _ in self._bases)
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._bases)

    @property
    def other(self) -> int:
        """The base cell of what has no series."""
        return self._other

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

    def of_limiter(self, limiter: str) -> int:
        """The base cell of the counters of a limiter."""
        return self._of_limits(_OF_LIMIT, limiter)

    def of_waits(self, limiter: str, job_type: str) -> int:
        """The base cell of the waits for a limiter by jobs of a type."""
        return self._of_limits(_OF_LIMIT + limiter, job_type)

    def _of_limits(self, first: str, second: str) -> int:
        base = self._bases.get((first, second))
        if base is not None:
            return base
        with self._lock:  # blocking code acquires in threads
            if self._limit_series >= LIMIT_SERIES:
                first, second = (_OF_LIMIT if first == _OF_LIMIT else _OF_LIMIT + OTHER), OTHER
            base = self._bases.get((first, second))
            if base is None:
                self._limit_series += 1
                base = self._append(first, second)
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

    def limit_count(self, limiter: str, name: LimitCounter, n: float = 1) -> None:
        """Add ``n`` to a counter of a limiter."""
        table = self._table
        base = table.of_limiter(limiter)
        if base != table.other:
            self._add(base + _LIMIT_CELL[name], n)

    def limit_wait(self, limiter: str, job_type: str, seconds: float) -> None:
        """An acquire for a job of that type (a task's name, "" outside of jobs) could not be served at once."""
        table = self._table
        base = table.of_waits(limiter, job_type)
        if base != table.other:
            self.observe(base, _WAITED, seconds, seconds if seconds > NOTED_WAIT else NOT_RUN)

    def limit_timeout(self, limiter: str, job_type: str) -> None:
        """An acquire ended with LimitTimeout."""
        table = self._table
        base = table.of_waits(limiter, job_type)
        if base != table.other:
            self._add(base + _TIMED_OUT, 1)


limits: WorkerMetrics | None = None
"""Where limiters of this process count; None: nowhere. A worker sets it."""


def count_limits_in(metrics: WorkerMetrics | None) -> None:
    """Let all limiters of this process count there."""
    global limits  # noqa: PLW0603 - limiters belong to the process, as its place on the board does
    limits = metrics


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
class LimitWaits:
    """Waits for one limiter by jobs of one type ("": outside of jobs)."""

    limiter: str
    job_type: str
    all: Histogram
    noted: Histogram
    """Those above ``NOTED_WAIT``."""
    timeouts: int


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
    limiters: dict[str, dict[LimitCounter, int]] = field(default_factory=dict)
    waits: tuple[LimitWaits, ...] = ()


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
        tasks=tuple(_task_counts(*name, sums[name]) for name in sorted(sums) if not name[0].startswith(_OF_LIMIT)),
        counters={name: int(n) for name, n in counters.items()},
        processes=tuple(_process(slot, now) for slot in board if slot.state != SlotState.FREE),
        limiters={name[1]: _limit_counts(sums[name]) for name in sorted(sums) if name[0] == _OF_LIMIT},
        waits=tuple(_limit_waits(*name, sums[name]) for name in sorted(sums) if _OF_LIMIT == name[0][:6] != name[0]),
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


def _limit_counts(cells: Sequence[float]) -> dict[LimitCounter, int]:
    return {name: int(cells[at]) for name, at in _LIMIT_CELL.items()}


def _limit_waits(name: str, job_type: str, cells: Sequence[float]) -> LimitWaits:
    counts = _task_counts(name, job_type, cells)
    return LimitWaits(name.removeprefix(_OF_LIMIT), job_type, counts.wait, counts.run, int(cells[_TIMED_OUT]))


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
            f"- Buckets of `fastq_job_duration_seconds` and `background_job_rate_limit_wait_seconds`: {', '.join(f'{bound:g}' for bound in RUN_BUCKETS)}.",
            f"- Buckets of `fastq_job_wait_seconds` and of `fastq_limit_wait_seconds`: {', '.join(f'{bound:g}' for bound in WAIT_BUCKETS)}.",
            "",
        )
    )


if __name__ == "__main__":
    sys.stdout.write(document())
