"""The whole queue at work on real input, with a worker killed half-way: `make demo`.

One job per file of Python's standard library, real processes, a private Redis. It ends by comparing every result with a
direct computation and says what that proved; exit status 1 if a job was lost or a result differs.

    python examples/demo.py [--files N] [--workers N] [--no-kill]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

HERE = Path(__file__).resolve().parent
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    options = arguments()
    forget_settings()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace", line_buffering=True)  # type: ignore[union-attr]  # a terminal without UTF-8 shows ? for a bar
    for number in ENDS:
        signal.signal(number, leave)
    try:
        from census.director import DemoFailed, run

        from fastq import FastQError
    except ModuleNotFoundError as error:
        print(f"demo: {error}: `make demo` prepares everything that is needed", file=sys.stderr)
        return 2
    try:
        return run(files=options.files, workers=options.workers, kill=options.kill)
    except (DemoFailed, FastQError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read us has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="fastq at work: one job per file of Python's standard library.")
    parser.add_argument("--files", type=at_least_one, metavar="N", help="take N files, evenly chosen (default: all)")
    parser.add_argument("--workers", type=at_least_one, default=2, metavar="N", help="worker processes (default: 2)")
    parser.add_argument("--no-kill", dest="kill", action="store_false", help="let every worker live")
    return parser.parse_args()


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def forget_settings() -> None:
    """The demo shows what fastq does by itself: no variable and no fastq.toml of the user's has a part in it."""
    for name in list(os.environ):
        if name == "REDIS_URL" or (name.startswith("FASTQ_") and name != "FASTQ_REDIS_SERVER"):
            del os.environ[name]
    os.chdir(HERE)


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C and its kin unwind the stack once, so that all that was started is stopped; a second one changes nothing."""
    for each in ENDS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
