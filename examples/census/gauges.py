"""What the fleet says of itself: queue depths from Redis, counters and latencies from the monitor's /metrics."""

from __future__ import annotations

import contextlib
import http.client
from collections import Counter
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from fastq.metrics import Histogram


class Scrape:
    """Reads /metrics; keeps the last answer when there is none."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.retried = 0
        self.run = Histogram((), (), 0.0)
        """Run times of handlers, in seconds."""
        self.wait = Histogram((), (), 0.0)
        """Times from ready, or due, to the start of the handler, in seconds."""

    def update(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=1.0)
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError), contextlib.closing(connection):
            connection.request("GET", "/metrics")
            self._read(connection.getresponse().read().decode())

    def _read(self, text: str) -> None:
        families = {family.name: family.samples for family in text_string_to_metric_families(text)}
        finished = families.get("fastq_jobs_finished", [])
        self.retried = int(sum(s.value for s in finished if s.labels.get("status") == "retry"))
        self.run = histogram(families.get("fastq_job_duration_seconds", []))
        self.wait = histogram(families.get("fastq_job_wait_seconds", []))


def histogram(samples: list[Any]) -> Histogram:
    """The sum of a family's series."""
    below: Counter[float] = Counter()
    for sample in samples:
        if sample.name.endswith("_bucket"):
            below[float(sample.labels["le"])] += int(sample.value)
    bounds = sorted(below)
    counts = [below[bound] - below.get(before, 0) for before, bound in zip([-1.0, *bounds], bounds, strict=False)]
    total = sum(sample.value for sample in samples if sample.name.endswith("_sum"))
    return Histogram(tuple(bounds[:-1]), tuple(counts), total)
