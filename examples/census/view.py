"""The live view: a block that is redrawn on a terminal, one line per second anywhere else."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections import deque
from typing import TextIO

from census.gauges import Scrape
from fastq.broker.inspector import QueueInfo

REDRAW = 0.1  # seconds, on a terminal
LINE = 1.0  # seconds, elsewhere
RATE_OVER = 1.5  # seconds
BAR = 30  # characters

UP, CLEAR = "\x1b[{}A", "\x1b[K"


class View:
    """Shows the state of the queue; `note` adds a line that stays."""

    def __init__(self, total: int, out: TextIO = sys.stdout) -> None:
        self._total = total
        self._out = out
        self._live = out.isatty()
        self._started = time.monotonic()
        self._shown_at = -math.inf
        self._drawn = 0
        self._progress: deque[tuple[float, int]] = deque([(self._started, 0)])

    def due(self) -> bool:
        """Whether it is time to show something again."""
        return time.monotonic() - self._shown_at >= (REDRAW if self._live else LINE)

    def show(self, info: QueueInfo, scrape: Scrape) -> None:
        now = self._shown_at = time.monotonic()
        rate = self._rate(now, info.finished)
        if self._live:
            self._redraw(self._block(info, scrape, rate, now))
            return
        counts = "  ".join(f"{name} {value}" for name, value in counts_of(info, scrape))
        self._out.write(f"{now - self._started:5.1f} s  {counts}  {rate:.0f} jobs/s  {latency(info, scrape)}\n")
        self._out.flush()

    def note(self, text: str) -> None:
        """Say what has just happened."""
        block, self._drawn = self._drawn, 0
        above = UP.format(block) if block else ""
        self._out.write(f"{above}{CLEAR if self._live else ''}{time.monotonic() - self._started:5.1f} s  {text}\n")
        self._out.write("\x1b[J" if self._live else "")  # what is below is drawn anew
        self._out.flush()

    def _rate(self, now: float, finished: int) -> float:
        self._progress.append((now, finished))
        while len(self._progress) > 2 and now - self._progress[0][0] > RATE_OVER:
            self._progress.popleft()
        then, before = self._progress[0]
        return (finished - before) / (now - then) if now > then else 0.0

    def _block(self, info: QueueInfo, scrape: Scrape, rate: float, now: float) -> list[str]:
        part = min(info.finished / self._total, 1.0)
        full = round(part * BAR)
        rows = [f"  {'█' * full}{'░' * (BAR - full)} {part:4.0%}  {now - self._started:.1f} s  {rate:.0f} jobs/s"]
        rows += [f"  {name:8} {value:>6}" for name, value in counts_of(info, scrape)]
        return [*rows, f"  {latency(info, scrape)}"]

    def _redraw(self, rows: list[str]) -> None:
        width = shutil.get_terminal_size().columns - 1  # a row that wrapped would shift all below it
        above = UP.format(self._drawn) if self._drawn else ""
        self._out.write(above + "".join(f"{row[:width]}{CLEAR}\n" for row in rows))
        self._out.flush()
        self._drawn = len(rows)


def counts_of(info: QueueInfo, scrape: Scrape) -> list[tuple[str, int]]:
    return [
        ("pending", info.pending),
        ("later", info.scheduled),
        ("running", info.running),
        ("done", info.finished),
        ("retried", scrape.retried),
        ("dead", info.dead),
    ]


def latency(info: QueueInfo, scrape: Scrape) -> str:
    """How long the next job has waited, and how long handlers run."""
    waited = f"waited {seconds(info.oldest_age or 0.0)}"
    if not scrape.run.count:
        return waited
    return f"{waited}, run p50 {seconds(scrape.run.quantile(0.5))} p99 {seconds(scrape.run.quantile(0.99))}"


def seconds(value: float) -> str:
    """0.0042 -> '4.2 ms', 3.14 -> '3.1 s'."""
    if value >= 1.0:
        return f"{value:.1f} s"
    return f"{value * 1_000:.1f} ms" if value < 0.01 else f"{value * 1_000:.0f} ms"
