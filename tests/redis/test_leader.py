"""app.leader: one leads, and it knows when it does not any more."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import fastq
from fastq.broker.keys import LeaseKeys
from fastq.lease import clock
from tests.chaos.proxy import FaultProxy
from tests.conftest import eventually, eventually_async
from tests.redis.test_limiter import application

KEYS = LeaseKeys("fastq", "leader", "report")


class Candidate:
    """One process of leader_user.py; ``lines`` are what it has said."""

    def __init__(self, url: str, ttl: float, *how: str) -> None:
        command = [sys.executable, "-m", "tests.redis.leader_user", url, "report", str(ttl), *how]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.lines: list[list[str]] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.split())

    @property
    def leads(self) -> int:
        """The token of the term that it believes to have."""
        lines = list(self.lines)
        return int(lines[-1][1]) if lines and lines[-1][0] == "lead" else 0

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        self.reader.join()
        self.process.stdout.close()  # type: ignore[union-attr]


@contextlib.contextmanager
def candidates(count: int, url: str, ttl: float, *how: str) -> Iterator[list[Candidate]]:
    everybody = [Candidate(url, ttl, *how) for _ in range(count)]
    try:
        yield everybody
    finally:
        for one in everybody:
            one.end()


def leader_of(everybody: list[Candidate], besides: Candidate | None = None) -> Candidate:
    found = eventually(lambda: [one for one in everybody if one is not besides and one.leads])
    return found[0]


@pytest.mark.parametrize("how", [(), ("sync",)], ids=["async", "sync"])
def test_after_a_kill_another_one_leads_within_the_ttl(redis_url: str, raw: Any, how: tuple[str, ...]) -> None:
    ttl = 2.0
    with candidates(3, redis_url, ttl, *how) as everybody:
        first = leader_of(everybody)
        term = first.leads
        assert [one for one in everybody if one.leads] == [first]
        first.process.kill()
        killed = time.monotonic()
        second = leader_of(everybody, besides=first)
        assert time.monotonic() - killed < ttl + 0.5
        assert second.leads > term


def test_one_that_was_stopped_beyond_the_ttl_knows_that_it_lost(redis_url: str, raw: Any) -> None:
    """SIGSTOP: no timer, no thread of it runs; the clock does. No two believe to lead at the same instant."""
    ttl = 0.6
    with candidates(3, redis_url, ttl) as everybody:
        terms = []
        for _ in range(4):
            leader = leader_of(everybody)
            terms.append(leader.leads)
            leader.process.send_signal(signal.SIGSTOP)
            terms.append(leader_of(everybody, besides=leader).leads)
            leader.process.send_signal(signal.SIGCONT)
            eventually(lambda stopped=leader, term=terms[-2]: stopped.leads != term)  # type: ignore[misc]
        for one in everybody:
            one.process.send_signal(signal.SIGINT)
        eventually(lambda: not any(one.leads for one in everybody))
        spans = [line for one in everybody for line in one.lines if line[0] == "lost"]
    believed = sorted((float(first), float(last), int(token)) for _, token, first, last in spans)
    assert len(believed) >= 5
    for (_, ended, token), (began, _, next_token) in itertools.pairwise(believed):
        assert ended < began
        assert token < next_token


async def test_what_is_lost_inside_the_block_cancels_it(redis_url: str, raw: Any) -> None:
    async with application(redis_url) as app:
        leader = app.leader("report", ttl=0.5)
        told: list[str] = []
        with pytest.raises(fastq.LeaseLost, match="leader 'report' was lost: somebody else has it"):
            async with leader as term:
                raw.hset(KEYS.lease, mapping={"owner": "somebody", "token": term.token + 1})
                try:
                    await asyncio.sleep(5)
                except asyncio.CancelledError:
                    told.append("cancelled")
                    raise
        assert told == ["cancelled"]
        assert term.lost
        assert term.left == 0
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        assert raw.hget(KEYS.lease, "owner") == b"somebody"


async def test_an_error_of_the_block_and_a_cancellation_from_outside_pass_through(redis_url: str) -> None:
    async with application(redis_url) as app:
        leader = app.leader("report", ttl=2)
        with pytest.raises(KeyError):
            async with leader:
                raise KeyError("own")

        async def lead() -> None:
            async with leader:
                await asyncio.sleep(60)

        task = asyncio.create_task(lead())
        await eventually_async(lambda: _is_taken(leader))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await leader.try_acquire() is not None  # it was given up


async def _is_taken(lease: fastq.Lease) -> bool:
    term = await lease.try_acquire()
    if term is not None:
        await term.release()
    return term is None


async def test_giving_up_wakes_who_waits(redis_url: str, raw: Any) -> None:
    async with application(redis_url) as app:
        leader = app.leader("report", ttl=30)
        term = await leader.acquire()
        waiting = asyncio.create_task(leader.acquire(timeout=20))
        await eventually_async(lambda: any(c["cmd"] == "blpop" for c in raw.client_list()))
        await term.release()
        start = clock()
        second = await waiting
        assert clock() - start < 0.3
        assert second.token > term.token
        with pytest.raises(fastq.LeaseLost):
            term.check()
        await second.release()


async def test_timeouts(redis_url: str) -> None:
    async with application(redis_url) as app:
        leader = app.leader("report", ttl=30)
        async with leader as term:
            assert await leader.try_acquire() is None
            assert leader.sync.try_acquire() is None
            start = time.monotonic()
            with pytest.raises(TimeoutError, match=r"somebody else had it for all of 0\.3 s") as refused:
                await leader.acquire(timeout=0.3)
            assert isinstance(refused.value, fastq.LeaseTimeout)
            assert 0.3 <= time.monotonic() - start < 1.5
            assert 25 < term.left < 30
            assert not term.lost


async def test_a_waiter_that_was_cancelled_holds_nothing(redis_url: str, raw: Any) -> None:
    async with application(redis_url) as app:
        leader = app.leader("report", ttl=30)
        for delay in (0, 0.0002, 0.0005, 0.001, 0.002, 0.005):
            task = asyncio.create_task(leader.acquire())
            await asyncio.sleep(delay)
            task.cancel()
            try:
                await (await task).release()
            except asyncio.CancelledError:
                pass
            await eventually_async(lambda: raw.hget(KEYS.lease, "owner") is None)
        term = await leader.acquire()
        waiting = asyncio.create_task(leader.acquire())
        await eventually_async(lambda: any(c["cmd"] == "blpop" for c in raw.client_list()))
        waiting.cancel()
        await term.release()
        second = await leader.acquire(timeout=5)
        await second.release()


async def test_a_blocked_event_loop_does_not_lose_it(redis_url: str) -> None:
    async with application(redis_url) as app, app.leader("report", ttl=1.5) as term:
        time.sleep(3.5)  # the event loop is blocked, for two leases: what the test is about
        term.check()


def test_blocking_code(redis_url: str, raw: Any) -> None:
    app = fastq.FastQ(redis_url)
    leader = app.leader("report", ttl=0.5).sync
    with leader as term:
        assert leader.try_acquire() is None
        assert not term.wait_lost(timeout=1)  # twice the ttl
        term.check()
    assert term.lost
    assert term.wait_lost(timeout=0)
    with pytest.raises(fastq.LeaseLost), leader as term:
        raw.hset(KEYS.lease, "owner", "somebody")
        assert term.wait_lost(timeout=5)
    app.close()


def test_run_campaigns_again_after_a_loss(redis_url: str, raw: Any) -> None:
    app = fastq.FastQ(redis_url)
    tokens = []

    def work(term: fastq.SyncTerm) -> str:
        tokens.append(term.token)
        if len(tokens) < 3:
            raw.delete(KEYS.lease)
            term.wait_lost()
            term.check()
        return "done"

    assert app.leader("report", ttl=0.5).sync.run(work) == "done"
    assert tokens == sorted(set(tokens))
    assert len(tokens) == 3
    app.close()


async def test_lost_replies_change_nothing(redis_server: Any, redis_url: str, raw: Any) -> None:
    """The lease was taken, renewed, given up; the reply never came."""
    with FaultProxy(redis_server.url) as proxy:
        async with application(proxy.url) as app:
            leader = app.leader("report", ttl=1.0)
            await (await leader.acquire()).release()  # the script is known
            count = itertools.count()
            proxy.rule = lambda names: "drop" if "lease" in names and next(count) % 2 == 0 else "pass"
            term = await leader.acquire(timeout=5)
            end = clock() + 2.5
            while clock() < end:
                term.check()
                await asyncio.sleep(0.01)
            assert proxy.dropped["lease"] >= 3
            proxy.rule = lambda names: "pass"
            await term.release()
            assert raw.hget(KEYS.lease, "owner") is None


async def test_redis_away_for_longer_than_the_ttl_loses_it_in_time(make_server: Any) -> None:
    server = make_server()
    async with application(server.url) as app:
        async with app.leader("other", ttl=5):
            pass
        leader = app.leader("report", ttl=1.0)
        term = await leader.acquire()
        os.kill(server.pid, signal.SIGSTOP)
        try:
            start = clock()
            await asyncio.wait_for(term.wait_lost(), 5)
            assert clock() - start < 1.0
            assert term.lost
            with pytest.raises(fastq.LeaseLost, match="could not be renewed: no answer in time"):
                term.check()
        finally:
            os.kill(server.pid, signal.SIGCONT)
        again = await leader.acquire(timeout=10)
        assert again.token > term.token
        await again.release()


def test_a_forked_child_holds_nothing(redis_url: str, raw: Any) -> None:
    app = fastq.FastQ(redis_url)
    term = app.leader("report", ttl=5).sync.acquire()
    pid = os.fork()
    if not pid:
        os._exit(0 if term.lost else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not term.lost
    term.release()
    app.close()


def test_the_end_of_the_process_gives_it_up(redis_url: str, raw: Any) -> None:
    script = (
        "import sys, fastq\n"
        "term = fastq.FastQ(sys.argv[1]).leader('report', ttl=60).sync.acquire()\n"
        "assert not term.lost"
    )
    subprocess.run([sys.executable, "-c", script, redis_url], check=True, timeout=30)
    assert raw.hget(KEYS.lease, "token") is not None
    assert raw.hget(KEYS.lease, "owner") is None


@pytest.mark.parametrize("ttl", [0, 0.4, 100_000, True, "1"])
def test_a_ttl_that_cannot_be_kept_is_refused(redis_url: str, ttl: Any) -> None:
    with pytest.raises(fastq.ConfigError, match="ttl="):
        fastq.FastQ(redis_url).leader("report", ttl=ttl)


def test_the_owner_says_where_it_is(redis_url: str, raw: Any) -> None:
    app = fastq.FastQ(redis_url)
    with app.leader("report").sync:
        assert f".{os.getpid()}.".encode() in raw.hget(KEYS.lease, "owner")
    assert raw.ttl(KEYS.lease) > 0
    app.close()
