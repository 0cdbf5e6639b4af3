"""``python -m benchmarks.rivals NAME fill|one|paced|work ...``, in the rival's own environment; prints seconds taken."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator


def _paced(laps: int, rate: float) -> Iterator[float]:
    """The time of each call, at a steady pace."""
    start = time.monotonic()
    for n in range(laps):
        time.sleep(max(0.0, start + n / rate - time.monotonic()))
        yield time.monotonic()


def main(name: str, verb: str, *words: str) -> None:
    rival = importlib.import_module(f"benchmarks.rivals.{name}")
    start = time.perf_counter()
    if verb == "work":
        rival.work(int(words[0]), words[1])
    elif verb == "fill":
        rival.many(words[0], range(int(words[1])))
    elif verb == "one":
        rival.one(words[0], range(int(words[1])))
    else:
        rival.one("lap", _paced(int(words[0]), float(words[1])))
    print(f"{time.perf_counter() - start:.6f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
