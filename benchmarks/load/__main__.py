"""``python -m benchmarks.load run|rivals|gate|flame|docs``: what ``make bench``, ``bench-rivals``, ``bench-gate`` call."""

from __future__ import annotations

import argparse
import asyncio
import sys

from benchmarks.load import goals, rows
from benchmarks.load.book import RESULTS, table
from benchmarks.load.candidates import NAMES


def main() -> int:
    """Exit status 1 when the gate finds a fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("verb", choices=["run", "rivals", "gate", "figures", "produce"], nargs="?", default="run")
    parser.add_argument("--jobs", type=int, default=200_000, help="jobs per drain of fastq and the floors")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; candidates take turns in each")
    parser.add_argument("--only", default=",".join(NAMES), help="rivals, by comma")
    parser.add_argument("--full", action="store_true", help="10 M pending jobs, 1 M jobs for memory: 5 minutes, 4 GiB")
    parser.add_argument("--quick", action="store_true", help="rivals: one round for all rows but the first")
    parser.add_argument("--save", default="", help="name of the JSON file in benchmarks/results/")
    options = parser.parse_args()
    if options.verb == "produce":
        asyncio.run(rows.produce())
    if options.verb == "gate":
        from benchmarks.gate import main as gate

        return gate()
    if options.verb == "figures":
        from benchmarks.load.figures import draw

        draw()
        return 0
    from benchmarks.load.driver import compare, measure

    if options.verb == "rivals":
        book = compare(
            options.only.split(","), options.repeats, options.jobs,
            full=options.full, quick=options.quick, save=options.save,
        )  # fmt: skip
    else:
        book = measure(options.repeats, options.jobs, full=options.full)
    if options.save:
        sys.stderr.write(f"bench: saved {book.save(options.save).relative_to(RESULTS.parent.parent)}\n")
    data = book.as_json()
    sys.stdout.write(f"{table(data)}\n\n{goals.table(data)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
