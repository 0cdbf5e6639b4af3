"""rediss://: verified unless the URL says otherwise."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from fastq.broker.command import raw as command
from fastq.errors import BrokerUnavailable
from tests.conftest import MakeServer
from tests.nodes import SPEAK_TLS, tls_files
from tests.redis.movers import QUOTED, Run, both, closed_port, refusal


class TlsFront:
    """Speaks TLS to its clients and plain to the server: the embedded server of the wheel is built without TLS."""

    def __init__(self, socket_path: Path, certificate: Path) -> None:
        self._path = str(socket_path)
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certificate / "server.crt", certificate / "server.key")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self.port = int(self._listener.getsockname()[1])

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if not self._threads:
                client.close()
                return
            self._threads.append(threading.Thread(target=self._serve, args=(client,)))
            self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(10)
        with (
            contextlib.suppress(OSError),
            self._context.wrap_socket(client, server_side=True) as tls,
            socket.socket(socket.AF_UNIX) as plain,
        ):
            plain.connect(self._path)
            self._relay(tls, plain)

    def _relay(self, tls: ssl.SSLSocket, plain: socket.socket) -> None:
        while True:
            ready = [tls] if tls.pending() else select.select([tls, plain], [], [], 10)[0]
            for source, target in ((tls, plain), (plain, tls)):
                if source in ready:
                    data = source.recv(65_536)
                    if not data:
                        return
                    target.sendall(data)

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        threads, self._threads = self._threads, []
        socket.create_connection(("127.0.0.1", self.port)).close()  # wakes the accept
        for thread in threads:
            thread.join()
        self._listener.close()


@pytest.fixture(params=["front", *SPEAK_TLS])
def tls_port(request: pytest.FixtureRequest, make_server: MakeServer, certificate: Path) -> Iterator[int]:
    """Where TLS is spoken: by a front before the server, and by a server that can."""
    if request.param == "front":
        with TlsFront(make_server().socket_path, certificate) as front:
            yield front.port
        return
    port = closed_port()
    make_server(binary=request.param, config={"tls-port": str(port), **tls_files(certificate)})
    yield port


def test_tls(tls_port: int, certificate: Path, run: Run) -> None:
    url = f"rediss://127.0.0.1:{tls_port}?ssl_ca_certs={certificate}/server.crt"
    large = b"x" * 300_000
    assert [call(command("ECHO", large)) for call in both(url, run)] == [large, large]


def test_an_unknown_certificate_is_refused(tls_port: int, run: Run) -> None:
    """Verified, and with the password not yet sent."""
    url = f"rediss://:{QUOTED}@127.0.0.1:{tls_port}"
    message = refusal(url, run, BrokerUnavailable)
    assert "certificate verify failed" in message
    assert message.endswith("check that this port speaks TLS, and ssl_ca_certs")
    unverified = f"rediss://127.0.0.1:{tls_port}?ssl_cert_reqs=none"
    assert [call(command("PING")) for call in both(unverified, run)] == [b"PONG", b"PONG"]


def test_a_certificate_for_another_name_is_refused(tls_port: int, certificate: Path, run: Run) -> None:
    url = f"rediss://localhost:{tls_port}?ssl_ca_certs={certificate}/server.crt"
    assert "certificate verify failed" in refusal(url, run, BrokerUnavailable)
    unnamed = url + "&ssl_check_hostname=false"
    assert [call(command("PING")) for call in both(unnamed, run)] == [b"PONG", b"PONG"]


def test_tls_to_a_server_that_speaks_none(make_server: MakeServer, run: Run) -> None:
    server = make_server(port=0)
    said = refusal(f"rediss://:{QUOTED}@127.0.0.1:{server.port}", run, BrokerUnavailable, connect_timeout=1.0)
    assert said.endswith("check that this port speaks TLS, and ssl_ca_certs")


def test_no_tls_to_a_server_that_wants_it(tls_port: int, run: Run) -> None:
    refusal(f"redis://:{QUOTED}@127.0.0.1:{tls_port}", run, BrokerUnavailable, connect_timeout=1.0)
