"""The metrics of a board in Prometheus's text format: what the monitor answers to a scrape.

The only module that knows prometheus_client, which it imports with the first ``render()``.
"""

from __future__ import annotations

import functools
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from fastq.board import Slot, SlotState
from fastq.errors import FastQError
from fastq.metrics import (
    COUNTERS,
    LIMIT_COUNTERS,
    METRICS,
    SERIES_LIMIT,
    Histogram,
    LimitCounter,
    LimitWaits,
    Metric,
    ProcessGauge,
    TaskCounts,
    aggregate,
)

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

__all__ = ["CONTENT_TYPE", "Exposition", "QueueGauge"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Of what ``Exposition.render`` returns."""


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
        for limiter, counted in snapshot.limiters.items():
            yield from _limiter_samples(limiter, counted)
        for waits in snapshot.waits:
            yield from _wait_samples(waits)
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


def _limiter_samples(limiter: str, counts: dict[LimitCounter, int]) -> Samples:
    for name, n in counts.items():
        yield LIMIT_COUNTERS[name].name, (limiter,), n


def _wait_samples(waits: LimitWaits) -> Samples:
    labels = (waits.limiter, waits.job_type)
    yield "fastq_limit_wait_seconds", labels, waits.all
    yield "fastq_limit_timeouts_total", labels, waits.timeouts
    yield "background_job_rate_limit_waits_total", labels, waits.noted.count
    yield "background_job_rate_limit_wait_seconds", labels, waits.noted
    yield "background_job_rate_limit_timeouts_total", labels, waits.timeouts


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


class HandlerMetrics:
    """What :class:`fastq.JobRegistry` counts in this process, in the default registry of prometheus_client.

    Args:
        prefix: of the names: ``<prefix>_processed_total``, ``<prefix>_duration_seconds``, ``<prefix>_failures_total``.
    """

    def __init__(self, prefix: str) -> None:
        from prometheus_client import Counter, Histogram

        self._processed = Counter(f"{prefix}_processed_total", "Jobs that were dispatched.", ["job_name", "status"])
        self._duration = Histogram(f"{prefix}_duration_seconds", "How long their handlers ran.", ["job_name"])
        self._failures = Counter(f"{prefix}_failures_total", "Runs that failed.", ["job_name", "error_type"])

    def note(self, name: str, seconds: float, *, ok: bool, error: str) -> None:
        """One run has ended; ``error``: the type of its exception, empty for none."""
        self._processed.labels(name, "success" if ok else "failure").inc()
        self._duration.labels(name).observe(seconds)
        if not ok:
            self._failures.labels(name, error or "JobResult").inc()


@functools.cache
def handler_metrics(prefix: str) -> HandlerMetrics | None:
    """The metrics of this prefix, the same for all who ask; None where prometheus_client is not installed."""
    try:
        return HandlerMetrics(prefix)
    except ImportError:
        return None


@functools.cache
def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fastq-jobs")
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"
