"""What must hold on every machine: counts that do not jitter, and ratios measured in one run."""

from __future__ import annotations

from benchmarks.load.driver import Figures

__all__ = ["faults"]

RATIO = 0.5
"""Least share of the bare loop's drain rate that everything around it may cost: leases, fence, metrics, limits."""


def faults(figures: Figures) -> list[str]:
    """What is worse than it may be; empty when all is well."""
    ratio = figures.fastq.jobs_per_second / figures.bare.jobs_per_second
    checks = [
        (ratio >= RATIO, f"drain is {ratio:.2f} of the bare loop, must be {RATIO} or more"),
        (figures.fastq.sent <= 0.2, f"{figures.fastq.commands:.3f} commands per job, must be 0.2 or less"),
        (figures.bytes_per_job <= 250, f"{figures.bytes_per_job:.0f} bytes per pending job, must be 250 or less"),
        (
            figures.enqueue.round_trips <= 0.02,
            f"{figures.enqueue.round_trips:.4f} round trips per concurrent enqueue, must be 0.02 or less",
        ),
    ]
    return [message for holds, message in checks if not holds]
