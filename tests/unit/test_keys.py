"""Key names: all of a queue in one slot, each known to the table, and the page about them is printed from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastq.broker import keys
from fastq.broker.keys import PAD, PRIORITIES, TABLE, GlobalKeys, LeaseKeys, QueueKeys, bucket_of, describe
from fastq.errors import InvalidJobId
from fastq.job import check_id

ROOT = Path(__file__).parents[2]


def names(q: QueueKeys) -> list[str]:
    plain = [value for value in vars(q).values() if isinstance(value, bytes)]
    return [
        key.decode()
        for key in (
            *plain,
            *q.ready,
            q.running("host-1-abc"),
            q.bucket("3600000:17"),
            q.parked_by("api/~all"),
            q.wake_of("host-1-abc~2"),
            q.tag("tenant:42"),
            q.said("ab12", 7),
            q.steps("a@b/c="),
            q.progress("a:7/b@c"),
            q.logs("a:7/b@c"),
            q.batch("0" * 24),
            q.batch_ends("0" * 24),
            q.flow("0" * 24),
            q.flow_states("0" * 24),
        )
    ]


@pytest.mark.parametrize("name", ["mail", "mail:0", "mail:15"])
def test_all_keys_of_a_queue_carry_its_hash_tag(name: str) -> None:
    """One slot of a cluster: every script is legal there."""
    tag = f"{{{name}}}"
    found = names(QueueKeys("app:x", name))
    assert len(found) == len(set(found))
    assert all(name.startswith(f"app:x:{tag}:") for name in found)
    assert all(name.count("{") == name.count("}") == 1 for name in found)


@pytest.mark.parametrize("queue", ["q", "q:3"])
def test_every_name_is_in_the_table(queue: str) -> None:
    described = {info.pattern for name in names(QueueKeys("fastq", queue)) if (info := describe(name))}
    described |= {info.pattern for key in vars(GlobalKeys("fastq")).values() if (info := describe(key.decode()))}
    lease = LeaseKeys("fastq", "leader", "a report")
    described |= {info.pattern for key in (lease.lease, lease.wake) if (info := describe(key.decode()))}
    derived = {"{q}:unique:ttl:<key>"}  # its name is made in enqueue_once.lua
    assert described == {info.pattern for info in TABLE if "{l}" not in info.pattern} - derived


@pytest.mark.parametrize(
    "name",
    [
        "fastq:{q}:jobs2",
        "fastq:{q}:ready",
        "fastq:{q}:ready:5:x",
        "fastq:{q}:running:",
        "fastq:q:jobs",
        "{q}:jobs",
        "fastq:{q q}:jobs",
        "fastq:{q}:done:1",
        "fastq:{q}:jobs\n",
        "other",
        "",
    ],
)
def test_a_name_that_is_never_written(name: str) -> None:
    assert describe(name) is None


def test_priorities_and_levels() -> None:
    q = QueueKeys("fastq", "q")
    assert [key.decode() for key in q.ready] == [f"fastq:{{q}}:ready:{priority}" for priority in range(PRIORITIES)]
    assert q.levels == q.ready[::-1]  # as the scripts take them: highest first


def test_the_plain_ready_key_is_documented() -> None:
    """KEDA's stock Redis scaler scales by its length."""
    assert QueueKeys("fastq", "default").ready[5] == b"fastq:{default}:ready:5"


def test_the_pad_is_long_and_no_job_id() -> None:
    """64 bytes is where a listpack ends; an id that equals it could be cancelled or settled."""
    assert len(PAD) > 64
    with pytest.raises(InvalidJobId):
        check_id(PAD)


# -- buckets of finished records ---------------------------------------------------------------------


@given(st.floats(0, 10**7), st.integers(0, 2**45))
def test_a_record_lives_between_ttl_and_a_quarter_more(ttl: float, now_ms: int) -> None:
    name, expires = bucket_of(ttl, now_ms)
    ttl_ms = max(1_000, round(ttl * 1_000))
    assert ttl_ms <= expires - now_ms <= ttl_ms + max(250, ttl_ms // 4)
    assert describe(f"fastq:{{q}}:done:{name}") is not None


@given(st.integers(1, 100_000), st.integers(0, 2**45), st.integers(0, 10**8))
def test_a_bucket_has_one_expiry(ttl: int, now_ms: int, later: int) -> None:
    """Written to for a quarter of the ttl, it always expires at the same time."""
    first, second = bucket_of(ttl, now_ms), bucket_of(ttl, now_ms + later)
    assert (first == second) == (first[0] == second[0])
    assert first[1] <= second[1]


def test_different_ttls_have_different_buckets() -> None:
    assert len({bucket_of(ttl, 10**12)[0] for ttl in (1, 2, 60, 3_600, 86_400)}) == 5


# -- the page -----------------------------------------------------------------------------------------


def test_the_page_is_printed_from_the_table() -> None:
    assert (ROOT / "docs" / "redis_keys.md").read_text("utf-8") == keys.document()
    rows = [line for line in keys.document().splitlines() if line.startswith("| `")]
    assert len(rows) == len(TABLE)


def test_it_is_printed_by_the_module() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "fastq.broker.keys"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8").stdout
    assert printed == keys.document()


def test_every_key_is_explained() -> None:
    for info in TABLE:
        assert info.type in {"hash", "list", "zset", "set", "stream", "string"}
        assert f"`{info.lifetime}`" in keys.document()
        assert info.meaning
