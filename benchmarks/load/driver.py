"""One run: which rows, in which order, how often. Candidates of one row take turns, so that noise meets all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from benchmarks.load import rows
from benchmarks.load.book import Book
from benchmarks.load.candidates import FASTQ, FLOORS, NAMES, Rival, rival
from benchmarks.load.lab import Candidate, Redis, Stuck, drain, private_server
from benchmarks.rivals.environment import Missing
from fastq.errors import FastQError

__all__ = ["compare", "measure"]

SECONDS = 1.0
"""How long a rival's drain should take; its rate is learnt in a short one first."""

LEAST = 1_000
"""Jobs of a drain: the stopwatch counts in hundreds."""

FAST = 200_000
"""Jobs of the drains of fastq and of the floors: about two seconds."""


FEW = 6
"""Rivals that a quick run measures with two processes and with sync handlers: the fastest ones."""


def say(text: str) -> None:
    """Progress, on stderr."""
    sys.stderr.write(f"bench: {text}\n")
    sys.stderr.flush()


def attempt(book: Book, what: str, measured: Callable[[], None]) -> bool:
    """Measure; what fails is said and noted, and the run goes on."""
    try:
        measured()
    except (Stuck, OSError, FastQError, ValueError, KeyError, IndexError) as error:
        say(f"{what}: {error}")
        said = str(error).strip().splitlines()[0]
        book.notes[f"{what}, failed"] = said.partition(": /")[0][:200]  # whose paths are on this machine only
        return False
    return True


def measure(repeats: int = 3, jobs: int = FAST, *, full: bool = False) -> Book:
    """The floors and fastq: every row that needs no other library."""
    with private_server() as redis:
        book = Book(redis.name())
        _drains(book, redis, [], repeats, jobs)
        _latencies(book, redis, [], repeats, 0)
        _own(book, redis, repeats, jobs, full)
    return book


