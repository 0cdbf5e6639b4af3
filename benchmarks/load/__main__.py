"""`python -m benchmarks.load`: the load driver, its table and its gate; `make bench` runs it after the micro benchmarks."""

from __future__ import annotations

import argparse
import sys

from benchmarks.gate import faults
from benchmarks.load.driver import measure, report


def main() -> int:
    """Exit status 1 when the gate finds a fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000, help="jobs per drain (default 100,000)")
    options = parser.parse_args()
    figures = measure(options.jobs)
    sys.stdout.write(report(figures) + "\n")
    for fault in (found := faults(figures)):
        sys.stdout.write(f"FAULT: {fault}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
