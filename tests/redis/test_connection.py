"""The two movers: every reply reaches its caller or nobody, and what goes wrong is said in one line without a password."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import fastq
from fastq.broker import commands
from fastq.broker.command import Operation
from fastq.broker.command import raw as command
from fastq.broker.commands import NewJob
from fastq.broker.connection import AsyncConnection, SyncConnection
from fastq.broker.embedded import EmbeddedServer
from fastq.broker.greeting import Clock
from fastq.broker.url import parse_url
from fastq.errors import BrokerReplyError, BrokerUnavailable
from tests.chaos.proxy import FaultProxy
from tests.conftest import MakeServer, connect, eventually
from tests.redis.lab import Lab, envelope
from tests.redis.movers import QUOTED, Run, both, refusal

pytestmark = pytest.mark.one_server("one connection to one server; what a cluster's do is in test_cluster.py")

# -- each reply to its caller ---------------------------------------------------------------------------


def test_many_callers_share_one_connection_and_get_their_own_replies(redis_url: str, run: Run) -> None:
    async def main() -> None:
        connection = AsyncConnection(parse_url(redis_url))
        replies = await asyncio.gather(*(connection.call(command("ECHO", str(i))) for i in range(1_000)))
        assert replies == [str(i).encode() for i in range(1_000)]
        assert connection.connects == 1
        await connection.close()

    run(main())


def test_commands_leave_in_the_order_of_the_calls(redis_url: str, raw: Any, run: Run) -> None:
    async def main() -> None:
        connection = AsyncConnection(parse_url(redis_url))
        await connection.connect()
        await asyncio.gather(*(connection.call(command("RPUSH", "fastq:{q}:ready:5", i)) for i in range(300)))
        await connection.close()

    run(main())
    assert raw.lrange("fastq:{q}:ready:5", 0, -1) == [str(i).encode() for i in range(300)]


def test_a_cancelled_call_never_leaves_its_reply_to_another(redis_url: str, run: Run) -> None:
    """F-34, A-09 (CVE-2023-28858): 1,000 calls, a third cancelled while their reply is on the way."""

    async def main() -> None:
        connection = AsyncConnection(parse_url(redis_url))
        await connection.connect()
        values = {}
        cancelled = 0
        for start in range(0, 1_000, 20):
            calls = {
                i: asyncio.ensure_future(connection.call(command("ECHO", str(i)))) for i in range(start, start + 20)
            }
            await asyncio.sleep(0)  # all are written, none is answered
            for i, call in calls.items():
                if i % 3 == 0:
                    call.cancel()
            for i, call in calls.items():
                try:
                    values[i] = await call
                except asyncio.CancelledError:
                    cancelled += 1
        assert cancelled == 334
        assert values == {i: str(i).encode() for i in range(1_000) if i % 3}
        assert await connection.call(command("ECHO", "last")) == b"last"
        assert connection.connects == 1
        await connection.close()

    run(main())


def test_threads_share_a_blocking_connection(redis_url: str) -> None:
    connection = SyncConnection(parse_url(redis_url))
    wrong: list[object] = []

    def work(name: int) -> None:
        for i in range(200):
            said = f"{name}-{i}".encode()
            if (reply := connection.call(command("ECHO", said))) != said:
                wrong.append(reply)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert connection.connects == 1
    connection.close()


def test_an_interrupt_in_the_middle_of_a_call_leaves_no_reply_behind(redis_url: str) -> None:
    """Ctrl-C while a reply is due: the next call must not read it."""
    connection = SyncConnection(parse_url(redis_url))
    connection.connect()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            connection.call(command("BLPOP", "fastq:{q}:wake", 30))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert connection.call(command("ECHO", "mine")) == b"mine"
    assert connection.connects == 2
    connection.close()


def test_large_values_and_long_pipelines(redis_url: str, run: Run) -> None:
    large = os.urandom(3_000_000)

    async def main() -> None:
        connection = AsyncConnection(parse_url(redis_url))
        assert await connection.call(command("ECHO", large)) == large
        replies = await connection.call_many([command("ECHO", str(i)) for i in range(10_000)])
        assert replies == [str(i).encode() for i in range(10_000)]
        await connection.close()

    run(main())
    connection = SyncConnection(parse_url(redis_url))
    assert connection.call(command("ECHO", large)) == large
    assert connection.call_many([command("ECHO", str(i)) for i in range(10_000)]) == [
        str(i).encode() for i in range(10_000)
    ]
    connection.close()


# -- several commands, operations ---------------------------------------------------------------------


def test_the_first_error_of_several_is_raised_and_nothing_is_left_over(redis_url: str, raw: Any, run: Run) -> None:
    raw.set("fastq:{q}:paused", "text")
    asked = [command("ECHO", "1"), command("INCR", "fastq:{q}:paused"), command("LPUSH", "fastq:{q}:paused", "x")]

    async def main() -> None:
        connection = AsyncConnection(parse_url(redis_url))
        with pytest.raises(BrokerReplyError, match="not an integer"):
            await connection.call_many(asked)
        assert await connection.call(command("ECHO", "2")) == b"2"
        await connection.close()

    run(main())
    connection = SyncConnection(parse_url(redis_url))
    with pytest.raises(BrokerReplyError, match="not an integer"):
        connection.call_many(asked)
    assert connection.call(command("ECHO", "2")) == b"2"
    connection.close()


def steps() -> Operation[list[Any]]:
    """An operation with a decision, a list and an error."""
    first = yield command("ECHO", "1")
    several = yield [command("ECHO", first), command("ECHO", "3")]
    try:
        yield command("NONSENSE")
    except BrokerReplyError as error:
        return [first, several, error.code]
    return []


def test_an_operation_runs_the_same_on_both(redis_url: str, run: Run) -> None:
    expected = [b"1", [b"1", b"3"], "ERR"]

    async def main() -> None:
        connection = AsyncConnection(parse_url(redis_url))
        assert await connection.run(steps()) == expected
        await connection.close()

    run(main())
    connection = SyncConnection(parse_url(redis_url))
    assert connection.run(steps()) == expected
    connection.close()


# -- scripts that Redis does not know (F-25) --------------------------------------------------------------


def test_an_unknown_script_is_sent_by_its_text_once(redis_url: str, raw: Any, lab: Lab, run: Run) -> None:
    """F-25: after SCRIPT FLUSH, a failover or a restart."""

    async def main() -> None:
        connection = AsyncConnection(parse_url(redis_url))
        for i in range(20):
            raw.script_flush()
            jobs = [NewJob(f"a{i}", envelope())]
            await asyncio.gather(
                connection.call(commands.enqueue(lab.q, 5, "async", 2 * i + 1, jobs)),
                connection.call(commands.promote(lab.q)),
                connection.call(command("PING")),
            )
        await connection.close()

    run(main())
    for i in range(20):
        raw.script_flush()
        lab.enqueue(f"s{i}")
        raw.script_flush()
        lab.conn.call_many([commands.promote(lab.q), lab.enqueue_command(f"t{i}"), commands.promote(lab.q)])
    assert len(lab.ready()) == 60
    assert len(lab.jobs()) == 60


def test_a_known_script_is_sent_by_its_sha_only(redis_url: str, raw: Any, lab: Lab) -> None:
    lab.enqueue("a")
    before = raw.info("commandstats")
    lab.enqueue("b")
    after = raw.info("commandstats")
    assert after["cmdstat_evalsha"]["calls"] == before["cmdstat_evalsha"]["calls"] + 1
    assert after.get("cmdstat_eval") == before.get("cmdstat_eval")


# -- the connection is lost ---------------------------------------------------------------------------


def kill_clients(raw: Any) -> None:
    raw.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def test_pending_calls_learn_of_the_loss_and_the_next_one_connects_anew(redis_url: str, raw: Any, run: Run) -> None:
    async def main() -> None:
        connection = AsyncConnection(parse_url(redis_url))
        await connection.connect()
        calls = [asyncio.ensure_future(connection.call(command("BLPOP", "fastq:{q}:wake", 30))) for _ in range(3)]
        calls += [asyncio.ensure_future(connection.call(command("ECHO", "behind"))) for _ in range(3)]
        await asyncio.sleep(0)
        assert await asyncio.to_thread(eventually, lambda: raw.info("clients")["blocked_clients"] == 1)
        kill_clients(raw)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} == {BrokerUnavailable}
        assert not connection.connected
        assert await connection.call(command("ECHO", "again")) == b"again"
        assert connection.connects == 2
        await connection.close()

    run(main())


def test_a_blocking_connection_says_so_and_connects_anew(redis_url: str, raw: Any) -> None:
    connection = SyncConnection(parse_url(redis_url))
    connection.connect()
    kill_clients(raw)
    with pytest.raises(BrokerUnavailable):
        connection.call(command("ECHO", "lost"))
    assert connection.call(command("ECHO", "again")) == b"again"
    assert connection.connects == 2
    connection.close()


def test_nothing_is_repeated_by_itself(redis_server: EmbeddedServer, lab: Lab) -> None:
    """Finding 1 of the fault list: only the caller knows whether a command may run twice."""
    lab.enqueue("known", sequence=1)  # the proxy knows the script by its SHA-1, not by its text
    with FaultProxy(redis_server.url) as proxy:
        proxy.rule = lambda names: "drop"
        connection = SyncConnection(parse_url(proxy.url))
        for sequence in range(2, 52):
            with pytest.raises(BrokerUnavailable):
                connection.call(lab.enqueue_command(f"j{sequence}", sequence=sequence))
        assert proxy.dropped["enqueue"] == 50
        connection.close()
    assert len(lab.ready()) == 51


def test_many_callers_share_one_attempt_to_connect(redis_url: str, raw: Any, run: Run) -> None:
    async def main() -> None:
        before = [client["name"] for client in raw.client_list()].count(f"fastq:{os.getpid()}")  # of limiters, say
        connection = AsyncConnection(parse_url(redis_url))
        await asyncio.gather(*(connection.call(command("PING")) for _ in range(50)))
        names = [client["name"] for client in raw.client_list()]
        assert names.count(f"fastq:{os.getpid()}") == before + 1
        await connection.close()

    run(main())


def test_a_caller_that_goes_away_does_not_take_the_attempt_along(redis_url: str, run: Run) -> None:
    async def main() -> None:
        connection = AsyncConnection(parse_url(redis_url))
        first = asyncio.ensure_future(connection.call(command("ECHO", "1")))
        second = asyncio.ensure_future(connection.call(command("ECHO", "2")))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == b"2"
        with pytest.raises(asyncio.CancelledError):
            await first
        assert connection.connects == 1
        await connection.close()

    run(main())


def test_closing_while_connecting_is_told_to_those_who_wait(run: Run) -> None:
    """They were not cancelled, the connection was."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"

        async def main() -> None:
            connection = AsyncConnection(parse_url(url))
            calls = [asyncio.ensure_future(connection.call(command("PING"))) for _ in range(3)]
            await asyncio.sleep(0.01)
            await connection.close()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(result) for result in results] == [BrokerUnavailable] * 3
            assert "closed while connecting" in str(results[0])

        run(main())


