"""Counting in slots, summing over the board, and what a scrape shows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from types import BuiltinMethodType
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from fastq import metrics
from fastq.board import Board, Slot, SlotState
from fastq.errors import BrokerUnavailable
from fastq.exposition import Exposition, QueueGauge
from fastq.metrics import (
    COUNTERS,
    METRICS,
    NOT_RUN,
    OTHER,
    RUN_BUCKETS,
    STATUSES,
    WAIT_BUCKETS,
    CounterName,
    Histogram,
    SeriesTable,
    WorkerMetrics,
    aggregate,
    change,
)

pytestmark = pytest.mark.versions

SUCCESS, RETRY, FAILED, CANCELLED, SNOOZED, RELEASED, LOST = range(len(STATUSES))


def worker(
    slot: Slot, queues: Iterable[str] = ("mail", "bulk"), tasks: Iterable[str] = ("send", "resize")
) -> WorkerMetrics:
    return WorkerMetrics(slot, queues=queues, tasks=tasks)


@pytest.fixture
def board() -> Board:
    return Board(3, rows=4)


def families(text: bytes) -> dict[str, Family]:
    return {family.name: family for family in text_string_to_metric_families(text.decode())}


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families(text).values()
        for sample in family.samples
    }


def value(text: bytes, name: str, **labels: str) -> float:
    return samples(text)[name, tuple(sorted(labels.items()))]


# -- the table -----------------------------------------------------------------------------------------


def test_the_table_follows_the_rules_of_names() -> None:
    """Base units, `_total` on counters and on nothing else, a prefix, labels from a closed list, a sentence each."""
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert metric.name.startswith(("fastq_", "background_job_rate_limit_"))
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert not metric.name.endswith(("_ms", "_milliseconds", "_count", "_sum", "_bucket"))
        assert set(metric.labels) <= {
            "queue",
            "task",
            "status",
            "state",
            "worker",
            "version",
            "python",
            "limiter",
            "limiter_id",
            "job_type",
        }
        assert metric.help.endswith(".")


def test_counters_are_named_once() -> None:
    assert tuple(COUNTERS) == get_args(CounterName)
    assert set(COUNTERS.values()) <= set(METRICS)


def test_importing_metrics_brings_no_prometheus_client() -> None:
    """F211: a worker counts without the library; only a scrape needs it."""
    code = "import sys, fastq.metrics; print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# -- counting ------------------------------------------------------------------------------------------


def test_one_job_is_counted_in_its_series(board: Board) -> None:
    counting = worker(board[0])
    counting.observe(counting.series("mail", "send"), SUCCESS, 0.001, 0.3)
    counting.observe(counting.series("mail", "send"), FAILED, 0.4, 2.0)
    sums = {(t.queue, t.task): t for t in aggregate(board).tasks}
    sends = sums["mail", "send"]
    assert {status: n for status, n in sends.finished.items() if n} == {"success": 1, "failed": 1}
    assert sends.run.count == sends.wait.count == 2
    assert sends.run.total == pytest.approx(2.3)
    assert sends.wait.total == pytest.approx(0.401)
    assert sums[OTHER, OTHER].run.count == 0


def test_a_run_that_never_was_counts_by_status_only(board: Board) -> None:
    counting = worker(board[0])
    counting.observe(counting.series("mail", "send"), RELEASED, NOT_RUN, NOT_RUN)
    sends = next(t for t in aggregate(board).tasks if t.task == "send")
    assert (sends.finished["released"], sends.run.count, sends.wait.count) == (1, 0, 0)


def test_the_methods_of_the_hot_path_are_the_compiled_ones(board: Board) -> None:
    counting = worker(board[0])
    for method in (counting.observe, counting.start, counting.finish):
        assert isinstance(method, BuiltinMethodType), "a wrapper in between would cost more than the count"


def test_start_and_finish_name_the_running_jobs(board: Board) -> None:
    counting = worker(board[0])
    counting.start(2, "job-7")
    assert board[0].running_ids() == ["job-7"]
    counting.finish(2)
    assert board[0].running_ids() == []


@pytest.mark.parametrize("name", list(COUNTERS))
def test_every_counter_has_a_cell_of_its_own(board: Board, name: CounterName) -> None:
    WorkerMetrics(board[0]).count(name)
    WorkerMetrics(board[1]).count(name, 4)
    counters = aggregate(board).counters
    assert {counter: n for counter, n in counters.items() if n} == {name: 5}


def test_an_unknown_counter_is_an_error(board: Board) -> None:
    with pytest.raises(KeyError):
        worker(board[0]).count("rond_trips")  # type: ignore[arg-type]


def test_a_board_without_room_is_an_error() -> None:
    with pytest.raises(ValueError, match="90 cells hold no series: at least 99"):
        worker(Board(1, cells=90)[0])


# -- labels --------------------------------------------------------------------------------------------


def test_names_nobody_registered_are_other(board: Board) -> None:
    """F-A15."""
    counting = worker(board[0])
    for queue, task in (("mail", "nope"), ("nope", "send"), ("nope", "nope")):
        counting.observe(counting.series(queue, task), SUCCESS, 0.0, 0.0)
    found = {(t.queue, t.task) for t in aggregate(board).tasks}
    assert found == {(OTHER, OTHER), ("mail", OTHER), (OTHER, "send")}
    assert aggregate(board).counters["labels_dropped"] == 3


def test_20k_unknown_names_make_no_series(board: Board) -> None:
    """A-15: 20,000 unknown task names and 20,000 queue names leave the number of series and the memory unchanged."""
    counting = worker(board[0])
    counting.series("mail", "nope"), counting.series("nope", "send")
    before = len(aggregate(board).tasks), len(Exposition(board).render())
    for i in range(20_000):
        counting.series("mail", f"task-{i}")
        counting.series(f"queue-{i}", "send")
    assert len(aggregate(board).tasks) == before[0] == 3
    assert len(Exposition(board).render()) < before[1] + 20  # digits of labels_dropped
    assert aggregate(board).counters["labels_dropped"] == 40_002


def test_registered_names_beyond_the_cap_are_other(board: Board) -> None:
    """F-A15: at most 1,000 series."""
    tasks = [f"task-{i}" for i in range(1_200)]
    counting = worker(board[0], tasks=tasks)
    bases = [counting.series("mail", task) for task in tasks]
    assert len(aggregate(board).tasks) == metrics.SERIES_LIMIT
    assert len(set(bases)) == metrics.SERIES_LIMIT  # 999 of their own and `other`
    counting.observe(bases[-1], SUCCESS, 0.0, 0.0)
    assert next(t for t in aggregate(board).tasks if t.queue == OTHER).finished["success"] == 1
    assert aggregate(board).counters["labels_dropped"] == 201


def test_the_full_board_has_cells_for_every_series() -> None:
    tasks = [str(i) for i in range(metrics.SERIES_LIMIT)]
    table = SeriesTable(Board(1, rows=1)[0], queues=["mail"], tasks=tasks)
    for task in tasks:
        table.series("mail", task)
    assert len(table) == metrics.SERIES_LIMIT


def test_names_that_do_not_fit_into_their_table_are_other(board: Board) -> None:
    size = len(board[0].names)
    tasks = ["x" * 60_000 + str(i) for i in range(size // 60_000 + 1)]
    counting = worker(board[0], tasks=tasks)
    bases = [counting.series("mail", task) for task in tasks]
    assert bases[-1] == counting.series(OTHER, OTHER)
    assert [t.task for t in aggregate(board).tasks if t.queue == "mail"] == tasks[:-1]


def test_a_look_up_is_remembered(board: Board) -> None:
    table = SeriesTable(board[0], queues=["mail"], tasks=["send"])
    assert table.series("mail", "send") == table.series("mail", "send") != table.series(OTHER, OTHER)
    assert (len(table), table.dropped) == (2, 0)


# -- slots used again ------------------------------------------------------------------------------------


def test_the_next_process_in_a_slot_goes_on_counting(board: Board) -> None:
    first = worker(board[0])
    first.observe(first.series("mail", "send"), SUCCESS, 0.0, 0.1)
    first.count("round_trips", 7)
    second = worker(board[0], tasks=["new", "send"])  # a reload may have changed the registry
    second.observe(second.series("mail", "new"), SUCCESS, 0.0, 0.1)
    second.observe(second.series("mail", "send"), SUCCESS, 0.0, 0.1)
    second.count("round_trips")
    counts = {t.task: t.finished["success"] for t in aggregate(board).tasks}
    assert counts == {"send": 2, "new": 1, OTHER: 0}
    assert aggregate(board).counters["round_trips"] == 8


def test_sums_are_over_slots_and_by_name(board: Board) -> None:
    a, b = worker(board[0]), worker(board[1])
    b.series("bulk", "resize")  # so that the same name has other cells in the second slot
    for counting, n in ((a, 2), (b, 3)):
        for _ in range(n):
            counting.observe(counting.series("mail", "send"), SUCCESS, 0.0, 0.1)
    assert next(t for t in aggregate(board).tasks if t.task == "send").finished["success"] == 5


def test_another_layout_is_skipped_by_readers_and_reset_by_writers(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGHUP after an upgrade: the new worker's cells mean something else than the old monitor thinks."""
    old = worker(board[0])
    old.observe(old.series("mail", "send"), SUCCESS, 0.0, 0.1)
    with monkeypatch.context() as newer:
        newer.setattr(metrics, "_LAYOUT", 12345)
        assert aggregate(board).tasks == ()
        new = worker(board[0])
        new.observe(new.series("mail", "send"), FAILED, 0.0, 0.1)
        assert [t.finished["success"] for t in aggregate(board).tasks] == [0, 0]
        assert sum(t.finished["failed"] for t in aggregate(board).tasks) == 1
    assert aggregate(board).tasks == (), "and the old monitor shows nothing rather than nonsense"