def compare(
    names: Sequence[str] = NAMES,
    repeats: int = 3,
    jobs: int = FAST,
    *,
    full: bool = False,
    quick: bool = False,
    save: str = "",
) -> Book:
    """The same with the rivals; ``save`` is written after each step, so that a run that is ended early keeps its figures.

    ``quick``: three rounds of the drains by one process, once for the other rows; sync handlers and a second process for the
    fastest rivals only: 12 minutes instead of 40.
    """
    with private_server() as redis:
        book = Book(redis.name())
        rivals = _installed(book, names)
        steps: list[Callable[[], object]] = [
            lambda: _drains(book, redis, rivals, repeats, jobs, quick=quick),
            lambda: _latencies(book, redis, rivals, repeats, FEW // 2 if quick else len(rivals)),
            lambda: _own(book, redis, 1 if quick else repeats, jobs, full),
        ]
        steps += [lambda other=other: _rest_of(book, redis, other, 1 if quick else repeats) for other in rivals]  # type: ignore[misc]
        for step in steps:
            step()
            if save:
                book.save(save)
    return book


def _installed(book: Book, names: Sequence[str]) -> list[Rival]:
    """Those that this machine can have; the book says why the others are missing."""
    rivals = []
    for name in names:
        try:
            found = rival(name)
        except Missing as why:
            say(f"{name}: {why}")
            book.notes[name] = f"not measured: {why}"
            continue
        book.notes[name] = f"{found.about.guarantee}; {found.about.settings}; {', '.join(found.about.packages)}"
        rivals.append(found)
    return rivals


def _drains(book: Book, redis: Redis, rivals: Sequence[Rival], repeats: int, jobs: int, *, quick: bool = False) -> None:
    floors = list(FLOORS.values())
    sizes = {FASTQ.name: jobs} | dict.fromkeys(FLOORS, jobs)
    for other in list(rivals):
        say(f"learning the rate of {other.candidate.name}")
        if not attempt(book, other.candidate.name, lambda other=other: _learn(redis, other, sizes)):  # type: ignore[misc]
            continue
    rivals = sorted(rivals, key=lambda other: -sizes.get(other.candidate.name, 0))
    able = [other for other in rivals if other.candidate.name in sizes]
    plan = list(_of_a_round(floors, able, FEW if quick else len(able)))
    for turn in range(repeats):
        say(f"drains, round {turn + 1} of {repeats}")
        for who, row, how in plan:
            size = max(sizes[who.name] // (4 if row == rows.SYNC else 1), LEAST)
            attempt(
                book, f"{who.name}, {row}",
                lambda who=who, row=row, how=how, size=size: rows.drained(book, redis, who, size, row, **how),  # type: ignore[misc]  # mypy cannot infer a lambda with defaults
            )  # fmt: skip


def _of_a_round(
    floors: Sequence[Candidate], rivals: Sequence[Rival], most: int
) -> Iterator[tuple[Candidate, str, dict[str, int | str]]]:
    """The drains of one round. What is compared comes one after the other: the machine is twice as fast in some minutes.

    Those of fastq and of the floors come twice, there and back: their ratios are near one, and noise is larger than that.
    """
    near: list[tuple[Candidate, str, dict[str, int | str]]] = [
        (FASTQ, rows.TWO, {"processes": 2}),
        (FASTQ, rows.KEPT, {"task": "noop_kept"}),
        (FASTQ, rows.DRAIN, {}),
        (FASTQ, rows.LIMITED, {"task": "noop_limited"}),
        *((who, rows.DRAIN, {}) for who in floors),
    ]
    yield from near
    yield from reversed(near)
    for who in (*floors, *(other.candidate for other in rivals[:most])):
        yield who, rows.TWO, {"processes": 2}
    for other in rivals:
        yield other.candidate, rows.DRAIN, {}
    yield FASTQ, rows.SYNC, {"task": "noop_sync"}
    for other in [other for other in rivals if other.about.handlers != "async"][:most]:
        yield other.candidate, rows.SYNC, {"task": "noop_sync" if other.about.handlers == "both" else "noop"}


def _learn(redis: Redis, other: Rival, sizes: dict[str, int]) -> None:
    rate = drain(redis, other.candidate, 1_500, seconds=30).jobs_per_second
    sizes[other.candidate.name] = int(min(max(rate * SECONDS, LEAST), FAST)) // 100 * 100


def _latencies(book: Book, redis: Redis, rivals: Sequence[Rival], repeats: int, most: int) -> None:
    """In rounds, too; those that are slowest to wake in the first one are not asked again beyond ``most``."""
    able = [other for other in rivals if other.candidate.name in book.rows.get(rows.DRAIN, {})]
    for turn in range(repeats):
        say(f"latency, round {turn + 1} of {repeats}")
        attempt(book, "idle latency", lambda: rows.idle_latency(book, redis, 400))
        for kind in ("pop", "wake"):
            attempt(book, f"latency, {kind}", lambda kind=kind: rows.floor_latency(book, redis, kind, 400))  # type: ignore[misc]  # as above
        for other in able:
            name = other.candidate.name
            attempt(book, f"{name}, latency", lambda other=other: rows.rival_latency(book, redis, other, 300))  # type: ignore[misc]  # as above
        measured = book.rows.get(rows.P50, {})
        able = sorted(
            (o for o in able if o.candidate.name in measured), key=lambda o: book.median(rows.P50, o.candidate.name)
        )
        able = able[:most]


def _own(book: Book, redis: Redis, repeats: int, jobs: int, full: bool) -> None:
    def row(what: str, measured: Callable[[], None]) -> None:
        say(what)
        attempt(book, what, measured)

    piles = (10_000_000, 1_000_000, 10_000, 100_000) if full else (1_000_000, 100_000, 10_000, 100_000)
    row("Redis alone", lambda: rows.raw_rates(book, redis))
    row("enqueue", lambda: rows.enqueue_rates(book, redis, jobs // 4))
    for _ in range(max(repeats, 3)):  # a quick run's, too: one stall of the machine is a p99
        row("half load", lambda: rows.half_load(book, redis, jobs // 2, 4.0))
    for _ in range(repeats):
        row("together", lambda: rows.together(book, redis, FASTQ, rows.own_producer(), 10.0 if full else 4.0))
        row("bytes", lambda: rows.bytes_per_job(book, redis, FASTQ, 50_000))
        row("promotion", lambda: rows.promotion(book, redis, jobs // 2))
        row("starts", lambda: rows.starts(book, redis))
        row("memory", lambda: rows.memory(book, redis, 1_000_000 if full else jobs * 2))
    row("backlog", lambda: rows.backlog(book, redis, *piles, jobs))


def _rest_of(book: Book, redis: Redis, other: Rival, repeats: int) -> None:
    """Enqueue, together and memory of a rival that drains."""
    name = other.candidate.name
    if name not in book.rows.get(rows.DRAIN, {}):
        return
    rate = book.median(rows.DRAIN, name)
    some = int(min(max(rate, 1_000), 20_000))
    for _ in range(repeats):
        say(f"{name}: enqueue, together, memory")
        attempt(
            book, name, lambda: book.add(rows.MANY, name, some / other.send(redis.url, "fill", "noop", some), "jobs/s")
        )
        attempt(
            book, name, lambda: book.add(rows.ONE, name, 2_000 / other.send(redis.url, "one", "noop", 2_000), "jobs/s")
        )
        attempt(
            book, name,
            lambda: rows.together(book, redis, other.candidate, other.command("fill", "noop", 10_000_000), 3.0),
        )  # fmt: skip
        attempt(book, name, lambda: rows.bytes_per_job(book, redis, other.candidate, 5_000))