def test_dropping_and_sending_without_a_connection(redis_url: str, run: Run) -> None:
    async def main() -> None:
        connection = AsyncConnection(parse_url(redis_url))
        with pytest.raises(BrokerUnavailable, match="not connected"):
            connection.send(command("PING"))
        connection.drop()
        await connection.connect()
        waiting = asyncio.ensure_future(connection.call(command("BLPOP", "fastq:{q}:wake", 30)))
        await asyncio.sleep(0)
        connection.drop("the test says so")
        assert not connection.connected
        with pytest.raises(BrokerUnavailable, match="the test says so"):
            await waiting
        await connection.connect()
        await connection.connect()
        assert connection.connects == 2
        await connection.close()

    run(main())


# -- silence (F-30) -----------------------------------------------------------------------------------


def test_a_half_open_connection_is_given_up_after_the_response_timeout(make_server: MakeServer, run: Run) -> None:
    """F-30: the peer is gone and nobody says so. The next call finds the way again."""
    server = make_server()
    with FaultProxy(server.url) as proxy:

        async def main() -> None:
            connection = AsyncConnection(parse_url(proxy.url), response_timeout=0.2)
            await connection.connect()
            assert proxy.silence() == 1
            started = time.monotonic()
            with pytest.raises(BrokerUnavailable, match=r"no reply within 0\.2 s"):
                await connection.call(command("PING"))
            assert time.monotonic() - started < 1
            assert await connection.call(command("ECHO", "x")) == b"x"
            await connection.close()

        run(main())
        connection = SyncConnection(parse_url(proxy.url), response_timeout=0.2)
        connection.connect()
        proxy.silence()
        with pytest.raises(BrokerUnavailable, match=r"no reply within 0\.2 s"):
            connection.call(command("PING"))
        assert connection.call(command("ECHO", "x")) == b"x"
        connection.close()


