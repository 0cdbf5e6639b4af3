"""What docs and examples say about metrics is what a scrape shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastq.metrics import METRICS, STATUSES, document

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "metrics.md"
GRAFANA = ROOT / "examples" / "grafana.json"
ALERTS = ROOT / "examples" / "alerts.yaml"

ENDS = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
SAMPLES = {metric.name + end: metric for metric in METRICS for end in ENDS[metric.kind]}
ADDED = {"le", "instance"}  # labels of buckets and of the scraper


def expressions() -> list[str]:
    found = [line for line in ALERTS.read_text().replace("|\n", "").splitlines() if "fastq_" in line]
    found += [
        cell
        for line in DOC.read_text().splitlines()
        if line.startswith("| ") and "?" in line
        for cell in line.split("`")[1::2]
    ]
    panels: list[dict[str, Any]] = json.loads(GRAFANA.read_text())["panels"]
    return found + [target["expr"] for panel in panels for target in panel["targets"]]


def test_the_table_of_the_docs_is_the_one_of_the_code() -> None:
    """`python -m fastq.metrics` prints what belongs between the two comments."""
    generated = re.search(
        r"<!-- generated: python -m fastq\.metrics -->\n(.*?)<!-- end -->", DOC.read_text(), re.DOTALL
    )
    assert generated is not None
    assert generated[1] == document()


def test_there_are_examples_to_check() -> None:
    assert len(expressions()) > 30


@pytest.mark.parametrize("expression", expressions())
def test_examples_use_names_and_labels_that_exist(expression: str) -> None:
    names = re.findall(r"fastq_\w+", expression)
    assert set(names) <= set(SAMPLES)
    labels = {label for name in names for label in SAMPLES[name].labels} | ADDED
    for name, matchers in re.findall(r"(fastq_\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)=~?\"", matchers)) <= set(SAMPLES[name].labels)
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        assert set(group.split(", ")) <= labels
    for status in re.findall(r"status=~?\"([^\"]*)\"", expression):
        assert set(status.split("|")) <= set(STATUSES)
    assert expression.count("(") == expression.count(")")


def test_dead_letters_have_a_gauge_and_an_alert() -> None:
    """F300: more than 100 for five minutes is a warning."""
    assert {metric.name: metric.kind for metric in METRICS}["fastq_dead_letters"] == "gauge"
    (rule,) = [part for part in ALERTS.read_text().split("- alert: ") if part.startswith("FastqManyDeadLetters")]
    lines = [line.strip() for line in rule.splitlines()]
    assert lines[1:4] == ["expr: max by (queue) (fastq_dead_letters) > 100", "for: 5m", "labels: {severity: warning}"]
