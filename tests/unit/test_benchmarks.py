"""The instruments themselves: a stopwatch that lies is worse than none."""

from __future__ import annotations

import ast
import json
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.load import chart, goals, rows
from benchmarks.load.book import RESULTS, Book, table
from benchmarks.load.candidates import NAMES, about
from benchmarks.load.flame import Profile, fold, slice_of
from benchmarks.load.lab import ROOT, Marks, Stuck


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    (tmp_path / "1").write_text("".join(f"{ns}000000000 {n}\n" for ns, n in [(1, 100), (2, 200), (3, 300)]))
    (tmp_path / "2").write_text("2500000000 100\n3500000000 2")  # its last line is being written
    return Marks(tmp_path)


def test_marks_of_several_processes_are_one_sequence(marks):
    assert marks.between(100, 400) == (2.0, 300)
    assert marks.between(200, 300) == (0.5, 100)


def test_a_drain_that_did_not_end_is_no_rate(marks):
    with pytest.raises(Stuck, match="400 of 500"):
        marks.between(100, 500)


def test_laps_are_sorted_seconds(tmp_path):
    (tmp_path / "1").write_text("5 2000000\n6 1000000\n")
    assert Marks(tmp_path).laps() == [0.001, 0.002]


@pytest.mark.parametrize("name", NAMES)
def test_each_rival_has_the_four_names_a_guarantee_and_pins(name):
    tree = ast.parse((ROOT / "benchmarks" / "rivals" / f"{name}.py").read_text())
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {getattr(target, "id", "") for target in node.targets}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
    assert {"ABOUT", "many", "one", "work"} <= names
    told = about(name)
    assert told.guarantee
    assert told.settings
    assert told.handlers in {"async", "sync", "both"}
    assert told.runtime == "ruby" or all("==" in package for package in told.packages)


def test_a_sample_belongs_to_its_innermost_slice():
    turn = "WorkerLoop._turn (fastq/worker/loop.py:260)"
    assert slice_of((turn, "WorkerLoop._confirm (fastq/worker/loop.py:293)")) == "confirm what was settled"
    assert slice_of((turn, "noop (benchmarks/load/app.py:14)", "tick (bench/benchmarks/tally.py:30)")) == "the handler"
    assert slice_of(("Runner.run (asyncio/runners.py:118)",)).startswith("the event loop")
    assert slice_of(("elsewhere (x.py:1)",)) == "everything else"


def test_slices_add_up_to_the_cost_of_a_job():
    folded = fold(
        "main (m.py:1);Runner.run (asyncio/runners.py:118);noop (app.py:1) 3\nRunner.run (asyncio/runners.py:1) 1\n"
    )
    assert folded.total() == 4
    found = Profile("x", 8.0, 1.0, folded).slices()
    assert [us for _, us in found] == [6.0, 2.0]


def test_charts_are_well_formed():
    pictures = [
        chart.bars("A & B", "<note>", [("x", 10.0, "#000"), ("y", 0.0, "#000")]),
        chart.line("runs", "note", [("a", 0.5)]),
        chart.line("runs", "note", [("a", 0.5), ("b", 0.7)]),
        chart.flame("flame", "note", Counter({("a (x:1)", "b <locals> (y:2)"): 3, ("a (x:9)",): 1})),
    ]
    for picture in pictures:
        assert ET.fromstring(picture).tag.endswith("svg")
    assert "b &lt;locals&gt; (y): 75.0 %" in pictures[-1]


def test_the_book_takes_medians_and_pairs():
    book = Book("Redis 0")
    for ours, theirs in [(10.0, 20.0), (30.0, 20.0), (20.0, 20.0)]:
        book.add("drain", "fastq", ours, "jobs/s")
        book.add("drain", "floor", theirs, "jobs/s")
    assert book.median("drain") == 20.0
    assert goals.Run(book.as_json()).ratio("drain", "floor") == 1.0
    shown = table(book.as_json())
    assert "| fastq | 20.00 jobs/s | 10.00 to 30.00 |" in shown
    assert "What this does not show" in shown


def run_of(**found: dict[str, list[float]]) -> Book:
    book = Book("Redis 0")
    for row, samples in found.items():
        for who, values in samples.items():
            for value in values:
                book.add(getattr(rows, row), who, value, "jobs/s")
    return book


def test_a_goal_is_held_against_the_ratios_of_rounds():
    """The machine was twice as fast in the second round: what counts is who stood beside whom."""
    book = run_of(DRAIN={"fastq": [100.0, 200.0, 100.0]}, KEPT={"fastq": [70.0, 140.0, 30.0]})
    lines = {goal.what: goal for goal in goals.goals(book.as_json())}
    assert lines["results kept for 1 h, beside the drain"] == (
        "results kept for 1 h, beside the drain", "0.70 ×", "at least 0.60 ×", True
    )  # fmt: skip


def test_a_goal_that_is_missed_is_told_so():
    book = run_of(DRAIN={"fastq": [100.0], "blitzq": [40.0], "blitzq_fast": [80.0], "sidekiq": [90.0]})
    found = {goal.what: goal.met for goal in goals.goals(book.as_json())}
    assert found["drain, beside the fastest that loses nothing (blitzq)"] is False
    assert found["drain, beside the fastest (sidekiq)"] is False, "whatever becomes of its jobs"
    assert "| drain, beside the fastest (sidekiq) | 1.11 × | at least 1.50 × | **no** |" in goals.table(book.as_json())


def test_what_was_not_measured_is_neither_met_nor_missed():
    assert goals.goals(Book("Redis 0").as_json()) == []
    book = run_of(P50={"fastq": [0.5]}, P99={"fastq": [1.0]})
    assert [goal.what for goal in goals.goals(book.as_json())] == ["latency of an idle worker, p50"]


def test_the_saved_run_has_a_line_for_every_goal():
    data = json.loads((RESULTS / "latest.json").read_text())
    found = goals.goals(data)
    for line in goals.LINES:
        assert list(line(goals.Run(data))), line.__name__
    shown = (ROOT / "docs" / "performance.md").read_text()
    assert all(f"| {goal.what} | {goal.found} | {goal.wanted} |" in shown for goal in found), "make bench-figures"
    assert goals.beside(data) in (ROOT / "README.md").read_text(), "make bench-figures"
