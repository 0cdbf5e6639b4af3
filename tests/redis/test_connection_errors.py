"""What goes wrong with a connection is said in one line: where, why, what to do, and never a password."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path
from typing import Any

import hiredis
import pytest

import fastq
from fastq.broker import commands
from fastq.broker import connection as connection_module
from fastq.broker.command import raw as command
from fastq.broker.commands import NewJob
from fastq.broker.connection import AsyncConnection, SyncConnection
from fastq.broker.embedded import EmbeddedServer
from fastq.broker.greeting import error_of
from fastq.broker.keys import QueueKeys
from fastq.broker.url import parse_url
from fastq.errors import BrokerError, BrokerOutOfMemory, BrokerReplyError, BrokerUnavailable, ConfigError
from tests.chaos.proxy import FaultProxy
from tests.conftest import MakeServer, connect, eventually
from tests.redis.lab import envelope
from tests.redis.movers import QUOTED, SECRET, Run, both, closed_port, refusal

pytestmark = pytest.mark.one_server("what one server says; what a cluster says is in test_cluster.py")


def test_nobody_listens(run: Run, tmp_path: Path) -> None:
    """One line: where, why, what to do."""
    port = closed_port()
    for url, shown in (
        (f"redis://app:{QUOTED}@127.0.0.1:{port}/3", f"redis://app:***@127.0.0.1:{port}/3"),
        (f"rediss://:{QUOTED}@127.0.0.1:{port}", f"rediss://:***@127.0.0.1:{port}"),
        (f"redis://:{QUOTED}@localhost:{port}", f"redis://:***@localhost:{port}"),
        (f"unix://:{QUOTED}@{tmp_path}/none.sock", f"unix://:***@{tmp_path}/none.sock"),
        (f"redis://:{QUOTED}@no-such-host.invalid", "redis://:***@no-such-host.invalid"),
        (f"redis+sentinel://:{QUOTED}@127.0.0.1:{port}/main", f"redis+sentinel://:***@127.0.0.1:{port}/main"),
        (f"unix:///{'x' * 200}", f"unix:///{'x' * 200}"),
    ):
        message = refusal(url, run, BrokerUnavailable)
        assert message.startswith(f"cannot reach {shown} (")
        hint = "start one with 'fastq dev', or set FASTQ_REDIS_URL"
        assert message.endswith("check that the Sentinels run and know a master 'main'" if "sentinel" in url else hint)


@pytest.mark.parametrize(
    ("greeting", "told"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "Protocol error"),
        (b"-DENIED Redis is running in protected mode because\r\n", "DENIED Redis is running in protected mode"),
        (b"-ERR max number of clients reached\r\n", "max number of clients reached"),
        (b"", "connection"),
    ],
)
def test_a_server_that_hangs_up(run: Run, greeting: bytes, told: str) -> None:
    """What it said before is the reason, not that it hung up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                client, _ = listener.accept()
                client.recv(65_536)
                client.sendall(greeting)
                client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"redis://:{QUOTED}@127.0.0.1:{listener.getsockname()[1]}"
        assert told.lower() in refusal(url, run, BrokerUnavailable).lower()
        thread.join()


def test_a_server_that_hangs_up_before_it_was_asked(run: Run) -> None:
    """Protected mode: the word is there before the handshake has been written."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                client, _ = listener.accept()
                client.sendall(b"-DENIED Redis is running in protected mode\r\n")
                client.shutdown(socket.SHUT_WR)
                client.recv(65_536)
                client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"redis://:{QUOTED}@127.0.0.1:{listener.getsockname()[1]}"
        assert "DENIED Redis is running in protected mode" in refusal(url, run, BrokerUnavailable)
        thread.join()


def test_a_server_that_hangs_up_right_after_the_handshake(run: Run) -> None:
    """The loss falls between the last reply and the caller's turn: the next call must still connect anew."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for farewell in (True, False):
                client, _ = listener.accept()
                client.recv(65_536)
                client.sendall(b"+OK\r\n*2\r\n$1\r\n1\r\n$1\r\n1\r\n")
                if not farewell:
                    client.recv(65_536)
                    client.sendall(b"+PONG\r\n")
                client.close()

        thread = threading.Thread(target=serve)
        thread.start()

        async def main() -> None:
            connection = AsyncConnection(parse_url(f"redis://127.0.0.1:{listener.getsockname()[1]}"))
            with pytest.raises(BrokerUnavailable):
                await connection.call(command("PING"))
            assert await connection.call(command("PING")) == b"PONG"
            await connection.close()

        run(main())
        thread.join()


