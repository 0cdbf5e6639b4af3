"""The figures of one run: samples by row and candidate, their JSON and their table."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.load.lab import ROOT

RESULTS = ROOT / "benchmarks" / "results"

HONEST = """\
What this does not show: jobs that do something (a 50 ms handler makes all of these equal), a Redis on another host, payloads
above 100 bytes, Redis persistence (off for everybody), more than two cores, how a queue behaves when something breaks.
Producer, worker and Redis share the cores, so whoever burns less of one leaves more to the others. Compare within one run only."""


class Samples(NamedTuple):
    """All samples of one candidate in one row."""

    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half the range, as a share of the median."""
        return (max(self.values) - min(self.values)) / 2 / self.median if self.median else 0.0

    def __str__(self) -> str:
        value = self.median
        shown = f"{value:,.0f}" if value >= 100 else f"{value:,.2f}" if value >= 0.1 else f"{value:.4f}"
        spread = f" ±{self.spread * 100:.0f} %" if len(self.values) > 1 else ""
        return f"{shown} {self.unit}{spread}"


class Book:
    """Figures as they come, and what they were measured with."""

    def __init__(self, server: str) -> None:
        self.server = server
        self.when = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self.rows: dict[str, dict[str, Samples]] = {}
        self.notes: dict[str, str] = {}  # candidate -> guarantee and settings, or why it is missing
        self.load = [os.getloadavg()[0]]

    def add(self, row: str, who: str, value: float, unit: str) -> None:
        """One sample."""
        self.rows.setdefault(row, {}).setdefault(who, Samples(unit, [])).values.append(value)
        self.load.append(os.getloadavg()[0])

    def median(self, row: str, who: str = "fastq") -> float:
        return self.rows[row][who].median

    def as_json(self) -> dict[str, Any]:
        return {
            "when": self.when,
            "commit": _git("rev-parse", "--short", "HEAD"),
            "machine": {
                "cores": os.cpu_count(),
                "cpu": _cpu_name(),
                "system": f"{platform.system()} {platform.release()}",
                "load": {"least": round(min(self.load), 1), "most": round(max(self.load), 1)},
            },
            "python": platform.python_version(),
            "server": self.server,
            "notes": self.notes,
            "rows": {
                row: {who: {"unit": s.unit, "median": s.median, "samples": s.values} for who, s in found.items()}
                for row, found in self.rows.items()
            },
        }

    def save(self, name: str) -> Path:
        """Into benchmarks/results/."""
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps(self.as_json(), indent=1, ensure_ascii=False) + "\n")
        return path


def table(data: dict[str, Any]) -> str:
    """A saved run as Markdown."""
    machine = data["machine"]
    load = machine["load"]
    setting = (
        f"{data['when'][:10]}, commit {data['commit']}: {machine['cores']} cores ({machine['cpu']}), CPython "
        f"{data['python']}, {data['server']} over loopback TCP; load average during the run {load['least']} to "
        f"{load['most']} (above 2 somebody else was working on this machine, too)."
    )
    lines = [
        setting,
        "",
        HONEST,
        "",
    ]
    for row, found in data["rows"].items():
        first = next(iter(found.values()))
        best = "ms" in first["unit"] or "bytes" in first["unit"] or "per job" in row
        order = sorted(found.items(), key=lambda item: item[1]["median"], reverse=not best)
        lines += [f"**{row}**", "", "| | median | least to most |", "|---|---|---|"]
        for who, s in order:
            values = sorted(s["samples"])
            lines.append(f"| {who} | {_shown(s['median'])} {s['unit']} | {_shown(values[0])} to {_shown(values[-1])} |")
        lines.append("")
    lines += ["| | what is kept when its worker is killed, and how it was set up |", "|---|---|"]
    lines += [f"| {who} | {note} |" for who, note in data["notes"].items()]
    return "\n".join(lines)


def _shown(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
