"""Where the worker's time goes at full load, as a picture and as a table of slices (samples: benchmarks/sampler.py).

Shares are taken from the sampled drain, microseconds from one that nobody watched.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.load.lab import Candidate, Drain, Redis, running, until
from benchmarks.tally import SAMPLED

SLICES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("the event loop runs the Task's steps", ("(entry)", "Runner.run (")),
    ("the handler", ("noop (", "benchmarks/tally.py")),
    ("read replies", (".data_received (",)),
    ("pack commands", ("pack (", "settle (", "reserve (", "Encoder.pack", "pack_command")),
    ("write to the socket", ("AsyncConnection._write (", "Wire.call (", "send_packed_command")),
    ("take jobs in: decode the envelope, the job's context", ("._admit (", "._take_in (", "decode_envelope (")),
    ("make the Task; start: plan, arguments, row, slot", ("WeakSet.add", "._spawn (", "._fill (", "Arguments.decode")),
    ("the Task's end; outcome, times, metrics", ("WeakSet.__init__.<locals>._remove", "._after_outcomes (")),
    ("confirm what was settled", ("Lane.confirm (", "._confirm (", "Batch.ids (")),
    (
        "the turn: collect, sleep",
        ("WorkerLoop.", "Lane.", "AsyncConnection.", "drain_with_", ".run (benchmarks/floor", ".run (bench/"),
    ),
    ("redis-py's client", ("redis/", "/asyncio/connection.py", "/asyncio/client.py", "_parsers")),
)
"""Name and what its frames are called; a sample belongs to the slice of its innermost frame that has one."""


class Profile(NamedTuple):
    """Samples of one process."""

    name: str
    us: float  # CPU per job of the worker when nobody watches
    jobs_per_second: float
    folded: Counter[tuple[str, ...]]

    def slices(self) -> list[tuple[str, float]]:
        """(slice, µs per job), largest first."""
        found: Counter[str] = Counter()
        for stack, count in self.folded.items():
            found[slice_of(stack)] += count
        total = found.total() or 1
        return [(name, count / total * self.us) for name, count in found.most_common()]


def slice_of(stack: Sequence[str]) -> str:
    """The slice of the innermost frame that belongs to one."""
    for frame in reversed(stack):
        for name, parts in SLICES:
            if any(part in frame for part in parts):
                return name
    return "everything else"


def profile(redis: Redis, candidate: Candidate, plain: Drain) -> Profile:
    """Sample a worker while it empties its queue; ``plain`` is a drain that was not sampled."""
    redis.clear()
    candidate.fill(redis.url, "noop", SAMPLED[1] + 20_000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples"
        with running(candidate.worker(redis.url, 1, "noop"), redis.url, BENCH_SAMPLES=str(path)):
            until(path.exists)
        return Profile(candidate.name, plain.worker_us, plain.jobs_per_second, fold(path.read_text()))


def fold(text: str) -> Counter[tuple[str, ...]]:
    """Stacks from the event loop on, the package's name left out."""
    stacks: Counter[tuple[str, ...]] = Counter()
    for line in text.splitlines():
        path, _, count = line.rpartition(" ")
        frames = path.split(";")
        start = next((i for i, f in enumerate(frames) if f.startswith("Runner.run (asyncio")), 0)
        stacks[tuple(frames[start:])] += int(count)
    return stacks
