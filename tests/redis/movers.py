"""Both movers with the same call, and what they say when they cannot do it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from fastq.broker.command import Command
from fastq.broker.command import raw as command
from fastq.broker.connection import AsyncConnection, SyncConnection
from fastq.broker.url import parse_url
from fastq.errors import FastQError

Run = Callable[[Coroutine[Any, Any, Any]], Any]
SECRET = "s3cret/@:#%"
QUOTED = "s3cret%2F%40%3A%23%25"


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def both(url: str, run: Run, **options: Any) -> list[Callable[[Command[Any]], Any]]:
    """The call of a new connection of each kind."""

    def asynchronous(cmd: Command[Any]) -> Any:
        async def once() -> Any:
            connection = AsyncConnection.to(parse_url(url), **options)
            try:
                return await connection.call(cmd)
            finally:
                await connection.close()

        return run(once())

    def synchronous(cmd: Command[Any]) -> Any:
        connection = SyncConnection.to(parse_url(url), **options)
        try:
            return connection.call(cmd)
        finally:
            connection.close()

    return [asynchronous, synchronous]


def refusal(url: str, run: Run, kind: type[FastQError], cmd: Command[Any] | None = None, **options: Any) -> str:
    """What both movers say: the same class, one line, no password. Returns the async one's message."""
    messages = []
    for call in both(url, run, **options):
        with pytest.raises(kind) as caught:
            call(cmd or command("PING"))
        assert type(caught.value) is kind
        messages.append(str(caught.value))
    for message in messages:
        assert "\n" not in message
        assert SECRET not in message
        assert QUOTED not in message
    return messages[0]