def test_a_reply_to_nothing_ends_a_blocking_connection() -> None:
    """Whose it is nobody knows: the next call must not take it for its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for surplus in (b"+WHO ASKED\r\n", b""):
                client, _ = listener.accept()
                client.recv(65_536)
                client.sendall(b"+OK\r\n*2\r\n$1\r\n1\r\n$1\r\n1\r\n")
                client.recv(65_536)
                client.sendall(b"+PONG\r\n" + surplus)
                client.recv(65_536)
                client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        connection = SyncConnection(parse_url(f"redis://127.0.0.1:{listener.getsockname()[1]}"))
        with pytest.raises(BrokerUnavailable, match="a reply to nothing"):
            connection.call(command("PING"))
        assert connection.call(command("PING")) == b"PONG"
        connection.close()
        thread.join()


def test_a_thread_waits_for_the_handshake_of_another() -> None:
    """Whoever asks for a connection finds it greeted, with Redis's clock: not only a socket that is open."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = SyncConnection(parse_url(f"redis://127.0.0.1:{listener.getsockname()[1]}"))
        seen: list[int] = []

        def ask() -> None:
            connection.connect()
            seen.append(connection.connects)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        client, _ = listener.accept()
        client.recv(65_536)
        threads[1].start()
        threads[1].join(0.05)
        assert seen == []
        client.sendall(b"+OK\r\n*2\r\n$1\r\n1\r\n$1\r\n1\r\n")
        for thread in threads:
            thread.join()
        assert seen == [1, 1]
        connection.close()
        client.close()


@pytest.mark.parametrize("greeted", [False, True])
def test_a_blocking_call_ends_when_its_connection_is_closed(greeted: bool) -> None:
    """By another thread, in the middle of the handshake or of a call; the next call connects anew."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = SyncConnection(parse_url(f"redis://127.0.0.1:{listener.getsockname()[1]}"), connect_timeout=60.0)
        told: list[str] = []

        def ask() -> None:
            with pytest.raises(BrokerUnavailable) as caught:
                connection.call(command("PING"))
            told.append(str(caught.value))

        def greet() -> socket.socket:
            client, _ = listener.accept()
            client.recv(65_536)
            client.sendall(b"+OK\r\n*2\r\n$1\r\n1\r\n$1\r\n1\r\n")
            assert client.recv(65_536).endswith(b"PING\r\n")
            return client

        thread = threading.Thread(target=ask)
        thread.start()
        first = greet() if greeted else listener.accept()[0]
        assert greeted or first.recv(65_536)
        connection.close()
        thread.join(5)
        assert told
        second: list[Any] = []
        thread = threading.Thread(target=lambda: second.append(connection.call(command("PING"))))
        thread.start()
        client = greet()
        client.sendall(b"+PONG\r\n")
        thread.join()
        assert second == [b"PONG"]
        connection.close()
        first.close()
        client.close()


def test_closing_at_the_end_of_a_handshake(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, between Redis's answer and the next step: the caller hears of it as of any lost connection."""
    connection, check = SyncConnection(parse_url(redis_url)), connection_module.check_handshake

    def closing(*words: Any) -> None:
        check(*words)
        connection.close()

    with monkeypatch.context() as patch:
        patch.setattr(connection_module, "check_handshake", closing)
        with pytest.raises(BrokerUnavailable, match="closed meanwhile"):
            connection.call(command("PING"))
    assert connection.call(command("PING")) == b"PONG"
    connection.close()


def test_a_server_with_too_many_clients(make_server: MakeServer, run: Run) -> None:
    server = make_server(config={"maxclients": "1"})
    holder = SyncConnection(parse_url(server.url))
    holder.connect()
    refusal(server.url, run, BrokerUnavailable)  # on a unix socket its word may be lost: writing fails before reading
    assert holder.call(command("PING")) == b"PONG"
    holder.close()


def test_a_certificate_file_that_is_not_there(run: Run, make_server: MakeServer) -> None:
    server = make_server(port=0)
    url = f"rediss://:{QUOTED}@127.0.0.1:{server.port}?ssl_ca_certs=/none.pem"
    assert "TLS files" in refusal(url, run, ConfigError)


# -- passwords ------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(make_server: MakeServer) -> EmbeddedServer:
    return make_server(config={"requirepass": SECRET})


def test_the_right_password_in_any_characters(guarded: EmbeddedServer, run: Run) -> None:
    for url in (guarded.url, guarded.url.replace("unix://:", "unix://default:")):
        assert [call(command("PING")) for call in both(url, run)] == [b"PONG", b"PONG"]


def test_no_password(guarded: EmbeddedServer, run: Run) -> None:
    message = refusal(f"unix://{guarded.socket_path}", run, BrokerReplyError)
    assert message.startswith("NOAUTH ")
    assert f"unix://{guarded.socket_path}" in message