def test_a_reply_that_is_late_is_noticed_at_once(make_server: MakeServer, run: Run) -> None:
    """Not a quarter of the response timeout later: ``enqueue_timeout`` is one."""
    server = make_server()

    async def main() -> None:
        connection = AsyncConnection(parse_url(server.url), response_timeout=100)
        await connection.connect()
        server.pause()
        call = asyncio.ensure_future(connection.call(command("PING")))
        await asyncio.sleep(0)
        assert connection._wire is not None
        connection._wire.progress -= 99.8
        connection._check()  # 0.2 s are left
        with pytest.raises(BrokerUnavailable, match="no reply within 100 s"):
            await asyncio.wait_for(call, 10)
        server.resume()
        await connection.close()

    run(main())


def test_a_hung_server_that_wakes_up_gives_nobody_a_late_reply(make_server: MakeServer) -> None:
    server = make_server()
    connection = SyncConnection(parse_url(server.url), response_timeout=0.1, connect_timeout=2)
    connection.connect()
    server.pause()
    with pytest.raises(BrokerUnavailable, match="no reply within"):
        connection.call(command("ECHO", "late"))
    server.resume()
    assert connection.call(command("ECHO", "fresh")) == b"fresh"
    connection.close()


def test_replies_that_trickle_in_keep_the_connection(redis_url: str, raw: Any, run: Run) -> None:
    """The timeout is for silence: a long pipeline of slow commands is no silence."""

    async def main() -> None:
        connection = AsyncConnection(parse_url(redis_url), response_timeout=0.3)
        sleeps = [command("BLPOP", f"fastq:{{q}}:wake{i}", 0.1) for i in range(6)]
        assert await connection.call_many(sleeps) == [None] * 6
        assert connection.connects == 1
        await connection.close()

    run(main())


