"""What the documents show: tables, charts and the flame picture, written from the last saved run. One command draws all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.load import chart, goals, rows
from benchmarks.load.book import RESULTS, table
from benchmarks.load.candidates import FASTQ, FLOORS, NAMES, about
from benchmarks.load.flame import Profile, profile
from benchmarks.load.lab import ROOT, drain, private_server

PAGE = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "img"
HISTORY = RESULTS / "history.json"
JOBS = 150_000


def draw() -> None:
    """Everything; takes half a minute, of which the samples of the worker take most."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = json.loads((RESULTS / "latest.json").read_text())
    (PICTURES / "drain.svg").write_text(_drains(data))
    _write_between("goals", goals.table(data))
    _write_between("table", table(data))
    _write_between("comparison", goals.beside(data), ROOT / "README.md")
    remember(data)
    past = json.loads(HISTORY.read_text())
    points = [(entry["commit"], entry["share of the redis-py floor"]) for entry in past]
    note = "drain rate, 1 worker, as a share of the redis-py floor's in the same run; one point per saved run"
    (PICTURES / "history.svg").write_text(chart.line("fastq against its floor", note, points))
    worker, floor = _profiles()
    title = "The worker at full load: where its CPU time goes"
    note = f"{worker.folded.total():,} samples of CPU time; {worker.us:.1f} µs per job; hover for names and shares"
    (PICTURES / "flame.svg").write_text(chart.flame(title, note, worker.folded))
    _write_between("slices", slices(worker, floor))


def _drains(data: dict[str, Any]) -> str:
    found = data["rows"][rows.DRAIN]
    once = {name for name in NAMES if not about(name).once}

    def colour(name: str) -> str:
        return chart.ACCENT if name == FASTQ.name else chart.FLOOR if name in FLOORS else chart.REST

    def label(name: str) -> str:
        return f"floor: {name}" if name in FLOORS else f"{name} (may lose jobs)" if name in once else name

    rates = {name: samples["median"] for name, samples in found.items()}
    bars = [(label(name), rate, colour(name)) for name, rate in sorted(rates.items(), key=lambda item: -item[1])]
    rounds = min(len(samples["samples"]) for samples in found.values())
    machine = data["machine"]
    note = f"{data['when'][:10]}, {machine['cores']} cores, {data['server']}, CPython {data['python']}; median of {rounds} rounds"
    return chart.bars("Jobs per second, one worker process, no-op jobs, results off", note, bars)


def remember(data: dict[str, Any]) -> None:
    """Add a run to the history, once."""
    past = json.loads(HISTORY.read_text()) if HISTORY.exists() else []
    run = goals.Run(data)
    entry = {
        "when": data["when"],
        "commit": data["commit"],
        "load": data["machine"]["load"],
        "jobs per second": round(run.median(rows.DRAIN)),
        "share of the redis-py floor": round(run.ratio(rows.DRAIN, "redis-py"), 3),
        "share of the protocol floor": round(run.ratio(rows.DRAIN, "protocol"), 3),
        "worker µs per job": round(run.median(rows.WORKER_US), 2),
        "Redis µs per job": round(run.median(rows.REDIS_US), 2),
    }
    past = [other for other in past if other["when"] != entry["when"]] + [entry]
    HISTORY.write_text(json.dumps(past, indent=1, ensure_ascii=False) + "\n")


def _profiles() -> tuple[Profile, Profile]:
    with private_server() as redis:
        found = []
        for who in (FASTQ, FLOORS["protocol"]):
            plain = min((drain(redis, who, JOBS) for _ in range(3)), key=lambda one: one.worker_us)
            found.append(profile(redis, who, plain))
    return found[0], found[1]


def slices(worker: Profile, floor: Profile) -> str:
    """The slices of the worker beside those of the floor, as Markdown."""
    theirs = dict(floor.slices())
    lines = ["| slice | fastq, µs per job | bare protocol with a Task per job | difference |", "|---|---|---|---|"]
    for name, us in worker.slices():
        other = theirs.pop(name, 0.0)
        lines.append(f"| {name} | {us:.2f} | {other:.2f} | {us - other:+.2f} |")
    lines += [f"| {name} | 0.00 | {other:.2f} | {-other:+.2f} |" for name, other in theirs.items()]
    lines.append(f"| **together** | **{worker.us:.2f}** | **{floor.us:.2f}** | **{worker.us - floor.us:+.2f}** |")
    return "\n".join(lines)


def _write_between(name: str, text: str, page: Path = PAGE) -> None:
    """Replace what stands between two marks of a page."""
    begin, end = f"<!-- {name}: written by make bench-figures -->", f"<!-- end of {name} -->"
    old = page.read_text()
    if begin not in old or end not in old:
        raise LookupError(f"{page.name} has no marks for {name}")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    page.write_text(re.sub(pattern, lambda _: f"{begin}\n{text}\n{end}", old, flags=re.DOTALL))
