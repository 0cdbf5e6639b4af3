"""What a connection is before its first command: which server it goes to, the first words, and what their failure means."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from typing import Any, cast

import hiredis

from fastq.broker.schema import known
from fastq.broker.url import Endpoint
from fastq.errors import BrokerError, BrokerOutOfMemory, BrokerReplyError, BrokerUnavailable, safe_text

__all__ = ["Clock", "check_handshake", "client_name", "error_of", "find_master", "last_words", "locate", "unreachable"]

_DOWN = ("LOADING", "BUSY", "MASTERDOWN", "MISCONF", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS")
MOVED_ON = ("READONLY", "UNBLOCKED")
_ELSEWHERE = ("MOVED", "ASK")
_NOT_SAID = (*_ELSEWHERE, "TRYAGAIN", "CLUSTERDOWN", "NOPERM")
"""Answers to the question for the version of the keys that say nothing of it: another node of a cluster knows, or nobody may ask."""


def error_of(reply: Exception, shown: str) -> BrokerError:
    """The error that a reply of Redis stands for."""
    text = safe_text(str(reply))
    code = text.partition(" ")[0]
    if code in _ELSEWHERE:
        if "+cluster://" in shown:
            return BrokerUnavailable(f"{shown} moves keys at the moment: {text}")
        return BrokerReplyError(f"{shown} is one node of a cluster ({text}): use redis+cluster://host:port")
    if code == "OOM":
        return BrokerOutOfMemory(f"{shown} has reached maxmemory and takes no new jobs: {text}")
    if code in _DOWN or code in MOVED_ON:
        error = BrokerUnavailable(f"{shown} does not serve at the moment: {text}")
        error.refused = True
        return error
    if code in ("NOAUTH", "WRONGPASS", "NOPERM"):
        return BrokerReplyError(f"{text} - check the user, password and permissions in {shown}")
    return BrokerReplyError(text)


def unreachable(endpoint: Endpoint, cause: object) -> BrokerUnavailable:
    """One line for a Redis that cannot be reached."""
    text = getattr(cause, "strerror", None) or str(cause).partition(" : <")[0] or type(cause).__name__
    if endpoint.sentinels and "unknown command" in text:
        return BrokerUnavailable(f"{endpoint.shown} names a server that is no Sentinel: use redis://host:port for it")
    return BrokerUnavailable(f"cannot reach {endpoint.shown} ({safe_text(text)}) - {_hint(endpoint, cause)}")


def _hint(endpoint: Endpoint, cause: object) -> str:
    if endpoint.tls and not isinstance(cause, ConnectionRefusedError):
        return "check that this port speaks TLS, and ssl_ca_certs"
    if endpoint.sentinels:
        return f"check that the Sentinels run and know a master {endpoint.master!r}"
    return "start one with 'fastq dev', or set FASTQ_REDIS_URL"


class Clock:
    """Redis's clock as this process knows it: an offset to the local monotonic clock, learnt at each connect."""

    __slots__ = ("_offset",)

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def learn(self, reply: Sequence[bytes]) -> None:
        """Take Redis's TIME reply as the present."""
        self._offset = int(reply[0]) + int(reply[1]) / 1e6 - time.monotonic()

    def now_ms(self) -> int:
        """Redis's time in ms, to within a round trip."""
        return int((self._offset + time.monotonic()) * 1_000)

    def now_us(self) -> int:
        """The same in µs."""
        return int((self._offset + time.monotonic()) * 1_000_000)


def check_handshake(endpoint: Endpoint, replies: Sequence[Any], clock: Clock) -> None:
    """Learn the clock, or raise what went wrong. A refused CLIENT SETNAME (ACL) is of no consequence.

    Raises:
        SchemaMismatch: the keys of ``endpoint.prefix`` have a version that this release does not know.
    """
    first = len(replies) - 2
    if endpoint.prefix:
        first -= 1
        _check_version(endpoint, replies[first])
    for reply in (*replies[:first], replies[-1]):
        if isinstance(reply, hiredis.ReplyError):
            error = error_of(reply, endpoint.shown)
            raise error if endpoint.shown in str(error) else BrokerReplyError(f"{error} - check {endpoint.shown}")
    clock.learn(replies[-1])


def _check_version(endpoint: Endpoint, found: Any) -> None:
    if isinstance(found, hiredis.ReplyError):
        if not str(found).startswith(_NOT_SAID):
            raise error_of(found, endpoint.shown)
    elif found is not None:
        known(found, endpoint.prefix)


def last_words(replies: Sequence[Any]) -> str:
    """What Redis said before it closed the connection (too many clients, protected mode), or nothing."""
    return next((str(reply) for reply in reversed(replies) if isinstance(reply, hiredis.ReplyError)), "")


def find_master(endpoint: Endpoint) -> Endpoint:
    """Ask the Sentinels for the master's address; an endpoint without Sentinels is its own answer. Blocks."""
    if not endpoint.sentinels:
        return endpoint
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
    from redis.retry import Retry
    from redis.sentinel import Sentinel

    # Each one is asked once: by default redis-py 8 tries ten times, with pauses, and a dead Sentinel costs 3 s or more.
    once = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0, "retry": cast(Any, Retry)(NoBackoff(), 0)}
    finder: Any = cast(Any, Sentinel)(list(endpoint.sentinels), sentinel_kwargs=once)
    try:
        host, port = finder.discover_master(endpoint.master)
    except (RedisError, OSError) as error:
        raise unreachable(endpoint, error) from None
    finally:
        for sentinel in finder.sentinels:
            sentinel.close()
    return endpoint._replace(host=host, port=port)


def locate(endpoint: Endpoint) -> Endpoint:
    """The server to connect to: the master that the Sentinels name, the first node of a cluster that listens. Blocks."""
    failure: OSError | None = None
    for host, port in endpoint.nodes:
        try:
            socket.create_connection((host, port), 1.0).close()
        except OSError as error:
            failure = error
            continue
        return endpoint._replace(host=host, port=port)
    if failure is not None:
        raise unreachable(endpoint, failure)
    return find_master(endpoint)


def client_name() -> str:
    """How CLIENT LIST shows this process."""
    return f"fastq:{os.getpid()}"
