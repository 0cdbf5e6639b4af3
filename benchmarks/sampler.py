"""Where a process spends its CPU, seen from inside: a stack at each tick of CPU time (``ITIMER_PROF``).

py-spy and perf were tried first. py-spy samples wall time: on a machine with other work it counts the moments in which
Redis runs in the worker's place as the worker's ``write``, and it stops the process for each native stack. perf sees no
Python function before 3.12. The timer counts only what this process burns, in the kernel too, and costs next to nothing.

A signal that comes in while C code runs is served when that returns, in the Python frame that called it; one that comes
while the event loop itself runs (no Python frame) is served on the first line of the next coroutine: ``(entry)``.
Standard library only; ``BENCH_SAMPLES`` names the file,.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from types import FrameType

PERIOD = 0.001
"""Seconds of CPU; most kernels round it up to their tick, 4 ms."""

_stacks: Counter[tuple[str, ...]] = Counter()


def _sample(_signal: int, frame: FrameType | None) -> None:
    stack = []
    leaf = frame
    while frame is not None:
        code = frame.f_code
        path = code.co_filename.rpartition("/site-packages/")[2] or code.co_filename
        stack.append(f"{code.co_qualname} ({'/'.join(path.split('/')[-3:])}:{frame.f_lineno})")
        frame = frame.f_back
    if leaf is not None and leaf.f_lineno == leaf.f_code.co_firstlineno and leaf.f_code.co_flags & 0x80:
        stack.insert(0, "(entry)")  # 0x80: a coroutine
    _stacks[tuple(reversed(stack))] += 1


def start() -> None:
    """Begin."""
    signal.signal(signal.SIGPROF, _sample)
    signal.setitimer(signal.ITIMER_PROF, PERIOD, PERIOD)


def write() -> None:
    """What was seen so far, in the folded format of flame graphs; the file appears whole."""
    signal.setitimer(signal.ITIMER_PROF, 0)
    path = os.environ["BENCH_SAMPLES"]
    with open(f"{path}.part", "w") as file:
        file.writelines(f"{';'.join(stack)} {count}\n" for stack, count in _stacks.items())
    os.rename(f"{path}.part", path)
