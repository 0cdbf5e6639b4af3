"""Several servers as one: a Redis Cluster, and a master with replicas watched by Sentinels. All are processes of this host.

They are looked at through redis-py's plain client, one node at a time, so that nothing here shares code with what is tested.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fastq.broker.embedded import EmbeddedServer, find_server
from fastq.broker.url import parse_url
from tests.conftest import connect, eventually

if TYPE_CHECKING:
    from tests.chaos.proxy import FaultProxy

SLOTS = 16_384
PATIENCE = 30.0  # seconds for servers to find each other, or to elect one of them


# The wheel's Valkey is built without TLS, a distribution's Redis with it.
SPEAK_TLS = [path for path in [shutil.which("redis-server")] if path]


def tls_files(certificate: Path) -> dict[str, str]:
    """The directives of a server that speaks TLS; ``certificate``: the folder of the fixture of this name."""
    files = {"tls-cert-file": "server.crt", "tls-key-file": "server.key", "tls-ca-cert-file": "server.crt"}
    return {name: str(certificate / file) for name, file in files.items()} | {"tls-auth-clients": "no"}


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class Cluster:
    """``masters`` nodes that share the slots, each with ``replicas`` of its own; up within some two seconds.

    ``node_timeout``: seconds after which a silent node counts as failed. ``tls``: a certificate's folder; nodes talk TLS among
    each other then, and with whoever uses ``tls_url``.
    """

    def __init__(
        self,
        masters: int = 3,
        replicas: int = 0,
        node_timeout: float = 15.0,
        *,
        binary: str | None = None,
        tls: Path | None = None,
        **config: str,
    ) -> None:
        count = masters * (1 + replicas)
        ports = free_ports(2 * count)
        self._tls = tls
        self._tls_ports = free_ports(count) if tls is not None else []
        secure = {"tls-cluster": "yes", "tls-replication": "yes", **tls_files(tls)} if tls is not None else {}
        self._masters = masters
        self.servers = [
            EmbeddedServer(
                port=port,
                binary=binary,
                config={
                    "cluster-enabled": "yes",
                    "cluster-port": str(bus),
                    "cluster-node-timeout": str(round(node_timeout * 1_000)),
                    "cluster-replica-validity-factor": "0",
                    "repl-diskless-sync-delay": "0",
                    "enable-debug-command": "yes",
                    **secure,
                    **({"tls-port": str(tls_port)} if tls_port else {}),
                    **config,
                },
            )
            for port, bus, tls_port in itertools.zip_longest(ports[::2], ports[1::2], self._tls_ports, fillvalue=0)
        ]
        self._buses = ports[1::2]
        self._stack = contextlib.ExitStack()
        self._clients: dict[int, Any] = {}

    # -- its life -------------------------------------------------------------------------------

    def start(self) -> Self:
        for server in self.servers:
            self._stack.callback(server.stop)
            server.start()
        self._lay_wires()
        for number, server in enumerate(self.servers):
            self.at(server).execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        share = SLOTS // self._masters + 1
        for number, server in enumerate(self.servers[: self._masters]):
            last = min((number + 1) * share, SLOTS) - 1
            self.at(server).execute_command("CLUSTER", "ADDSLOTSRANGE", number * share, last)
        first = self.at(self.servers[0])
        for server in self.servers[1:]:
            first.execute_command("CLUSTER", "MEET", "127.0.0.1", self._seen_port(server), self._seen_bus(server))
        for server in self.servers:
            eventually(lambda server=server: self._knows_all(server), PATIENCE)  # type: ignore[misc]
        for number, server in enumerate(self.servers[self._masters :]):
            self.at(server).execute_command("CLUSTER", "REPLICATE", self.id_of(self.servers[number % self._masters]))
        self.until_whole()
        return self

    def _lay_wires(self) -> None:
        """What is between the nodes, before they meet: nothing."""

    def stop(self) -> None:
        for client in self._clients.values():
            client.close()
        self._stack.close()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- what it is -----------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in self.servers) + "/"

    def _seen_port(self, server: EmbeddedServer) -> int:
        """Where the other nodes reach it."""
        return self._tls_ports[self.servers.index(server)] if self._tls_ports else server.port

    def _seen_bus(self, server: EmbeddedServer) -> int:
        return self._buses[self.servers.index(server)]

    @property
    def tls_url(self) -> str:
        """The same cluster over TLS; the certificate is verified."""
        nodes = ",".join(f"127.0.0.1:{port}" for port in self._tls_ports)
        return f"rediss+cluster://{nodes}/?ssl_ca_certs={self._tls}/server.crt"

    def at(self, server: EmbeddedServer) -> Any:
        """A plain client of one node: what is elsewhere is an error."""
        if server.port not in self._clients:
            self._clients[server.port] = connect(server.url)
        return self._clients[server.port]

    def id_of(self, server: EmbeddedServer) -> bytes:
        return bytes(self.at(server).execute_command("CLUSTER", "MYID"))

    def living(self) -> list[EmbeddedServer]:
        return [server for server in self.servers if server.running]

    def masters(self) -> list[EmbeddedServer]:
        """The living nodes that say they are masters."""
        return [server for server in self.living() if self.at(server).info("replication")["role"] == "master"]

    def owner(self, key: str | bytes, asked: EmbeddedServer | None = None) -> EmbeddedServer:
        """The node that owns a key's slot, as another one sees it."""
        client = self.at(asked or self.living()[0])
        slot = int(client.execute_command("CLUSTER", "KEYSLOT", key))
        for first, last, (_, port, *_), *_ in raw_slots(client):
            if first <= slot <= last:
                return next(server for server in self.servers if port in (server.port, self._seen_port(server)))
        raise AssertionError(f"nobody owns slot {slot}")

    def replica_of(self, master: EmbeddedServer) -> EmbeddedServer:
        return next(
            server
            for server in self.living()
            if (info := self.at(server).info("replication"))["role"] == "slave"
            and info["master_port"] in (master.port, self._seen_port(master))
        )

    def queue_on(self, server: EmbeddedServer, stem: str = "q") -> str:
        """The name of a queue whose keys are on this node."""
        return next(name for n in range(10_000) if self.owner(f"{{{(name := f'{stem}{n}')}}}") is server)

    def until_whole(self) -> None:
        """Every living node says that all slots are served, and replicas follow."""
        for server in self.living():
            eventually(lambda server=server: self._whole(server), PATIENCE)  # type: ignore[misc]

    def _knows_all(self, server: EmbeddedServer) -> bool:
        info = self.at(server).execute_command("CLUSTER", "INFO")
        text = info if isinstance(info, dict) else dict(row.split(":") for row in info.decode().split())
        return text["cluster_state"] == "ok" and int(text["cluster_known_nodes"]) == len(self.servers)

    def _whole(self, server: EmbeddedServer) -> bool:
        about = self.at(server).info("replication")
        follows = about["role"] == "master" or about["master_link_status"] == "up"
        info = self.at(server).execute_command("CLUSTER", "INFO")
        text = info if isinstance(info, dict) else dict(row.split(":") for row in info.decode().split())
        return follows and text["cluster_state"] == "ok"

    def scan(self) -> Iterator[tuple[Any, bytes]]:
        """Every key, and a client of the node that has it."""
        for server in self.masters():
            for key in self.at(server).scan_iter(count=1000):
                yield self.at(server), key

    def flush(self) -> None:
        for server in self.masters():
            self.at(server).flushall()

    # -- moving a slot ----------------------------------------------------------------------------

    def move(
        self,
        key: str,
        to: EmbeddedServer,
        *,
        before: Callable[[], None] = lambda: None,
        between: Callable[[], None] = lambda: None,
    ) -> int:
        """Move the slot of a key to another master, live, as ``redis-cli --cluster reshard`` does; how many keys.

        ``before`` is called when it has begun and no key has gone, ``between`` when half of them have.
        """
        source = self.owner(key)
        old, new = self.at(source), self.at(to)
        slot = int(old.execute_command("CLUSTER", "KEYSLOT", key))
        new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(to))
        count = int(old.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot))
        before()
        moved = 0
        while keys := old.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1):
            old.execute_command("MIGRATE", "127.0.0.1", self._seen_port(to), "", 0, 5_000, "KEYS", *keys)
            moved += len(keys)
            if moved == max(count // 2, 1):
                between()
        for client in (new, old):
            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", self.id_of(to))
        return moved


EVERYWHERE = frozenset(
    {"TIME", "KEYS", "INFO", "CONFIG", "CLIENT", "ACL", "SLOWLOG", "PUBSUB", "DBSIZE", "DEBUG", "BGSAVE"}
)
"""Commands that look at a server, or set it: over a cluster at each of its masters."""


def oracle(url: str) -> Any:
    """redis-py's client of a cluster: keys, clients, counts and settings are looked for on all of its masters, as on one server."""
    from redis.backoff import NoBackoff
    from redis.cluster import ClusterNode, RedisCluster
    from redis.retry import Retry

    class Oracle(RedisCluster):
        def execute_command(self, *args: Any, **options: Any) -> Any:
            if str(args[0]).split()[0].upper() not in EVERYWHERE or "target_nodes" in options:
                return super().execute_command(*args, **options)
            ask = super().execute_command
            return _as_one([ask(*args, target_nodes=node, **options) for node in self.get_primaries()])

    hosts = [ClusterNode(*host) for host in parse_url(url).nodes]
    return Oracle(startup_nodes=hosts, socket_timeout=None, retry=Retry(NoBackoff(), 0), protocol=2)


def _as_one(replies: list[Any]) -> Any:
    """What one server would have said: lists and counts of all together, and the first word of what is no count."""
    first = replies[0]
    if isinstance(first, dict):
        names = dict.fromkeys(name for reply in replies for name in reply)
        return {name: _as_one([reply[name] for reply in replies if name in reply]) for name in names}
    if isinstance(first, list):
        return [item for reply in replies for item in reply]
    return sum(replies) if isinstance(first, int | float) and not isinstance(first, bool) else first


def raw_slots(client: Any) -> list[Any]:
    """CLUSTER SLOTS, whatever redis-py makes of the reply."""
    reply = client.execute_command("CLUSTER", "SLOTS")
    if not isinstance(reply, dict):
        return list(reply)
    return [[first, last, [*found["primary"]]] for (first, last), found in reply.items()]


class Bridge:
    """The network between a server and some of those that use it: a port that relays to the server's until it is cut.

    ``peer``: the address of those that a cut is about; default: whoever uses the bridge.
    """

    def __init__(self, port: int, peer: str = "") -> None:
        self._to = port
        self._peer = peer
        self._cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bridge", daemon=True)
        self.port = 0

    def cut(self) -> None:
        """Nothing passes, and nobody is told, as when a switch dies; new connections are taken and hear nothing."""
        self._cut = True

    def heal(self) -> None:
        """Whoever is connected has to connect anew, and can."""
        self._cut = False
        self._loop.call_soon_threadsafe(lambda: [writer.transport.abort() for writer in list(self._writers)])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        there = None
        try:
            meant = self._peer in ("", writer.get_extra_info("peername")[0])
            if self._cut and meant:
                await reader.read()
                return
            back, there = await asyncio.open_connection("127.0.0.1", self._to)
            await asyncio.wait(
                [asyncio.ensure_future(self._relay(*way, meant)) for way in ((reader, there), (back, writer))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        except OSError:
            pass
        finally:
            self._writers.discard(writer)
            for end in (writer, there):
                if end is not None:
                    end.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, meant: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if not (self._cut and meant):
                    writer.write(data)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def _close(self) -> None:
        self._server.close()
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for writer in list(self._writers):
                writer.transport.abort()
            await asyncio.wait(tasks, timeout=0.1)
        await asyncio.sleep(0)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class Divided(Cluster):
    """A cluster whose first master can be cut off from every other node, its own replica included. Clients reach all of them.

    The first master calls the others from an address of its own, by which the bridges before their buses know it (Linux: all of
    127.0.0.0/8 is the loopback); what they say to it, and its replication, goes over two bridges before it.
    """

    LONELY = "127.0.0.2"

    def _lay_wires(self) -> None:
        first = self.servers[0]
        self._bridges = {
            bus: self._stack.enter_context(Bridge(bus, "" if number == 0 else self.LONELY))
            for number, bus in enumerate(self._buses)
        }
        self._replication = self._stack.enter_context(Bridge(first.port))
        self.at(first).config_set("bind-source-addr", self.LONELY)
        self.at(first).config_set("cluster-announce-port", self._replication.port)
        for server in self.servers:
            self.at(server).config_set("cluster-announce-ip", "127.0.0.1")
            self.at(server).config_set("cluster-announce-bus-port", self._seen_bus(server))

    def _seen_port(self, server: EmbeddedServer) -> int:
        return self._replication.port if server is self.servers[0] else server.port

    def _seen_bus(self, server: EmbeddedServer) -> int:
        return self._bridges[super()._seen_bus(server)].port

    def cut(self) -> None:
        for bridge in (*self._bridges.values(), self._replication):
            bridge.cut()

    def heal(self) -> None:
        for bridge in (*self._bridges.values(), self._replication):
            bridge.heal()

    def front(self) -> FaultProxy:
        """A proxy for clients, which calls the nodes by their own ports, so that a part of them can be cut off for it."""
        from tests.chaos.proxy import FaultProxy

        return FaultProxy(self.url, known_as={self.servers[0].port: self._replication.port})


class Sentinels:
    """A master called ``main``, ``replicas`` of it, and ``count`` Sentinels that agree by majority.

    ``down_after``: seconds after which a silent master counts as down. ``bridged``: replicas and Sentinels reach the master over
    ``bridge``, which can be cut; who connects to ``servers[0]`` itself is on the master's side.
    """

    def __init__(
        self, count: int = 3, replicas: int = 1, down_after: float = 1.0, *, bridged: bool = False, **config: str
    ) -> None:
        shared = {"repl-diskless-sync-delay": "0", "enable-debug-command": "yes", **config}
        self.servers = [EmbeddedServer(port=0, config=shared) for _ in range(1 + replicas)]
        self.bridge: Bridge | None = None
        self._bridged = bridged
        self.ports = free_ports(count)
        self._down_after = round(down_after * 1_000)
        self._stack = contextlib.ExitStack()
        self._clients: dict[int, Any] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients.values():
            client.close()
        self._stack.close()

    def _start(self) -> None:
        for server in self.servers:
            self._stack.callback(server.stop)
            server.start()
        self._seen = self.servers[0].port
        if self._bridged:
            self.bridge = self._stack.enter_context(Bridge(self._seen))
            self._seen = self.bridge.port
        for server in self.servers[1:]:
            self.at(server.port).execute_command("REPLICAOF", "127.0.0.1", self._seen)
        for server in self.servers[1:]:
            eventually(lambda server=server: self._follows(server), PATIENCE)  # type: ignore[misc]
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sentinels")))
        for port in self.ports:
            self._spawn(folder / str(port), port)
        for port in self.ports:
            eventually(lambda port=port: self._agrees(port), PATIENCE)  # type: ignore[misc]

    def _spawn(self, folder: Path, port: int) -> None:
        folder.mkdir()
        quorum = len(self.ports) // 2 + 1
        (folder / "sentinel.conf").write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor main 127.0.0.1 {self._seen} {quorum}\n"
            f"sentinel down-after-milliseconds main {self._down_after}\n"
            "sentinel failover-timeout main 5000\n"
        )
        log = self._stack.enter_context((folder / "log").open("ab"))
        process = subprocess.Popen([str(find_server()), str(folder / "sentinel.conf"), "--sentinel"], stdout=log)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)

    def _follows(self, server: EmbeddedServer) -> bool:
        return bool(self.at(server.port).info("replication").get("master_link_status") == "up")

    def _agrees(self, port: int) -> bool:
        """It has found the other Sentinels and the replicas."""
        from redis.exceptions import ConnectionError as RedisConnectionError

        try:
            found = self.at(port).execute_command("SENTINEL", "MASTER", "main")
        except RedisConnectionError:
            return False
        about = found if isinstance(found, dict) else dict(zip(found[::2], found[1::2], strict=True))
        texts = {_text(name): _text(value) for name, value in about.items()}
        sentinels, replicas = texts["num-other-sentinels"], texts["num-slaves"]
        return int(sentinels) == len(self.ports) - 1 and int(replicas) == len(self.servers) - 1

    @property
    def url(self) -> str:
        return "redis+sentinel://" + ",".join(f"127.0.0.1:{port}" for port in self.ports) + "/main/0"

    def at(self, port: int) -> Any:
        """A plain client of one of the processes."""
        if port not in self._clients:
            self._clients[port] = connect(f"redis://127.0.0.1:{port}")
        return self._clients[port]

    def master(self) -> EmbeddedServer:
        """The one that the Sentinels name."""
        reply = self.at(self.ports[0]).execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")
        port = self.servers[0].port if int(reply[1]) == self._seen else int(reply[1])
        return next(server for server in self.servers if server.port == port)

    def until_failed_over(self, old: EmbeddedServer) -> float:
        """Wait until another one is named and takes writes; ``time.monotonic()`` of that moment."""
        eventually(lambda: self.master() is not old, PATIENCE)
        new = self.master()
        eventually(lambda: self.role(new) == "master", PATIENCE)
        return time.monotonic()

    def role(self, server: EmbeddedServer) -> str:
        """What a server says it is; it hangs up on its clients when that changes."""
        from redis.exceptions import ConnectionError as RedisConnectionError

        try:
            return str(self.at(server.port).info("replication")["role"])
        except RedisConnectionError:
            return ""


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