def test_a_blocked_event_loop_is_not_mistaken_for_a_dead_connection(redis_url: str, run: Run) -> None:
    """F-04: the reply has long been there when the loop comes back."""

    async def main() -> None:
        connection = AsyncConnection(parse_url(redis_url), response_timeout=0.1)
        await connection.connect()
        call = asyncio.ensure_future(connection.call(command("ECHO", "x")))
        await asyncio.sleep(0)
        time.sleep(0.4)
        assert await call == b"x"
        assert connection.connects == 1
        await connection.close()

    run(main())


def test_a_server_that_accepts_and_says_nothing(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://u:{QUOTED}@127.0.0.1:{silent.getsockname()[1]}"
        message = refusal(url, run, BrokerUnavailable, connect_timeout=0.1)
        assert "0.1 s" in message
        assert "fastq dev" in message


# -- tcp, unix, database, name, clock ---------------------------------------------------------------------


def test_tcp(make_server: MakeServer, run: Run) -> None:
    server = make_server(port=0)
    for host in ("127.0.0.1", "localhost"):
        url = f"redis://{host}:{server.port}/0"
        assert [call(command("ECHO", "x")) for call in both(url, run)] == [b"x", b"x"]


def test_the_database_of_the_url(redis_server: EmbeddedServer, redis_url: str, run: Run) -> None:
    url = f"unix://{redis_server.socket_path}?db=3"
    for n, call in enumerate(both(url, run)):
        call(command("SET", f"key{n}", "x"))
    with connect(url) as client:
        assert sorted(client.keys()) == [b"key0", b"key1"]
        client.flushdb()
    with connect(redis_url) as client:
        assert client.keys() == []


def test_client_list_shows_who_is_connected(redis_url: str, raw: Any) -> None:
    connection = SyncConnection(parse_url(redis_url))
    connection.connect()
    assert f"fastq:{os.getpid()}" in [client["name"] for client in raw.client_list()]
    connection.close()
    eventually(lambda: f"fastq:{os.getpid()}" not in [client["name"] for client in raw.client_list()])


def test_the_clock_is_redis_s(redis_url: str, lab: Lab, run: Run) -> None:
    """F-35: a host whose own clock is wrong writes right times."""
    clock = Clock()
    clock.learn([b"1000", b"500000"])
    assert 1_000_500 <= clock.now_ms() < 1_001_500
    assert clock.now_us() // 1_000 - clock.now_ms() <= 1
    connection = SyncConnection(parse_url(redis_url))
    connection.clock.learn([b"0", b"0"])
    before = lab.now()
    connection.connect()
    assert before - 1 <= connection.clock.now_ms() <= lab.now() + 1
    connection.close()


# -- fork -------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> bytes:
    """What `work` returns in a forked child, as text; the child ends at once, whatever happens."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, str(work()).encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return answer


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_a_connection_of_its_own(redis_url: str) -> None:
    """F-14: no shared socket; the parent's goes on."""
    connection = SyncConnection(parse_url(redis_url))
    mine = connection.call(command("CLIENT", "ID"))
    theirs = int(in_child(lambda: [connection.call(command("CLIENT", "ID")) for _ in range(3)][-1]))
    assert theirs != mine
    assert connection.call(command("CLIENT", "ID")) == mine
    assert connection.connects == 1
    connection.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_in_the_middle_of_a_call_is_not_locked_out(redis_url: str, raw: Any) -> None:
    """The lock was held by a thread that does not exist in the child."""
    connection = SyncConnection(parse_url(redis_url))
    connection.connect()
    thread = threading.Thread(target=connection.call, args=(command("BLPOP", "fastq:{q}:wake", 30),))
    thread.start()
    eventually(lambda: raw.info("clients")["blocked_clients"] == 1)
    assert in_child(lambda: connection.call(command("ECHO", "child"))) == b"b'child'"
    raw.rpush("fastq:{q}:wake", "1")
    thread.join()
    assert connection.call(command("ECHO", "parent")) == b"parent"
    connection.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_a_producer_of_its_own(redis_url: str, raw: Any) -> None:
    """With its parent's id and numbers, jobs of either would pass for repetitions of the other's."""
    app = fastq.FastQ(redis_url)

    @app.task
    def noop() -> None: ...

    async def enqueue() -> str:
        job = await noop.enqueue()
        await app.aclose()
        return job.id

    ids = [noop.enqueue_sync().id, asyncio.run(enqueue())]
    ids += [in_child(lambda: noop.enqueue_sync().id).decode() for _ in range(2)]
    ids += [in_child(lambda: asyncio.run(enqueue())).decode(), noop.enqueue_sync().id]
    assert raw.hlen("fastq:{default}:producers") == 5
    assert set(ids) <= {job.decode() for job in raw.hkeys("fastq:{default}:jobs")}
    app.close()
