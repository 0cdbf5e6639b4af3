"""redis+sentinel://: the master is asked for at each connect."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastq.broker.command import raw as command
from fastq.broker.connection import SyncConnection
from fastq.broker.doctor import examine
from fastq.broker.embedded import EmbeddedServer, find_server
from fastq.broker.greeting import find_master
from fastq.broker.url import parse_url
from fastq.errors import BrokerUnavailable
from tests.conftest import MakeServer, connect, eventually
from tests.redis.movers import QUOTED, Run, both, closed_port, refusal


@pytest.fixture
def sentinel(make_server: MakeServer, tmp_path: Path) -> Iterator[tuple[int, EmbeddedServer]]:
    """A Sentinel that watches one master called `main`: its port, and the master."""
    master, port = make_server(port=0), closed_port()
    (tmp_path / "sentinel.conf").write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nsentinel monitor main 127.0.0.1 {master.port} 1\n"
    )
    process = subprocess.Popen(
        [str(find_server()), str(tmp_path / "sentinel.conf"), "--sentinel"], stdout=subprocess.DEVNULL
    )
    try:
        with connect(f"redis://127.0.0.1:{port}") as client:
            eventually(lambda: answers(client))
        yield port, master
    finally:
        process.kill()
        process.wait()


def answers(client: Any) -> bool:
    from redis.exceptions import ConnectionError as RedisConnectionError

    try:
        return bool(client.ping())
    except RedisConnectionError:
        return False


def test_the_master_is_asked_for(sentinel: tuple[int, EmbeddedServer], run: Run) -> None:
    """F-28: a Sentinel that is down is passed over."""
    port, master = sentinel
    url = f"redis+sentinel://127.0.0.1:{closed_port()},127.0.0.1:{port}/main/2"
    found = find_master(parse_url(url))
    assert (found.host, found.port, found.db) == ("127.0.0.1", master.port, 2)
    for n, call in enumerate(both(url, run)):
        call(command("SET", f"key{n}", "x"))
    with connect(f"redis://127.0.0.1:{master.port}/2") as client:
        assert client.dbsize() == 2


def test_the_doctor_counts_those_that_stand_by(sentinel: tuple[int, EmbeddedServer], make_server: MakeServer) -> None:
    """Without a replica a Sentinel watches its master die."""
    port, master = sentinel
    endpoint = parse_url(f"redis+sentinel://127.0.0.1:{port}/main")
    connection = SyncConnection.to(endpoint)

    def replicas() -> tuple[str, str]:
        found = {finding.name: finding for finding in connection.run(examine("fastq", endpoint))}["replicas"]
        return found.level, found.message

    assert replicas()[0] == "warn"
    assert "nobody to turn to" in replicas()[1]
    make_server(config={"replicaof": f"127.0.0.1 {master.port}"})
    eventually(lambda: replicas() == ("ok", "1 connected"), 30)
    connection.close()


def test_a_master_that_the_sentinels_do_not_know(sentinel: tuple[int, EmbeddedServer], run: Run) -> None:
    url = f"redis+sentinel://:{QUOTED}@127.0.0.1:{sentinel[0]}/other"
    assert "other" in refusal(url, run, BrokerUnavailable)


def test_a_server_that_is_no_sentinel_is_told(sentinel: tuple[int, EmbeddedServer], run: Run) -> None:
    url = f"redis+sentinel://127.0.0.1:{sentinel[1].port}/main"
    assert "names a server that is no Sentinel: use redis://" in refusal(url, run, BrokerUnavailable)
