"""A master and its producers are cut off from everybody else: what the failover loses of what they were told (F-29)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.chaos.load import Load
from tests.conftest import eventually
from tests.nodes import Sentinels
from tests.process.fleet import PATIENCE

Figure = Callable[[str], None]
SECONDS = 8.0 if "CHAOS_SCALE" in os.environ else 3.0
MIN_REPLICAS = {"min-replicas-to-write": "1", "min-replicas-max-lag": "1"}
WAYS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "replicated": ({}, {"durability": "replicated", "replication_timeout": 0.2}),
    "min-replicas": (MIN_REPLICAS, {}),
    "default": ({}, {}),
}
"""The last one is the planted bug of the first: without WAIT the same analysis finds most of what was confirmed lost."""


@pytest.mark.parametrize("way", WAYS if "CHAOS_SCALE" in os.environ else ["replicated"])
def test_what_a_partition_loses_is_found(way: str, figure: Figure) -> None:
    """F-29: by default, which the test has to find, nearly all that was confirmed behind the partition; a second's worth with min-replicas; none with WAIT."""
    config, settings = WAYS[way]
    with Sentinels(down_after=1.0, bridged=True, **config) as sentinels:
        old, new = sentinels.servers
        assert sentinels.bridge is not None
        with Load(old.url, enqueue_timeout=1.0, **settings) as load:
            eventually(load.more(500), PATIENCE)
            before, cut = len(load.ids), time.monotonic()
            sentinels.bridge.cut()
            accepts = sentinels.until_failed_over(old)
            eventually(lambda: time.monotonic() > cut + SECONDS, PATIENCE)
            sentinels.bridge.heal()
            if (
                way != "replicated"
            ):  # Sentinels look at a replica every 10 s, and believe what it says after another one or two
                eventually(lambda: sentinels.role(old) == "slave", 3 * PATIENCE)
        confirmed = len(load.ids)
        kept = {job_id.decode() for job_id in sentinels.at(new.port).hkeys("fastq:{default}:jobs")}
        lost = [job_id for job_id in load.ids if job_id not in kept]
        figure(
            f"cut off for {SECONDS:g} s, new master after {accepts - cut:.1f} s: {confirmed - before} jobs confirmed since, "
            f"{len(lost)} of them lost ({len(lost) / max(confirmed - before, 1):.1%}), {len(load.refused)} refused"
        )
    if way == "replicated":
        assert lost == []
        assert load.refused
    elif way == "default":
        assert len(lost) > (confirmed - before) / 2, "nothing was lost: this test proves nothing"
    else:
        assert load.refused
