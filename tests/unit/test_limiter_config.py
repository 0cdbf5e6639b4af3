"""Limiters by name: files, calls, and the memory store."""

from __future__ import annotations

import asyncio
import os
import re
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

import fastq
from fastq.limiter import catalogue
from fastq.limits import FixedWindow, SlidingWindow, TokenBucket

# The document's own, letter by letter (it has no [stores] table).
PRESETS = """
[limiters.github_api]
store_id = "redis"
algorithm = "sliding_window"
limit = 5000
window_seconds = 3600  # 5000/hour
timeout = 30.0  # Wait up to 30s

[limiters.stripe_api]
store_id = "redis"
algorithm = "token_bucket"
rate_per_second = 100.0  # 100/sec with burst
timeout = 5.0

[limiters.sendgrid_api]
store_id = "redis"
algorithm = "sliding_window"
limit = 600
window_seconds = 60  # 600/minute
timeout = 60.0

[limiters.openai_api]
store_id = "redis"
algorithm = "sliding_window"
limit = 60
window_seconds = 60  # 60/minute
timeout = 120.0
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty catalogue, and an empty folder to stand in."""
    monkeypatch.setattr(catalogue, "_default", catalogue.Catalogue(files=True))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))


@pytest.mark.parametrize("place", ["rate-sync.toml", "fastq.toml", "config/rate-sync.toml", "config/fastq.toml"])
async def test_the_documents_presets(fresh: Path, place: str) -> None:
    """F001-F007, F009, F010."""
    write(fresh / place, PRESETS)
    found = {name: await fastq.get_or_clone_limiter(name, "worker-1") for name in ("github_api", "stripe_api")}
    found |= {name: await fastq.get_or_clone_limiter(name) for name in ("sendgrid_api", "openai_api")}
    assert {name: (limiter.plan.rule.rate, limiter.plan.timeout) for name, limiter in found.items()} == {
        "github_api": (SlidingWindow(5000, 3600), 30),
        "stripe_api": (TokenBucket(100), 5),
        "sendgrid_api": (SlidingWindow(600, 60), 60),
        "openai_api": (SlidingWindow(60, 60), 120),
    }
    assert fastq.FastQ().settings.url  # the tables are no unknown settings


@pytest.mark.parametrize(
    ("name", "capacity"), [("github_api", 5000), ("stripe_api", 100), ("sendgrid_api", 600), ("openai_api", 60)]
)
async def test_the_documents_presets_hold(fresh: Path, name: str, capacity: int) -> None:
    """F009: as many as they say, and the next one is told at once that it would wait too long."""
    write(fresh / "rate-sync.toml", PRESETS.replace('"redis"', '"memory"'))
    limiter = await fastq.get_or_clone_limiter(name, "worker-1")
    await limiter.acquire(cost=capacity)
    assert not await limiter.try_acquire(timeout=0)
    if name != "stripe_api":  # that one has another in 10 ms
        with pytest.raises(TimeoutError):
            await limiter.acquire(timeout=0.05)


async def test_the_ladder_of_timeouts(fresh: Path) -> None:
    """F027: 5 s where somebody waits, 60 s in a job, 300 s in a batch; the page's own lines."""
    page = (Path(__file__).parents[2] / "docs" / "limits.md").read_text("utf-8")
    (ladder,) = re.findall(r"```toml\n(\[limiters\.critical\].*?)```", page, re.DOTALL)
    (fresh / "fastq.toml").write_text(ladder)
    found = {name: await fastq.get_or_clone_limiter(name) for name in ("critical", "job", "batch")}
    assert {name: limiter.plan.timeout for name, limiter in found.items()} == {"critical": 5, "job": 60, "batch": 300}


async def test_the_documents_test() -> None:
    """F015, F016, F051."""
    fastq.configure_store("test", strategy="memory")
    fastq.configure_limiter("test_job_limiter", store_id="test", algorithm="sliding_window", limit=5, window_seconds=10)
    limiter = await fastq.get_or_clone_limiter("test_job_limiter", "test-worker")
    for _ in range(5):
        await limiter.acquire(timeout=1.0)
    with pytest.raises(TimeoutError):
        await limiter.acquire(timeout=0.1)


async def test_scopes_share_the_quota_unless_told_otherwise() -> None:
    """F020: in rate-sync every unique_id has a quota of its own, so N workers exceed the limit N-fold."""
    fastq.configure_limiter("api", store="memory", algorithm="sliding_window", limit=1, window_seconds=60)
    one, two = [await fastq.get_or_clone_limiter("api", f"worker-{n}") for n in range(2)]
    assert await one.try_acquire(timeout=0)
    assert not await two.try_acquire(timeout=0)
    own = await fastq.get_or_clone_limiter("api", "worker-1", partition=True)
    assert await own.try_acquire(timeout=0)