def test_a_wrong_password(guarded: EmbeddedServer, run: Run) -> None:
    for login in ("", "default", "nobody"):
        message = refusal(f"unix://{login}:wr%4Fng@{guarded.socket_path}", run, BrokerReplyError)
        assert message.startswith("WRONGPASS ")
        assert f"unix://{login}:***@" in message
        assert "wr" not in message.lower().replace("wrongpass", "")


def test_a_password_for_a_server_that_wants_none(redis_server: EmbeddedServer, redis_url: str, run: Run) -> None:
    message = refusal(f"unix://:{QUOTED}@{redis_server.socket_path}", run, BrokerReplyError)
    assert message.startswith("ERR AUTH")
    assert "unix://:***@" in message


def test_a_user_with_few_rights(make_server: MakeServer, run: Run) -> None:
    """An ACL that forbids CLIENT SETNAME is of no consequence; one that forbids the command is told."""
    server = make_server()
    server.ask(b"ACL", b"SETUSER", b"app", b"on", b">" + SECRET.encode(), b"~*", b"+@all", b"-client", b"-lpush")
    url = f"unix://app:{QUOTED}@{server.socket_path}"
    assert [call(command("PING")) for call in both(url, run)] == [b"PONG", b"PONG"]
    message = refusal(url, run, BrokerReplyError, command("LPUSH", "x", "y"))
    assert message.startswith("NOPERM ")
    assert "permissions" in message


def test_a_database_that_is_not_there(redis_server: EmbeddedServer, redis_url: str, run: Run) -> None:
    message = refusal(f"unix://{redis_server.socket_path}?db=999", run, BrokerReplyError)
    assert "out of range" in message
    assert "db=999" in message


# -- what kind of error ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("LOADING Redis is loading the dataset in memory", BrokerUnavailable),
        ("BUSY Redis is busy running a script", BrokerUnavailable),
        ("MASTERDOWN Link with MASTER is down", BrokerUnavailable),
        ("MISCONF Redis is configured to save RDB snapshots", BrokerUnavailable),
        ("CLUSTERDOWN The cluster is down", BrokerUnavailable),
        ("TRYAGAIN Multiple keys request during rehashing of slot", BrokerUnavailable),
        ("NOREPLICAS Not enough good replicas to write.", BrokerUnavailable),
        ("READONLY You can't write against a read only replica.", BrokerUnavailable),
        ("UNBLOCKED force unblock from blocking operation", BrokerUnavailable),
        ("OOM command not allowed when used memory > 'maxmemory'.", BrokerOutOfMemory),
        ("NOAUTH Authentication required.", BrokerReplyError),
        ("WRONGTYPE Operation against a key", BrokerReplyError),
        ("BUSYGROUP Consumer Group name already exists", BrokerReplyError),
        ("ERR unknown command", BrokerReplyError),
        ("", BrokerReplyError),
        ("ERR \x1b[31m\nforged line", BrokerReplyError),
    ],
)
def test_the_class_of_an_error(reply: str, kind: type[BrokerError]) -> None:
    """Each word that means "later" is BrokerUnavailable; what Redis says ends up on one printable line."""
    error = error_of(hiredis.ReplyError(reply), "redis://db")
    assert type(error) is kind
    assert str(error).isprintable()
    if isinstance(error, BrokerReplyError):
        assert error.code == reply.partition(" ")[0]


def test_a_wrong_type_is_a_reply_error_and_the_connection_stays(redis_url: str, raw: Any, run: Run) -> None:
    raw.set("fastq:{q}:paused", "1")
    message = refusal(redis_url, run, BrokerReplyError, command("LPUSH", "fastq:{q}:paused", "x"))
    assert message.startswith("WRONGTYPE ")
    connection = SyncConnection(parse_url(redis_url))
    for _ in range(2):
        with pytest.raises(BrokerReplyError):
            connection.call(command("LPUSH", "fastq:{q}:paused", "x"))
    assert connection.connects == 1
    connection.close()


def test_a_demoted_master_is_left(make_server: MakeServer, run: Run) -> None:
    """F-22: READONLY drops the connection, so that the next call asks again who leads."""
    server = make_server()
    server.ask(b"REPLICAOF", b"127.0.0.1", str(closed_port()).encode())

    async def main() -> None:
        connection = AsyncConnection(parse_url(server.url))
        with pytest.raises(BrokerUnavailable, match="READONLY"):
            await connection.call(command("SET", "x", "y"))
        assert await connection.call(command("GET", "x")) is None
        assert connection.connects == 2
        await connection.close()

    run(main())
    connection = SyncConnection(parse_url(server.url))
    with pytest.raises(BrokerUnavailable, match="READONLY"):
        connection.call(command("SET", "x", "y"))
    assert connection.call(command("GET", "x")) is None
    assert connection.connects == 2
    connection.close()