def test_a_fork_counts_where_the_parent_reads(board: Board) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            child = worker(board[1])
            child.observe(child.series("mail", "send"), LOST, 0.0, 0.1)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert next(t for t in aggregate(board).tasks if t.task == "send").finished["lost"] == 1


def test_reading_an_unused_board_costs_no_memory() -> None:
    """Shared pages are allocated by reading, too: only the first page of each name table may be touched."""
    boards = Board(50)
    before = shared_memory()
    aggregate(boards)
    assert shared_memory() - before <= 50 * 3 * 4096


def shared_memory() -> int:
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssShmem"))
    except FileNotFoundError:
        pytest.skip("needs /proc")


@given(st.binary(max_size=300))
def test_a_damaged_name_table_does_not_stop_the_monitor(junk: bytes) -> None:
    slot = Board(1, rows=1)[0]
    worker(slot)
    slot.names[8 : 8 + len(junk)] = junk
    slot.names[:4] = min(len(junk), 200).to_bytes(4, "little")
    aggregate([slot])


# -- snapshots and rates ---------------------------------------------------------------------------------


def test_rates_are_the_difference_of_two_snapshots(board: Board) -> None:
    counting = worker(board[0])
    send, resize = counting.series("mail", "send"), counting.series("bulk", "resize")
    counting.observe(send, SUCCESS, 0.1, 5.0)
    before = aggregate(board, now=100.0)
    for _ in range(30):
        counting.observe(send, SUCCESS, 0.1, 0.2)
    for _ in range(10):
        counting.observe(resize, RETRY, 0.1, 0.2)
    counting.count("redis_errors", 4)
    moved = change(before, aggregate(board, now=102.0))
    assert moved.seconds == 2.0
    assert moved.per_second() == 20.0
    assert moved.per_second("success") == 15.0
    assert moved.per_second(queue="bulk") == 5.0
    assert moved.per_second("retry", task="send") == 0.0
    assert moved.counters["redis_errors"] == 4
    assert next(t for t in moved.tasks if t.task == "send").run.mean == pytest.approx(0.2)