async def test_leader_election_with_try_acquire() -> None:
    """F035: exactly one of many runs the report."""
    fastq.configure_limiter("daily_report", store="memory", algorithm="fixed_window", limit=1, every="day")
    limiters = [await fastq.get_or_clone_limiter("daily_report", "all-workers") for _ in range(5)]
    assert [await limiter.try_acquire(timeout=0) for limiter in limiters].count(True) == 1


@pytest.mark.parametrize("pace", [0.0007, 0.0011, 0.002, 0.003])
async def test_steady_use_never_waits(monkeypatch: pytest.MonkeyPatch, pace: float) -> None:
    """What was granted in advance is renewed while there is some of it, at any pace: its units all end at once."""
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limiter = fastq.configure_limiter("steady", store="memory", rate="10000/s", use_within=0.05)
    waited = 0
    for _ in range(1_000):
        now[0] += pace
        if not limiter.take_at_hand(1):
            waited += 1
            await limiter.acquire()
        await asyncio.sleep(0)  # the request that was made has its answer
        await asyncio.sleep(0)
    assert waited <= 2, "the first one, and what came before it was known how many are used"


async def test_who_needs_more_than_is_at_hand_is_served_although_nothing_is_to_be_renewed() -> None:
    limiter = fastq.configure_limiter("fallen", store="memory", rate="10000/s", use_within=0.05)
    await limiter.acquire()
    gate = limiter._gate()
    gate.tokens.put(100, time.monotonic() + 60.0)
    gate.top_up()  # finds that these will do, after the next line has joined
    await limiter.acquire(timeout=5, cost=103)


async def test_what_a_window_granted_ahead_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steady use below a window's limit uses up little more than it takes."""
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limiter = fastq.configure_limiter(
        "window", store="memory", algorithm="sliding_window", limit=10_000, window_seconds=10
    )
    for _ in range(10_000):
        now[0] += 0.002
        await limiter.acquire()
        await asyncio.sleep(0)
    assert (await limiter.state()).remaining > 4_000, "500 a second take 5,000"


async def test_a_memory_pool_wakes_its_waiters() -> None:
    """F008, F012: max_concurrent in memory, in order, nothing lost when waiters are cancelled."""
    fastq.configure_limiter("pool", store="memory", max_concurrent=2)
    pool = await fastq.get_or_clone_limiter("pool")
    inside = most = 0
    served: list[int] = []

    async def one(n: int) -> None:
        nonlocal inside, most
        async with pool.acquire_context(timeout=10):
            inside += 1
            most = max(most, inside)
            served.append(n)
            await asyncio.sleep(0)
            inside -= 1

    start = time.monotonic()
    tasks = [asyncio.create_task(one(n)) for n in range(30)]
    await asyncio.sleep(0)
    tasks[5].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most == 2
    assert served == [n for n in range(30) if n != 5]
    assert time.monotonic() - start < 3
    assert (await pool.state()).holders == 0


def test_the_blocking_twin_in_memory() -> None:
    fastq.configure_limiter("sync", store="memory", rate="1/m")
    limiter = catalogue.default().find("sync").sync
    limiter.acquire(timeout=1)
    assert not limiter.try_acquire()
    with pytest.raises(TimeoutError):
        limiter.acquire(timeout=1)


async def test_the_decorator_in_front_of_async_and_blocking_functions() -> None:
    limiter = fastq.configure_limiter("api", store="memory", algorithm="sliding_window", limit=1, window_seconds=60)

    @fastq.rate_limited("api:{user.id}", timeout=0)
    def blocking(user: Any) -> str:
        return "done"

    @fastq.rate_limited(limiter, timeout=0)
    async def one() -> str:
        return "done"

    class User:
        id = 7

    assert await asyncio.to_thread(blocking, User()) == "done"
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(blocking, User())
    assert await one() == "done"
    with pytest.raises(TimeoutError):
        await one()


# -- files ------------------------------------------------------------------------------------------


