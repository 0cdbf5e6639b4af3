"""`python -m benchmarks.limits`: what limits cost and hold, as a table and as JSON; `make bench-limits` runs it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import msgspec

from benchmarks.limits import jobs
from benchmarks.limits.driver import faults, measure, report


def main() -> int:
    """Exit status 1 when something is worse than it may be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("--keys", type=int, default=100_000, help="distinct keys (default 100,000)")
    parser.add_argument("--scale", type=float, default=1.0, help="length of what takes seconds (default 1)")
    parser.add_argument("--json", type=Path, default=Path(".benchmarks/limits.json"), help="where the figures go, too")
    options = parser.parse_args()
    figures = measure(options.keys, options.scale)
    behind = jobs.measure(seconds=5 * options.scale)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    both = {"limiters": msgspec.to_builtins(figures), "jobs": msgspec.to_builtins(behind)}
    options.json.write_text(json.dumps(both, indent=2) + "\n")
    sys.stdout.write(f"{report(figures)}\n\n{jobs.report(behind)}\n")
    for fault in (found := faults(figures) + jobs.faults(behind.uses)):
        sys.stdout.write(f"FAULT: {fault}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