def test_a_new_task_counts_from_zero_and_a_restart_never_below_it(board: Board) -> None:
    counting = worker(board[0])
    before = aggregate(Board(1, rows=1), now=0.0)
    counting.observe(counting.series("mail", "send"), SUCCESS, 0.1, 0.2)
    after = aggregate(board, now=1.0)
    assert change(before, after).per_second() == 1.0
    restarted = change(after, aggregate(Board(1, rows=1), now=2.0))
    assert restarted.per_second() == 0.0
    assert min(restarted.counters.values()) == 0


def test_no_time_between_snapshots_is_no_rate(board: Board) -> None:
    snapshot = aggregate(board)
    assert change(snapshot, snapshot).per_second() == 0.0


def test_a_snapshot_is_plain_data(board: Board) -> None:
    counting = worker(board[0])
    counting.observe(counting.series("mail", "send"), SUCCESS, 0.1, 0.2)
    board[0].role = "worker"
    board[0].state = SlotState.RUNNING
    snapshot = aggregate(board)
    assert msgspec.json.decode(msgspec.json.encode(snapshot), type=metrics.Snapshot) == snapshot


def test_quantiles_are_linear_within_a_bucket() -> None:
    histogram = Histogram((1.0, 2.0, 4.0), (0, 10, 10, 0), 40.0)
    assert histogram.quantile(0.5) == 2.0
    assert histogram.quantile(0.25) == 1.5
    assert histogram.quantile(0.75) == 3.0
    assert histogram.quantile(1.0) == 4.0
    assert histogram.mean == 2.0