def test_stores_variables_and_rate_syncs_spellings(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F002, F017."""
    monkeypatch.setenv("LIMIT", "12")
    write(
        fresh / "rate-sync.toml",
        """
        [stores.main]
        engine = "redis"
        url = "${LIMITS_URL:-redis://limits.example:6380/3}"
        [stores.local]
        strategy = "memory"
        [limiters.a]
        store = "main"
        algorithm = "fixed_window"
        limit = "${LIMIT}"
        zone = "Europe/Berlin"
        fail_closed = false
        [limiters.b]
        store_id = "local"
        max_concurrent = "${POOL:-3}"
        lease = 5
        """,
    )
    a, b = (catalogue.default().find(name) for name in "ab")
    assert (a.plan.rule.rate, a.plan.on_error) == (FixedWindow(12, "day", "Europe/Berlin"), "open")
    assert a._store._endpoint().shown == "redis://limits.example:6380/3"  # type: ignore[attr-defined]
    assert (b.plan.rule.max_concurrent, b.plan.lease, b.plan.on_error) == (3, 5, "closed")


def test_all_problems_at_once(fresh: Path) -> None:
    """Unknown keys, missing fields and nonsense: each with its file and table."""
    write(
        fresh / "rate-sync.toml",
        """
        [limiter.x]
        limit = 1
        [stores.s]
        strategy = "mermory"
        [limiters.a]
        store = "mian"
        algorithm = "sliding_windw"
        [limiters.b]
        limit = 0
        window_seconds = 60
        timout = 5
        [limiters.c]
        algorithm = "token_bucket"
        on_error = "ajar"
        [limiters.d]
        limit = "${NOT_SET_AT_ALL}"
        window_seconds = 60
        """,
    )
    write(fresh / "fastq.toml", "[limiters.b]\nmax_concurrent = 1\n")
    with pytest.raises(fastq.ConfigError) as raised:
        catalogue.default().find("a")
    text = str(raised.value)
    for expected in (
        "rate-sync.toml: unknown table 'limiter' - did you mean 'limiters'?",
        "[stores.s]: strategy='mermory' must be 'redis' or 'memory' - did you mean 'memory'?",
        "[limiters.a]: unknown algorithm 'sliding_windw' - did you mean 'sliding_window'?",
        "[limiters.a]: unknown store 'mian'",
        "[limiters.b]: unknown option 'timout' - did you mean 'timeout'?",
        "limit=0 must be a whole number",
        "[limiters.b]: defined in fastq.toml, too",
        "[limiters.c]: token_bucket needs rate_per_second",
        "[limiters.c]: on_error='ajar' must be 'open' or 'closed'",
        "NOT_SET_AT_ALL is not set",
    ):
        assert expected in text


def test_the_file_may_be_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(fresh / "elsewhere" / "rate-sync.toml", "[limiters.a]\nmax_concurrent = 1\n")
    write(fresh / "elsewhere" / "my.toml", "[limiters.b]\nmax_concurrent = 1\n")
    monkeypatch.setenv("FASTQ_LIMITS", str(fresh / "elsewhere"))
    assert catalogue.default().find("a").id == "a"
    monkeypatch.setattr(catalogue, "_default", catalogue.Catalogue(files=True))
    monkeypatch.setenv("FASTQ_LIMITS", str(fresh / "elsewhere" / "my.toml"))
    assert catalogue.default().find("b").id == "b"
    monkeypatch.setattr(catalogue, "_default", catalogue.Catalogue(files=True))
    monkeypatch.setenv("FASTQ_LIMITS", str(fresh / "nowhere.toml"))
    with pytest.raises(fastq.ConfigError, match="there is no such file"):
        catalogue.default().find("b")


async def test_an_unknown_limiter() -> None:
    fastq.configure_limiter("github_api", store="memory", rate="1/s")
    with pytest.raises(fastq.ConfigError, match="did you mean 'github_api'"):
        await fastq.get_or_clone_limiter("githup_api")


def test_an_applications_limiter_is_found_by_name() -> None:
    app = fastq.FastQ()
    limiter = app.limiter("stripe", rate="100/s")
    assert catalogue.default().find("stripe") is limiter
    assert app.limiter("stripe") is limiter
    assert app.limiter("stripe", rate="100/s") is limiter
    with pytest.raises(fastq.ConfigError, match="other options"):
        app.limiter("stripe", rate="200/s")
    fastq.configure_limiter("elsewhere", store="memory", max_concurrent=1)
    assert app.limiter("elsewhere").id == "elsewhere"


@pytest.mark.filterwarnings(
    "ignore:This process:DeprecationWarning"
)  # it has threads; the child only looks at its name
def test_a_forked_child_has_a_name_of_its_own() -> None:
    """Holders of two processes never share an id."""
    from fastq.limiter.stores import this_process

    fastq.configure_limiter("fork", store="memory", max_concurrent=1).sync.acquire()
    name = this_process().name
    read, written = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(written, this_process().name.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(written)
    with os.fdopen(read) as pipe:
        assert pipe.read() not in ("", name)