def test_every_script_is_refused_by_a_replica(make_server: MakeServer) -> None:
    """A script writes: none of them runs half on a replica."""
    server = make_server()
    server.ask(b"REPLICAOF", b"127.0.0.1", str(closed_port()).encode())
    q, connection = QueueKeys("fastq", "q"), SyncConnection(parse_url(server.url))
    for cmd in (
        commands.enqueue(q, 5, "p", 1, [NewJob("a", envelope())]),
        commands.reserve(q, "w", 1),
        commands.settle(q, "w", commands.Batch(), 1),
        commands.promote(q),
    ):
        with pytest.raises(BrokerUnavailable, match="READONLY"):
            connection.call(cmd)
    connection.close()


def test_a_replica_without_its_master(make_server: MakeServer, run: Run) -> None:
    server = make_server(config={"replica-serve-stale-data": "no"})
    server.ask(b"REPLICAOF", b"127.0.0.1", str(closed_port()).encode())
    assert "MASTERDOWN" in refusal(server.url, run, BrokerUnavailable, command("GET", "x"))


def test_a_server_that_is_loading(make_server: MakeServer, run: Run, tmp_path: Path) -> None:
    """F-20: like "down", and over by itself."""
    server = make_server(appendonly=True, data_dir=tmp_path / "data")
    with connect(server.url) as client:
        pipe = client.pipeline(transaction=False)
        for i in range(20_000):
            pipe.rpush(f"key{i}", "x")
        pipe.execute()
    server.shutdown()
    server._config |= {"key-load-delay": "50"}  # µs per key: 1 s in all; Redis listens after each 1,024 keys
    starter = threading.Thread(target=server.start)
    starter.start()
    try:
        message = eventually(lambda: loading_message(server))
        assert "does not serve at the moment" in message
        refusal(server.url, run, BrokerUnavailable)
    finally:
        starter.join()
    assert [call(command("LLEN", "key1")) for call in both(server.url, run)] == [1, 1]


def loading_message(server: EmbeddedServer) -> str:
    """The handshake is allowed while loading; the first command is not."""
    connection = SyncConnection(parse_url(server.url))
    try:
        connection.call(command("LLEN", "key1"))
    except BrokerUnavailable as error:
        return str(error) if "LOADING" in str(error) else ""
    finally:
        connection.close()
    raise RuntimeError("the server was ready before it was seen loading")


def test_a_server_that_is_busy_with_a_script(make_server: MakeServer, run: Run) -> None:
    """F-21."""
    server = make_server(config={"lua-time-limit": "10"})
    hog = socket.socket(socket.AF_UNIX)
    hog.connect(str(server.socket_path))
    hog.sendall(hiredis.pack_command(("EVAL", "while true do end", 0)))
    eventually(lambda: server.ask(b"PING").startswith(b"-BUSY"))
    assert "BUSY" in refusal(server.url, run, BrokerUnavailable)
    assert server.ask(b"SCRIPT", b"KILL") == b"+OK\r\n"
    eventually(lambda: server.ask(b"PING") == b"+PONG\r\n")
    assert [call(command("PING")) for call in both(server.url, run)] == [b"PONG", b"PONG"]
    hog.close()


# -- what a producer is told --------------------------------------------------------------------------


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_producer_is_told_whether_its_job_may_be_stored(make_server: MakeServer, *, blocking: bool) -> None:
    """Every answer was a refusal: then nothing was stored. A reply that was lost leaves it open, whatever came later."""
    server = make_server()
    with connect(server.url) as raw, FaultProxy(server.url) as proxy:
        app = fastq.FastQ(proxy.url, enqueue_timeout=0.3)

        async def put() -> None:
            await (asyncio.to_thread(app.enqueue_sync, "task") if blocking else app.enqueue("task"))

        def lose_then_refuse(names: list[str]) -> str:
            if not proxy.dropped:
                return "drop" if "enqueue" in names else "pass"
            raw.config_set("min-replicas-to-write", 1)
            return "pass"

        raw.config_set("min-replicas-to-write", 1)
        with pytest.raises(BrokerUnavailable, match=r"NOREPLICAS.+; gave up after 0.3 s: nothing was stored"):
            await put()
        raw.config_set("min-replicas-to-write", 0)
        await put()
        proxy.rule = lose_then_refuse
        with pytest.raises(
            BrokerUnavailable, match=r"NOREPLICAS.+; gave up after 0.3 s: the job may or may not have been stored"
        ):
            await put()
        assert raw.hlen("fastq:{default}:jobs") == 2, "it was"
        await app.aclose()
        app.close()