def test_a_quantile_above_all_bounds_is_the_last_one_and_of_nothing_is_zero() -> None:
    assert Histogram((1.0, 2.0), (0, 0, 5), 50.0).quantile(0.5) == 2.0
    assert Histogram((1.0, 2.0), (0, 0, 0), 0.0).quantile(0.5) == 0.0
    assert Histogram((1.0, 2.0), (0, 0, 0), 0.0).mean == 0.0


@given(st.lists(st.floats(0.0, 1_000.0), min_size=1, max_size=50), st.floats(0.0, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(times: list[float], q: float) -> None:
    slot = Board(1, rows=1)[0]
    counting = worker(slot)
    for seconds in times:
        counting.observe(counting.series("mail", "send"), SUCCESS, seconds, seconds)
    run = next(t for t in aggregate([slot]).tasks if t.task == "send").run
    true = sorted(times)[max(-int(-q * len(times) // 1), 1) - 1]
    above = next(bound for bound in RUN_BUCKETS if true <= bound)
    below = max((bound for bound in RUN_BUCKETS if bound < true), default=0.0)
    assert below <= run.quantile(q) <= above


# -- exposition ------------------------------------------------------------------------------------------


def full_board() -> Board:
    board = Board(3, rows=4)
    counting = worker(board[0])
    counting.observe(counting.series("mail", "send"), SUCCESS, 0.001, 0.3)
    counting.observe(counting.series("mail", "send"), SUCCESS, 3.0, 0.0001)
    counting.limit_count("stripe", "granted", 5)
    counting.limit_wait("stripe", "send", 0.02)
    for slot, state in zip(board, (SlotState.RUNNING, SlotState.DRAINING, SlotState.RUNNING), strict=True):
        slot.role, slot.state, slot.concurrency, slot.busy, slot.rss = "worker", state, 10, 4, 5_000_000
    board[2].role = "scheduler"
    return board


MAIL = QueueGauge("mail", pending=7, scheduled=2, parked=3, running=4, dead=1, oldest_age=12.5, paused=True)


def test_a_scrape_shows_every_metric_of_the_table_and_no_other() -> None:
    text = Exposition(full_board(), lambda: [MAIL]).render()
    shown = {name if family.type != "counter" else name + "_total": family for name, family in families(text).items()}
    assert list(shown) == [metric.name for metric in METRICS]
    for metric in METRICS:
        assert (shown[metric.name].type, shown[metric.name].documentation) == (metric.kind, metric.help)
        for sample in shown[metric.name].samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)


def test_a_scrape_has_the_numbers() -> None:
    text = Exposition(full_board(), lambda: [MAIL]).render()
    job = {"queue": "mail", "task": "send"}
    assert value(text, "fastq_jobs_finished_total", status="success", **job) == 2
    assert value(text, "fastq_jobs_finished_total", status="failed", **job) == 0
    assert value(text, "fastq_job_duration_seconds_sum", **job) == pytest.approx(0.3001)
    assert value(text, "fastq_job_duration_seconds_count", **job) == 2
    assert value(text, "fastq_workers", state="running") == 1
    assert value(text, "fastq_workers", state="draining") == 1
    assert value(text, "fastq_worker_slots", state="busy") == 8
    assert value(text, "fastq_worker_slots", state="free") == 6, "a draining worker takes nothing"
    assert value(text, "fastq_worker_resident_bytes", worker="1") == 5_000_000
    assert value(text, "fastq_queue_depth", queue="mail", state="pending") == 7
    assert value(text, "fastq_queue_depth", queue="mail", state="parked") == 3
    assert value(text, "fastq_queue_oldest_age_seconds", queue="mail") == 12.5
    assert value(text, "fastq_queue_paused", queue="mail") == 1
    assert value(text, "fastq_dead_letters", queue="mail") == 1
    assert value(text, "fastq_redis_up") == 1


def test_buckets_are_cumulative_in_a_scrape() -> None:
    text = Exposition(full_board()).render()
    job = {"queue": "mail", "task": "send"}
    assert value(text, "fastq_job_wait_seconds_bucket", le="0.002", **job) == 1
    assert value(text, "fastq_job_wait_seconds_bucket", le="1.0", **job) == 1
    assert value(text, "fastq_job_wait_seconds_bucket", le="5.0", **job) == 2
    assert value(text, "fastq_job_wait_seconds_bucket", le="+Inf", **job) == 2


def test_an_idle_host_shows_its_counters_at_zero(board: Board) -> None:
    """A rate over a counter that appears with its first error would miss that error."""
    text = Exposition(board).render()
    for metric in COUNTERS.values():
        assert value(text, metric.name) == 0
    assert value(text, "fastq_workers", state="running") == 0
    assert ("fastq_redis_up", ()) not in samples(text)


@pytest.mark.parametrize("error", [BrokerUnavailable("no"), ConnectionResetError()])
def test_while_redis_is_away_the_rest_is_still_shown(error: Exception) -> None:
    """F-17."""

    def fail() -> list[QueueGauge]:
        raise error

    text = Exposition(full_board(), fail).render()
    assert value(text, "fastq_redis_up") == 0
    assert not [name for name, _ in samples(text) if name.startswith("fastq_queue")]
    assert value(text, "fastq_jobs_finished_total", queue="mail", task="send", status="success") == 2


def test_a_programming_error_in_the_gauges_is_not_hidden(board: Board) -> None:
    def fail() -> list[QueueGauge]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Exposition(board, fail).render()


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a\\b", "é{}", "\ud800"])
def test_names_cannot_break_out_of_their_label(board: Board, name: str) -> None:
    """F-A16: whatever a registry holds, a scrape stays parseable and no line is forged."""
    counting = worker(board[0], queues=[name], tasks=["send"])
    counting.observe(counting.series(name, "send"), SUCCESS, 0.0, 0.0)
    text = Exposition(board, lambda: [QueueGauge(name.encode(errors="replace").decode(), 1, 1, 1, 1, 1, 1.0)]).render()
    queues = {labels.get("queue") for key, pairs in samples(text) for labels in [dict(pairs)]}
    assert queues == {None, OTHER, name.encode(errors="replace").decode()}


def test_a_blocked_loop_shows_in_the_seconds(board: Board) -> None:
    board[0].role, board[0].state, board[0].ticked_at = "worker", SlotState.RUNNING, 90.0
    board[1].role, board[1].state, board[1].ticked_at = "worker", SlotState.RUNNING, 99.95
    board[2].role, board[2].state = "monitor", SlotState.RUNNING
    assert [p.blocked for p in aggregate(board, now=100.0).processes] == [pytest.approx(9.9), 0.0, 0.0]


# -- limiters --------------------------------------------------------------------------------------------


def test_what_limiters_count_is_summed_over_the_workers(board: Board) -> None:
    """F045-F047: by limiter and job type, in our names and in the document's; waits above 0.1 s have the latter."""
    for slot in board:
        counting = worker(slot)
        counting.limit_wait("stripe", "send", 0.02)
        counting.limit_wait("stripe", "send", 0.1)
        counting.limit_wait("stripe", "send", 2.0)
        counting.limit_wait("github", "", 0.3)
        counting.limit_timeout("stripe", "send")
        counting.limit_count("stripe", "granted", 7)
        counting.limit_count("stripe", "expired")
    text = Exposition(board).render()
    ours, theirs = {"limiter": "stripe", "job_type": "send"}, {"limiter_id": "stripe", "job_type": "send"}
    assert value(text, "fastq_limit_wait_seconds_count", **ours) == 9
    assert value(text, "fastq_limit_wait_seconds_sum", **ours) == pytest.approx(6.36)
    assert value(text, "fastq_limit_wait_seconds_bucket", le="0.05", **ours) == 3
    assert value(text, "fastq_limit_timeouts_total", **ours) == 3
    assert value(text, "background_job_rate_limit_waits_total", **theirs) == 3
    assert value(text, "background_job_rate_limit_wait_seconds_sum", **theirs) == pytest.approx(6.0)
    assert value(text, "background_job_rate_limit_wait_seconds_bucket", le="1.0", **theirs) == 0
    assert value(text, "background_job_rate_limit_wait_seconds_bucket", le="2.5", **theirs) == 3
    assert value(text, "background_job_rate_limit_timeouts_total", **theirs) == 3
    assert value(text, "fastq_limit_wait_seconds_count", limiter="github", job_type="") == 3
    assert value(text, "fastq_limit_units_granted_total", limiter="stripe") == 21
    assert value(text, "fastq_limit_units_expired_total", limiter="stripe") == 3
    assert value(text, "fastq_limit_denials_total", limiter="stripe") == 0
    snapshot = aggregate(board)
    assert [t.queue for t in snapshot.tasks] == ["other"], "a limiter is no queue"
    assert snapshot.limiters["stripe"]["granted"] == 21


def test_series_of_limiters_are_bounded(board: Board) -> None:
    """F-A15: limiters named after users, job types made up per call."""
    counting = worker(board[0])
    for n in range(1_000):
        counting.limit_count(f"user-{n}", "granted")
        counting.limit_wait("api", f"type-{n}", 0.2)
    snapshot = aggregate(board)
    assert len(snapshot.limiters) + len(snapshot.waits) <= metrics.LIMIT_SERIES + 3
    assert sum(counts["granted"] for counts in snapshot.limiters.values()) == 1_000
    assert sum(waits.all.count for waits in snapshot.waits) == 1_000
    assert {waits.limiter for waits in snapshot.waits} == {"api", "other"}
    counting.observe(counting.series("mail", "send"), SUCCESS, 0.001, 0.3)
    assert [t.queue for t in aggregate(board).tasks] == ["mail", "other"]
    assert sum(aggregate(board).tasks[1].finished.values()) == 0


def test_names_of_an_earlier_worker_keep_their_cells(board: Board) -> None:
    worker(board[0]).limit_wait("api", "send", 0.2)
    again = worker(board[0])
    again.limit_wait("api", "send", 0.2)
    again.limit_count("api", "granted")
    (waits,) = aggregate(board).waits
    assert (waits.limiter, waits.job_type, waits.all.count) == ("api", "send", 2)


def test_render_of_a_full_table_is_bounded() -> None:
    """I12: the largest scrape that one host can show."""
    slot = Board(1, rows=1)[0]
    tasks = [f"task-{i}" for i in range(1_000)]
    counting = worker(slot, tasks=tasks)
    for task in tasks:
        counting.series("mail", task)
    lines = Exposition([slot]).render().count(b"\n")
    per_series = len(STATUSES) + len(RUN_BUCKETS) + len(WAIT_BUCKETS) + 2 * 3
    assert lines < metrics.SERIES_LIMIT * per_series + 200
