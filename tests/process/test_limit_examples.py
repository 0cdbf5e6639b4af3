"""The patterns of examples/limits, each as a program on a real Redis; what the other side saw is judged here.

Arrivals are the API's own times. The limiters of windows are 0.25 s longer than the API's windows (what a request's way may
vary on a busy machine); a bucket is judged with as much of its rate on top of its burst.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

WAY = 0.25  # seconds that a request's way may vary
FOLDER = Path(__file__).parents[2] / "examples" / "limits"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "stage")


def play(name: str, url: str) -> dict[str, Any]:
    """Run one of them; the facts that it prints."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), "--json"],
        env={**os.environ, "FASTQ_REDIS_URL": url},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def most_in(times: list[float], window: float) -> int:
    """In the worst of all spans of that length."""
    return max(sum(at <= other < at + window for other in times) for at in times)


def over_bucket(times: list[float], rate: float, burst: float) -> float:
    """Units above ``burst + rate × L`` in the worst span of L seconds."""
    worst = lowest = 0.0
    for n, at in enumerate(sorted(times)):
        lowest = min(lowest, n - rate * at) if n else -rate * at
        worst = max(worst, n + 1 - rate * at - lowest - burst)
    return worst


def assert_window_held(api: dict[str, Any]) -> None:
    assert api["refused"] == []
    assert most_in(api["accepted"], api["window"]) <= api["limit"]


def test_the_readme_names_every_program() -> None:
    readme = (FOLDER / "README.md").read_text("utf-8")
    assert len(PROGRAMS) == 11
    assert [name for name in PROGRAMS if f"({name}.py)" not in readme] == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_says_which_pattern_it_is(name: str) -> None:
    says = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text("utf-8")))
    assert says
    assert says.startswith("Pattern ")


def test_a_third_partys_quota_is_shared_and_its_429_stops_everybody(redis_url: str) -> None:
    """F019, F022, F030, F042: two workers, one quota; after the first 429 nobody calls until the API said."""
    facts = play("third_party_api", redis_url)
    api = facts["github"]
    assert facts["jobs"] == {"success": 60, "attempts": 60}  # what was handed back was charged nothing
    assert sorted(body["issue"] for body in api["bodies"]) == list(range(60))
    assert most_in(api["accepted"], 1.0) <= 20
    stranger = min(api["refused"])  # somebody else had used the quota up
    assert len(api["refused"]) <= 20  # what was under way when the first one came back
    calls = sorted(api["accepted"] + api["refused"])
    assert [at - stranger for at in calls if 0.5 < at - stranger < 1.9] == []


def test_an_email_batch_waits_or_gives_up(redis_url: str) -> None:
    """F012, F031."""
    facts = play("email_batch", redis_url)
    assert_window_held(facts["sendgrid"])
    patient, impatient = facts["patient"], facts["impatient"]
    assert sum(patient) == 25
    assert sum(impatient) == 15
    assert patient[0] >= 23  # only what the provider broke
    assert impatient[1] >= 2  # its pauses
    assert len(facts["sendgrid"]["bodies"]) == patient[0] + impatient[0]


def test_a_queue_is_consumed_at_the_limiters_pace(redis_url: str) -> None:
    """F032, F033: acked, handed back or dead; none twice, none lost."""
    facts = play("queue_backpressure", redis_url)
    assert facts["jobs"] == {"success": 87, "failed": 3, "attempts": 90}
    assert_window_held(facts["api"])
    assert sorted(facts["api"]["bodies"]) == [n for n in range(90) if n % 30 != 7]
    assert facts["api"]["most_inside"] <= 20  # ten in each worker


def test_blocking_workers_share_a_quota(redis_url: str) -> None:
    """F034."""
    facts = play("sync_worker", redis_url)
    assert facts["jobs"] == {"success": 50, "attempts": 50}
    assert_window_held(facts["api"])
    assert Counter(facts["api"]["bodies"]) == {f"user-{n}": 1 for n in range(50)}


def test_one_of_many_writes_the_report(redis_url: str) -> None:
    """F035."""
    facts = play("leader_election", redis_url)
    assert Counter(facts["workers"]) == {
        "Daily report sent successfully": 1,
        "Another worker is generating report, skipping": 5,
    }
    assert len(facts["reports"]["bodies"]) == 1


def test_a_guarded_job_runs_once_for_each_firing(redis_url: str) -> None:
    """F036: four schedulers, three firings."""
    facts = play("scheduler_guard", redis_url)
    ran = [json.loads(said.replace("None", "null")) for said in facts["workers"]]
    assert [[row[firing] for row in ran].count(10) for firing in range(3)] == [1, 1, 1]
    assert facts["left"] == 70


def test_a_batch_keeps_its_pace(redis_url: str) -> None:
    """F037: 50/s with a burst of 5; (processed, failed); a pause between chunks and none after the last."""
    facts = play("batch_pacing", redis_url)
    assert (facts["processed"], facts["failed"]) == (95, 5)
    times = facts["api"]["accepted"]
    assert over_bucket(times, 50, 5 + 50 * WAY) <= 0
    assert sum(b - a > 0.39 for a, b in itertools.pairwise(times)) >= 2


def test_an_import_stops_when_the_database_has_no_room(redis_url: str) -> None:
    """F038: duplicates are passed over; 400 writes at 200/s; after the penalty nothing more is written."""
    facts = play("bulk_import", redis_url)
    assert facts["first"] == 390
    assert facts["seconds"] >= 0.99  # the burst of 200, then 200/s
    assert 100 <= facts["second"] < 400
    assert facts["rows"] == facts["first"] + facts["second"]


def test_retries_back_off_and_ask_each_time(redis_url: str) -> None:
    """F039: delays double; a limiter's timeout counts as a failure; the last one is raised."""
    facts = play("retry_backoff", redis_url)
    assert (facts["flaky"], facts["dead"], facts["limited"]) == ("done", "RuntimeError", "LimitTimeout")
    assert facts["remaining"] == 8 - 4 - 3  # one unit for each attempt
    gaps = [b - a for a, b in itertools.pairwise(facts["flaky_api"]["accepted"])]
    assert [gap >= least for gap, least in zip(gaps, (0.1, 0.2, 0.4), strict=True)] == [True] * 3
    assert len(facts["dead_api"]["accepted"]) == 3
    assert facts["healthy_api"]["accepted"] == []


def test_each_service_has_its_own_limit(redis_url: str) -> None:
    """F026, F040."""
    facts = play("several_services", redis_url)
    assert facts["jobs"] == {"success": 70, "attempts": 70}
    for service in ("stripe", "sendgrid", "inventory"):
        assert Counter(facts[service]["bodies"]) == {f"order-{n}": 1 for n in range(70)}
    assert_window_held(facts["sendgrid"])
    assert over_bucket(facts["stripe"]["accepted"], 40, 40 + 40 * WAY) <= 0
    assert over_bucket(facts["inventory"]["accepted"], 30, 10 + 30 * WAY) <= 0


def test_a_resource_is_used_by_so_many_at_once(redis_url: str) -> None:
    """F008, F041: three of twenty handlers, in two processes."""
    facts = play("resource_pool", redis_url)
    assert facts["jobs"] == {"success": 80, "attempts": 80}
    assert sorted(facts["expensive"]["bodies"]) == list(range(80))
    assert facts["expensive"]["most_inside"] == 3
