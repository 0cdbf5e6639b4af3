"""Limiters where it is hard: fifty processes, fifty thousand a second, a hundred thousand keys, a rule that changes meanwhile.

Real forks write down when each of their acquires had returned; the judgement reads nothing else. What is exceeded is never
excused. How much is used depends on processes that get to run in time, so a busy machine is given two more chances.
"""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import pytest

import fastq
from benchmarks.limits.forks import forks, over_bucket, over_window, used
from fastq import FastQ
from fastq.limiter import api
from fastq.limiter.api import Limiter
from fastq.limiter.gate import Gate


def test_fifty_processes_share_one_a_second(redis_url: str, raw: Any) -> None:
    """F019: 0 over in any span, and at least 95 % of it is used."""
    share = 0.0
    for _ in range(3):
        raw.flushall()
        times = sorted(at for uses in used(50, redis_url, {"rate": "1/s"}, 6.5) for at in uses)
        share = (len(times) - 1) / (times[-1] - times[0])
        print(f"\n1/s, 50 processes: {len(times)} uses, {share:.1%}, excess {over_bucket(times, 1, 1):.3f}")
        assert over_bucket(times, 1, 1) <= 0
        if share >= 0.95:
            break
    assert share >= 0.95


def test_fifty_thousand_a_second(redis_url: str, raw: Any) -> None:
    """F019: two processes; 0 over, and nearly all of it is used in a few hundred requests."""
    share = 0.0
    for _ in range(3):
        raw.flushall()
        times = sorted(at for uses in used(2, redis_url, {"rate": "50000/s"}, 1.5, tasks=20) for at in uses)
        excess = over_bucket(times, 50_000, 50_000)
        share = len(times) / (50_000 * (1 + times[-1] - times[0]))
        print(f"\n50,000/s, 2 processes: {len(times)} uses, {share:.1%}, excess {excess:.0f}")
        assert excess <= 0
        if share >= 0.9:
            break
    assert share >= 0.9


def test_a_rule_that_changes_under_load_holds_at_once_and_everywhere(redis_url: str) -> None:
    """Four processes at 400/s, then at 100/s, then at 1,000/s: each is judged alone, from 0.1 s after its change on."""
    app, options = FastQ(redis_url), {"rate": "400/s burst 40"}
    limiter = app.limiter("shared", **options).sync
    with forks(4, redis_url, options, seconds=3.6, tasks=5) as fleet:
        fleet.go()
        start = time.monotonic()
        changes = [(start, 400.0, 40.0)]
        for at, rate, burst in ((1.2, 100, 10), (2.4, 1_000, 100)):
            time.sleep(max(0.0, start + at - time.monotonic()))
            limiter.update(rate=f"{rate}/s burst {burst}")
            changes.append((time.monotonic(), rate, burst))
        per_process = fleet.uses()
    times = sorted(at for uses in per_process for at in uses)
    for n, (changed, rate, burst) in enumerate(changes):
        until = changes[n + 1][0] - 0.05 if n + 1 < len(changes) else times[-1]
        since = changed + (0.1 if n else 0.0)  # what was granted by the old rule may be used up to then
        inside = [at for at in times if since <= at < until]
        print(f"\n{rate}/s: {len(inside)} uses in {until - since:.2f} s, excess {over_bucket(inside, rate, burst):.2f}")
        assert over_bucket(inside, rate, burst) <= 0
        assert len(inside) >= 0.8 * rate * (until - since)
        second = [at for at in times if since <= at < since + 1.0]
        assert len(second) >= 0.5 * rate  # in force within a second
    assert all(any(at > changes[-1][0] + 0.1 for at in uses) for uses in per_process)


def test_a_window_that_changes_under_load_holds(redis_url: str) -> None:
    """From 100 in any second to 20: what the old rule let through counts against the new one."""
    app, options = FastQ(redis_url), {"algorithm": "sliding_window", "limit": 100, "window_seconds": 1}
    limiter = app.limiter("shared", **options).sync
    with forks(2, redis_url, options, seconds=3.2, tasks=4) as fleet:
        fleet.go()
        time.sleep(1.2)
        limiter.update(algorithm="sliding_window", limit=20, window_seconds=1)
        changed = time.monotonic()
        times = sorted(at for uses in fleet.uses() for at in uses)
    assert over_window([at for at in times if at < changed], 100, 1.0) <= 0
    assert over_window([at for at in times if at > changed + 0.1], 20, 1.0) <= 0
    assert any(at > changed + 0.1 for at in times)


# -- keys -------------------------------------------------------------------------------------------------------------------


def alive(kind: type) -> int:
    gc.collect()
    return sum(type(found) is kind for found in gc.get_objects())


async def test_keys_without_number_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process remembers those that were used last: 10,000, here 2,000. `make bench-limits` has 100,000 keys on Redis."""
    monkeypatch.setattr(api, "_KEPT", 2_000)
    before = alive(Limiter), alive(Gate)
    fastq.configure_limiter("many-keys", store="memory", rate="1000/s burst 1")
    limiter = await fastq.get_or_clone_limiter("many-keys")
    for first in range(0, 20_000, 1_000):
        await asyncio.gather(*(limiter.for_key(f"user-{n}").acquire() for n in range(first, first + 1_000)))
    assert limiter.counts.units == 20_000
    assert alive(Limiter) - before[0] <= 2_001
    assert alive(Gate) - before[1] <= 2_001
    engine: Any = limiter._store._engine  # type: ignore[attr-defined]
    assert len(engine) <= 8_000  # those that say more than nothing, and as many again until it looks


async def test_a_partition_that_was_forgotten_here_keeps_its_quota(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quota is in Redis; what this process forgets is only how to ask."""
    monkeypatch.setattr(api, "_KEPT", 100)
    app = FastQ(redis_url)
    limiter = app.limiter("forgotten", rate="1/m")
    assert await limiter.for_key("tenant-1").try_acquire()
    held = limiter.for_key("held")
    for n in range(1_000):
        assert await limiter.for_key(f"other-{n}").try_acquire()
    gc.collect()
    assert "tenant-1" not in limiter._parts
    assert not await limiter.for_key("tenant-1").try_acquire()
    assert limiter.for_key("held") is held  # not forgotten as long as somebody holds it
    await app.aclose()


async def test_a_thousand_keys_at_once_do_not_make_each_other_late(redis_url: str) -> None:
    """Their replies would come later than their units may be used, be asked for again, and so for ever."""
    app = FastQ(redis_url)
    limiter = app.limiter("crowd", rate="1000/s")  # to be used within 20 ms
    await asyncio.wait_for(asyncio.gather(*(limiter.for_key(f"user-{n}").acquire() for n in range(2_000))), 30)
    print(f"\n2,000 keys at once: {limiter.counts.requests} requests, {limiter.counts.late} replies too late")
    assert limiter.counts.requests < 3_000
    await app.aclose()
