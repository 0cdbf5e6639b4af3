"""The demo from its first to its last line: start everything, enqueue, watch, kill a worker, compare, judge."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence

from census import measure
from census.fleet import Fleet
from census.gauges import Scrape
from census.journal import Reader
from census.proof import SHOWN, Kill, Runs, Verdict, judge, read_runs
from census.tasks import app, measure_file
from census.view import View, seconds
from fastq import BrokerError, JobStatus, config
from fastq.broker.connection import SyncConnection
from fastq.broker.embedded import EmbeddedServer
from fastq.broker.inspector import QueueInfo, WorkerInfo

LOOK = 0.05  # seconds between two looks at the queue
START_PATIENCE = 30.0  # seconds for the workers to come up
STANDSTILL = 30.0  # seconds without progress after which the demo gives up
EMPTY_FOR = 1.0  # seconds that the queue must be empty before missing jobs count as lost
REPLACEMENT_PATIENCE = 15.0  # seconds for a killed worker's replacement
AT_ONCE = 200  # jobs asked for at the same time when results are read back
QUEUE = "default"


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


def run(*, files: int | None, workers: int, kill: bool) -> int:
    """Run it and return the exit status."""
    names = measure.files(files)
    if not names:
        raise DemoFailed(f"there is no Python file in {measure.LIBRARY}")
    with EmbeddedServer() as server:
        app.adopt(config.load(arguments={"url": server.url}).settings)
        folder = server.data_dir  # private, and gone when the server is: nothing else has to be cleaned up
        journal = folder / "journal"
        fleet = Fleet("census.tasks:app", workers=workers, url=server.url, journal=journal, log=folder / "fleet.log")
        with fleet:
            try:
                return Demo(names, workers, fleet, Reader(str(journal)), kill=kill).run()
            except BrokerError as error:
                raise DemoFailed(f"{error}\n{fleet.log_tail()}") from error


class Demo:
    """One run. The fleet is starting up."""

    def __init__(self, names: Sequence[str], workers: int, fleet: Fleet, journal: Reader, *, kill: bool) -> None:
        self._names = names
        self._workers = workers
        self._fleet = fleet
        self._journal = journal
        self._connection = SyncConnection(app.endpoint())
        self._scrape = Scrape(fleet.metrics_port)
        self._kill_at = (len(names) + 1) // 2 if kill else -1
        self._kill: Kill | None = None
        self._jobs: dict[str, str] = {}

    def run(self) -> int:
        print(f"fastq at work on Python's standard library: one job for each of {len(self._names)} files")
        self._wait_for_workers()
        print(f"{self._workers} workers, a scheduler and a monitor are up; some handlers will fail on purpose")
        started = time.monotonic()
        bulk = measure_file.enqueue_many_sync((name,) for name in self._names)
        self._jobs = dict(zip(bulk.ids, self._names, strict=True))
        print(f"{bulk.created} jobs enqueued in {seconds(time.monotonic() - started)}")
        self._watch()
        took = time.monotonic() - started
        if self._kill is not None:
            self._wait_for_replacement()
        statuses = asyncio.run(self._read_back())
        self._connection.close()
        app.close()
        stopped = self._fleet.stop()
        return self._conclude(statuses, took, stopped)

    # -- watching -----------------------------------------------------------------------------

    def _wait_for_workers(self) -> None:
        deadline = time.monotonic() + START_PATIENCE
        while len(self._workers_now()) < self._workers:
            self._check_fleet()
            if time.monotonic() > deadline:
                raise DemoFailed(f"the workers did not come up within {START_PATIENCE:g} s:\n{self._fleet.log_tail()}")
            time.sleep(LOOK)

    def _workers_now(self) -> list[WorkerInfo]:
        return self._connection.run(app.inspector.workers(QUEUE))

    def _check_fleet(self) -> None:
        status = self._fleet.exit_status
        if status is not None:
            raise DemoFailed(f"the supervisor ended with exit status {status}:\n{self._fleet.log_tail()}")

    def _watch(self) -> None:
        """Show the queue until nothing is left to do, or until nothing moves any more."""
        view, scraped_at = View(len(self._jobs)), 0.0
        for info in self._looks():
            if self._kill is None and 0 <= self._kill_at <= info.finished:
                self._kill_one(view)
            if time.monotonic() - scraped_at > 0.5:
                self._scrape.update()
                scraped_at = time.monotonic()
            if view.due():
                view.show(info, self._scrape)
        self._scrape.update()
        view.show(self._look(), self._scrape)

    def _looks(self) -> Iterator[QueueInfo]:
        moved_at, before = time.monotonic(), -1
        while True:
            self._check_fleet()
            info, now = self._look(), time.monotonic()
            over = info.finished + info.dead
            if over >= len(self._jobs):
                return
            if over != before:
                moved_at, before = now, over
            empty = not info.pending + info.scheduled + info.running
            if now - moved_at > (EMPTY_FOR if empty else STANDSTILL):
                return  # what is missing now is lost: the judgement will say so
            yield info
            time.sleep(LOOK)

    def _look(self) -> QueueInfo:
        return self._connection.run(app.inspector.queue(QUEUE)) or QueueInfo(name=QUEUE)

    def _kill_one(self, view: View) -> None:
        """SIGKILL the worker that is busiest by its journal: no handler, no `finally`, no good-bye."""
        victim = max(self._workers_now(), key=lambda worker: worker.running, default=None)
        if victim is None or not victim.running:
            return  # between two jobs: the next look will find one
        self._kill = Kill(victim.pid, time.monotonic())
        os.kill(victim.pid, signal.SIGKILL)
        view.note(f"worker {victim.pid} is killed with SIGKILL, with {victim.running} jobs in its hands")

    def _wait_for_replacement(self) -> None:
        """The queue may be empty before the new worker is there: that it comes is part of the proof."""
        assert self._kill is not None
        deadline = time.monotonic() + REPLACEMENT_PATIENCE
        while time.monotonic() < deadline:
            self._check_fleet()
            self._journal.read_on()
            if any(event.what == "up" and event.at > self._kill.at for event in self._journal.events):
                return
            time.sleep(LOOK)

    # -- results --------------------------------------------------------------------------------

    async def _read_back(self) -> list[JobStatus | None]:
        """The status of every job, through the API that any producer has."""
        ids, found = list(self._jobs), []
        for start in range(0, len(ids), AT_ONCE):
            chunk = ids[start : start + AT_ONCE]
            found += await asyncio.gather(*(app.get_status(job, queue=QUEUE) for job in chunk))
        await app.aclose()
        return found

    def _conclude(self, statuses: list[JobStatus | None], took: float, stopped: int) -> int:
        print("comparing the results with a direct computation …")
        direct = compute(self._names)
        self._journal.read_on()
        verdict = judge(self._jobs, statuses, direct)
        runs = read_runs(self._journal.events, self._kill)
        if stopped:
            verdict.faults.append(f"the supervisor ended with exit status {stopped}:\n{self._fleet.log_tail()}")
        if self._kill is not None and runs.replaced is None:
            verdict.faults.append(f"no worker took the killed one's place within {REPLACEMENT_PATIENCE:g} s")
        print()
        for fault in verdict.faults[:SHOWN]:
            print(f"FAULT  {fault}")
        if len(verdict.faults) > SHOWN:
            print(f"FAULT  … and {len(verdict.faults) - SHOWN} more")
        for line in self._summary(verdict, runs, took):
            print(line)
        return 0 if verdict.good else 1

    def _summary(self, verdict: Verdict, runs: Runs, took: float) -> Iterator[str]:
        dead = f", {verdict.dead} dead" if verdict.dead else ""
        rate = f"{verdict.done / took:.0f} jobs/s in {took:.1f} s by {self._workers} workers on {os.cpu_count()} cores"
        run = self._scrape.run
        yield f"{verdict.enqueued} enqueued, {verdict.done} done, {verdict.lost} lost{dead}"
        yield f"  results     {verdict.done - verdict.different} of {verdict.enqueued} equal to a direct computation"
        yield f"  retries     {verdict.retried}{', each of them planned' if verdict.good else ''}"
        yield f"  duplicates  {duplicates(runs)}"
        yield f"  recovery    {recovery(runs)}"
        yield f"  speed       {rate}; handlers p50 {seconds(run.quantile(0.5))}, p99 {seconds(run.quantile(0.99))}"


def duplicates(runs: Runs) -> str:
    """The runs that were started more than once, in words."""
    why = f" ({runs.cut} cut off, {runs.duplicates - runs.cut} ended unreported)" if runs.duplicates else ""
    return f"{runs.duplicates} runs started again because of the kill{why}, {runs.unexplained} for another reason"


def recovery(runs: Runs) -> str:
    """The times after the kill, in words."""
    parts = []
    if runs.first_again is not None and runs.all_again is not None:
        first, last = seconds(runs.first_again), seconds(runs.all_again)
        parts.append(f"the cut off jobs ran again {first if first == last else f'{first} to {last}'} after the kill")
    if runs.replaced is not None:
        parts.append(f"a new worker took its first job after {seconds(runs.replaced)}")
    return ", ".join(parts) or "no worker was killed"


# -- the direct computation -------------------------------------------------------------------------


def compute(names: Sequence[str]) -> dict[str, measure.Measures]:
    """Measure the files without any queue, on all cores."""
    ends = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # a child must not run our clean-up, and no Ctrl-C be lost
    with multiprocessing.get_context("fork").Pool(initializer=_be_a_helper, initargs=(ends,)) as pool:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return dict(zip(names, pool.map(measure.measure, names, chunksize=8), strict=True))


def _be_a_helper(ends: set[signal.Signals]) -> None:
    """Ctrl-C is the demo's to handle; what it does then is SIGTERM."""
    for number in ends:
        signal.signal(number, signal.SIG_IGN if number is signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
