"""What one acquire costs: from tokens at hand, on the memory engine, and as one round trip of acquire.lua.

    pytest benchmarks/micro/bench_tokens.py --benchmark-enable

The times are of this machine; the ratio is what must hold everywhere.
"""

from __future__ import annotations

import itertools
import timeit
from collections import deque
from collections.abc import Callable, Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastq.broker import commands
from fastq.broker.command import Command
from fastq.broker.connection import SyncConnection
from fastq.broker.embedded import EmbeddedServer
from fastq.broker.keys import LimitKeys
from fastq.broker.memory import MemoryEngine
from fastq.broker.url import parse_url
from fastq.limits import Rule, SlidingWindow, Tokens, parse_rate

CALLS = 1_000
MOST_NS = 200.0  # of one local grant, from Python; measured: 28
LEAST_RATIO = 5.0  # measured: 15
RULES = {
    "bucket": Rule(parse_rate("1000000/s")),
    "window": Rule(SlidingWindow(1_000_000_000, 60)),
    "slots": Rule(None, 1_000_000),
}


class PythonTokens:
    """The same in Python, without the checks."""

    def __init__(self) -> None:
        self.blocks: deque[list[float]] = deque()
        self.total = 0.0

    def put(self, n: int, until: float) -> None:
        self.blocks.append([until, n])
        self.total += n

    def take(self, cost: int, now: float) -> bool:
        blocks = self.blocks
        while blocks and blocks[0][0] < now:
            self.total -= blocks.popleft()[1]
        if cost > self.total:
            return False
        self.total -= cost
        while cost:
            block = blocks[0]
            used = min(cost, block[1])
            block[1] -= used
            cost -= int(used)
            if not block[1]:
                blocks.popleft()
        return True


def takes(tokens: Tokens | PythonTokens) -> Callable[[], None]:
    """`CALLS` units, each taken alone."""
    take, put, rounds = tokens.take, tokens.put, range(CALLS)

    def run() -> None:
        put(CALLS, 2.0)
        for _ in rounds:
            take(1, 1.0)

    return run


@pytest.mark.parametrize("kind", [Tokens, PythonTokens])
def test_take(benchmark: BenchmarkFixture, kind: type[Tokens | PythonTokens]) -> None:
    benchmark.extra_info["calls"] = CALLS
    benchmark(takes(kind()))


def test_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    """The best of many short rounds, the two taken in turn: a busy machine slows both."""
    compiled, python = takes(Tokens()), takes(PythonTokens())
    rounds = [(timeit.timeit(compiled, number=1), timeit.timeit(python, number=1)) for _ in range(200)]
    fast, slow = (min(times) / CALLS * 1e9 for times in zip(*rounds, strict=True))
    with capsys.disabled():
        print(f"\n  take {fast:6.0f} ns compiled {slow:6.0f} ns in Python: {slow / fast:.1f} times", end="")
    assert fast <= MOST_NS
    assert slow / fast >= LEAST_RATIO


def requests(name: str) -> Iterator[Command[object]]:
    """The same request again and again; for slots, one that takes and one that frees."""
    keys, terms = LimitKeys("fastq", name), RULES[name].terms(0)
    if name == "slots":
        take = commands.acquire(keys, terms, most=1_000_000, holders=[("p:1", 1)])
        return itertools.cycle([take, commands.give_back(keys, terms, "p:1", holders=["p:1"])])
    return itertools.repeat(commands.acquire(keys, terms, need=1, want=1))


@pytest.mark.parametrize("name", RULES)
def test_memory_engine(benchmark: BenchmarkFixture, name: str) -> None:
    clock = itertools.count(1_900_000_000_000_000, 100)
    engine, sequence = MemoryEngine(lambda: next(clock)), requests(name)
    benchmark.extra_info["calls"] = CALLS
    benchmark(lambda: [engine.call(next(sequence)) for _ in range(CALLS)])


@pytest.mark.parametrize("name", RULES)
def test_round_trip(benchmark: BenchmarkFixture, name: str) -> None:
    """On a server of its own, next to this process."""
    with EmbeddedServer() as server:
        conn, sequence = SyncConnection(parse_url(server.url)), requests(name)
        benchmark.extra_info["calls"] = CALLS
        benchmark(lambda: [conn.call(next(sequence)) for _ in range(CALLS)])
        conn.close()
