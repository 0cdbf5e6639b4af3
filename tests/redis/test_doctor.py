"""The doctor finds each planted fault on a real server, reports what it may not see, and writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from fastq.broker import commands, doctor
from fastq.broker.command import Operation
from fastq.broker.commands import NewJob
from fastq.broker.connection import SyncConnection
from fastq.broker.doctor import Finding, examine, startup_warnings
from fastq.broker.keys import GlobalKeys, QueueKeys
from fastq.broker.url import Endpoint, parse_url
from fastq.job import WorkerCard, encode
from tests.conftest import acl_rules, connect
from tests.nodes import Cluster


@pytest.fixture
def connection(redis_url: str) -> Iterator[SyncConnection]:
    made = SyncConnection.to(parse_url(redis_url))
    yield made
    made.close()


def seen(connection: SyncConnection) -> dict[str, Finding]:
    findings = connection.run(examine("fastq", connection.endpoint))
    return {finding.name: finding for finding in findings}


def said(operation: Operation[Any], replies: dict[str, Any]) -> Any:
    """Drive an operation with replies of our own, for servers that cannot be had here."""
    try:
        step = next(operation)
        while True:
            assert not isinstance(step, list)
            step = operation.send(step.decode(replies[str(step.args[0])]))
    except StopIteration as stop:
        return stop.value


def told(finding: Finding, *words: str) -> None:
    """A finding is one line that holds these words, and says what to change unless all is well."""
    text = f"{finding.message} | {finding.fix}"
    assert all(word in text for word in words), text
    assert "\n" not in text
    assert (finding.level == "ok") == (finding.fix == "")


# -- the server -------------------------------------------------------------------------------


def test_a_sound_server_has_no_fault(make_server: Any) -> None:
    """A-08, F-24: what the documentation recommends passes without a warning."""
    server = make_server(appendonly=True, config={"maxmemory": "100mb"})
    connection = SyncConnection(parse_url(server.url))
    findings = [each for each in connection.run(examine("fastq", connection.endpoint)) if each.name != "security"]
    connection.close()  # a known hole of the server that the suite happens to run on is no fault of its setting
    assert [finding for finding in findings if finding.level != "ok"] == []
    names = "server persistence fsync eviction memory clients access clock latency scripts permissions"
    assert [finding.name for finding in findings] == names.split()


def test_nothing_is_written(connection: SyncConnection, raw: Any) -> None:
    before = int(raw.info("stats")["total_error_replies"])
    changes = int(raw.info("persistence")["rdb_changes_since_last_save"])
    connection.run(examine("fastq", connection.endpoint))
    assert raw.dbsize() == 0
    assert int(raw.info("persistence")["rdb_changes_since_last_save"]) == changes
    errors = int(raw.info("stats")["total_error_replies"]) - before
    assert errors <= 1, "the first EVALSHA of status.lua may be unknown; nothing else may fail"


@pytest.mark.parametrize(
    ("directive", "value", "name", "level", "words"),
    [
        ("maxmemory-policy", "allkeys-lru", "eviction", "fault", ["allkeys-lru", "maxmemory-policy noeviction"]),
        ("maxmemory-policy", "volatile-ttl", "eviction", "warn", ["volatile-ttl", "maxmemory-policy noeviction"]),
        ("maxmemory", "0", "memory", "warn", ["maxmemory is not set", "three quarters of the machine"]),
        ("maxmemory", "1", "memory", "warn", ["of its maxmemory", "raise maxmemory"]),
        ("appendonly", "no", "persistence", "warn", ["no append-only file", "appendonly yes"]),
        ("appendfsync", "no", "fsync", "warn", ["power loss", "appendfsync everysec"]),
        ("appendfsync", "always", "fsync", "ok", ["appendfsync always"]),
        ("maxclients", "1", "clients", "warn", ["connections are in use", "maxclients 2"]),
    ],
)
def test_each_bad_directive_is_named_with_its_line(
    make_server: Any, directive: str, value: str, name: str, level: str, words: list[str]
) -> None:
    """F-24."""
    server = make_server(appendonly=True, config={"maxmemory": "100mb"})
    connection = SyncConnection(parse_url(server.url))
    server.ask(b"CONFIG", b"SET", directive.encode(), value.encode())
    finding = seen(connection)[name]
    connection.close()
    told(finding, *words)
    assert finding.level == level


def test_a_replica_is_no_place_for_jobs(make_server: Any) -> None:
    primary, replica = make_server(port=0), make_server()
    replica.ask(b"REPLICAOF", b"127.0.0.1", str(primary.port).encode())
    connection = SyncConnection(parse_url(replica.url))
    findings = seen(connection)
    connection.close()
    assert findings["role"].level == "fault"
    told(findings["role"], "replica", "primary")
    assert "scripts" not in findings, "a replica refuses them"


def test_one_node_of_a_cluster_is_not_enough() -> None:
    with Cluster(masters=1) as cluster:
        one = SyncConnection(parse_url(cluster.servers[0].url))
        (finding,) = doctor._role(one.run(doctor._info()))
        one.close()
        assert finding.level == "fault"
        told(finding, "one node of a cluster", "redis+cluster://")


@pytest.mark.parametrize(
    ("info", "level", "words"),
    [
        ({"redis_version": "6.2.14"}, "fault", ["Redis 6.2.14 is too old", "Redis 7.0 or later"]),
        ({"redis_version": "7.0.0"}, "ok", ["Redis 7.0.0"]),
        ({"redis_version": "8.10.1"}, "ok", ["Redis 8.10.1"]),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, "ok", ["Valkey 9.1.2"]),
        ({"redis_version": "7.1.0", "valkey_version": "7.1.9"}, "fault", ["Valkey 7.1.9 is too old", "Valkey 7.2"]),
        ({"redis_version": "odd"}, "fault", ["too old"]),
        ({}, "fault", ["too old"]),
    ],
)
def test_versions(info: dict[str, str], level: str, words: list[str]) -> None:
    finding = doctor._server(info)[0]
    assert finding.level == level
    told(finding, *words)


@pytest.mark.parametrize(
    ("kind", "version", "vulnerable"),
    [
        ("Redis", (7, 0, 15), True),
        ("Redis", (7, 2, 10), True),
        ("Redis", (7, 2, 11), False),
        ("Redis", (8, 0, 3), True),
        ("Redis", (8, 2, 2), False),
        ("Redis", (8, 4, 0), False),
        ("Valkey", (8, 1, 3), True),
        ("Valkey", (9, 0, 0), False),
    ],
)
def test_servers_with_a_known_hole_are_named(kind: str, version: tuple[int, ...], vulnerable: bool) -> None:
    """A-08: CVE-2025-49844."""
    findings = list(doctor._version(kind, ".".join(map(str, version))))
    assert [finding.name for finding in findings] == (["server", "security"] if vulnerable else ["server"])


def test_a_full_disk_is_a_fault() -> None:
    aof, snapshot = doctor._persistence(
        {"aof_enabled": "1", "aof_last_write_status": "err", "rdb_last_bgsave_status": "err"}
    )
    assert (aof.level, snapshot.level) == ("fault", "fault")
    told(aof, "cannot write", "disk")
    told(snapshot, "snapshot", "disk")


# -- access ---------------------------------------------------------------------------------------


def test_a_password_is_enough(make_server: Any) -> None:
    server = make_server(port=0, config={"requirepass": "open sesame".replace(" ", "-")})
    connection = SyncConnection(parse_url(server.url))
    finding = seen(connection)["access"]
    connection.close()
    told(finding, "a password")
    assert "sesame" not in repr(finding)


@pytest.mark.parametrize(
    ("bind", "protected", "level"),
    [
        ("127.0.0.1", "no", "ok"),
        ("127.0.0.1 -::1", "no", "ok"),
        ("0.0.0.0", "yes", "ok"),
        ("0.0.0.0", "no", "fault"),
        ("127.0.0.1 10.0.0.7", "no", "fault"),
        ("", "no", "fault"),
    ],
)
def test_a_server_without_a_password(bind: str, protected: str, level: str) -> None:
    """A-08: open to the network and no password is how servers are taken over."""
    config = {"bind": bind.encode(), "protected-mode": protected.encode()}

    def drive(operation: Any) -> list[Finding]:
        try:
            step = next(operation)
            while True:
                name = step.args[2]
                step = operation.send([name.encode(), config[name]])
        except StopIteration as stop:
            return stop.value

    (finding,) = drive(doctor._access(Endpoint("redis://localhost:6379")))
    assert finding.level == level
    (finding,) = drive(doctor._access(Endpoint("redis://db:6379", host="db")))
    assert finding.level == "fault"


# -- what may not be seen -----------------------------------------------------------------------------


def test_tls_with_whoever_answers(connection: SyncConnection) -> None:
    url = "rediss://app:s3cret@redis.example/0?ssl_cert_reqs=none"
    finding = next(f for f in connection.run(examine("fastq", parse_url(url))) if f.name == "access")
    assert finding.level == "warn"
    told(finding, "without a look at the certificate", "ssl_ca_certs")
    assert "s3cret" not in str(finding)


def user_of(server: Any, *rules: str) -> SyncConnection:
    assert server.ask(b"ACL", b"SETUSER", b"app", b"on", b">s3cret", *(rule.encode() for rule in rules)) == b"+OK\r\n"
    return SyncConnection(parse_url(server.url.replace("unix://", "unix://app:s3cret@")))


WORKER_RULES = (
    *("~fastq:*", "&fastq:*", "-@all", "+@read", "+@write", "+@scripting", "+@connection", "+@pubsub", "+time"),
    *("-@dangerous", "+client|list", "+client|kill"),
)


def test_a_user_that_may_not_look_is_told_so(make_server: Any) -> None:
    """A-08: INFO and CONFIG are forbidden to a careful user; that is a remark, not a crash, and scripts still run."""
    server = make_server(appendonly=True)
    connection = user_of(server, *WORKER_RULES)
    findings = seen(connection)
    warnings = connection.run(startup_warnings("fastq"))
    connection.close()
    assert warnings == []
    for name in ("persistence", "eviction"):
        assert findings[name].level == "warn"
        told(findings[name], "cannot see", "+info")
    assert findings["server"].level == "ok", "the greeting names the server"
    assert (findings["scripts"].level, findings["permissions"].level) == ("ok", "ok")
    assert "fault" not in {finding.level for finding in findings.values()}


def test_missing_permissions_are_listed_with_the_line_that_grants_them(make_server: Any) -> None:
    server = make_server()
    connection = user_of(server, *WORKER_RULES, "-hset", "-zadd")
    finding = seen(connection)["permissions"]
    connection.close()
    assert finding.level == "fault"
    told(finding, "HSET, ZADD", "+hset +zadd", "~fastq:*")


@pytest.mark.parametrize(
    ("less", "effect", "grant"),
    [
        ("resetchannels", "is not told of its end", "+@pubsub &fastq:*"),
        ("-publish", "is not told of its end", "+@pubsub &fastq:*"),
        ("-client|kill", "cannot end a connection that it has lost", "+client|list +client|kill"),
    ],
)
def test_rights_that_are_not_needed_and_missed(make_server: Any, less: str, effect: str, grant: str) -> None:
    server = make_server()
    connection = user_of(server, *WORKER_RULES, less)
    finding = seen(connection)["permissions"]
    connection.close()
    assert finding.level == "warn"
    told(finding, effect, grant)


@pytest.mark.parametrize(
    ("setting", "value", "code", "fix"),
    [("min-replicas-to-write", 1, "NOREPLICAS", "min-replicas-to-write"), ("maxmemory", 1, "OOM", "raise maxmemory")],
)
def test_redis_takes_no_writes(make_server: Any, setting: str, value: int, code: str, fix: str) -> None:
    """Said like anything else; what only reads is looked at all the same."""
    server = make_server()
    with connect(server.url) as raw:
        raw.sadd("fastq:queues", "mail")
        raw.config_set(setting, value)
    connection = SyncConnection.to(parse_url(server.url))
    findings = seen(connection)
    connection.close()
    assert findings["writes"].level == "fault"
    told(findings["writes"], "takes no new jobs", code, fix)
    assert findings["scripts"].level == "ok"
    assert "scheduler" in findings


def test_another_prefix_is_a_missing_permission(make_server: Any) -> None:
    server = make_server()
    connection = user_of(server, *WORKER_RULES, "resetkeys", "~other:*")
    findings = seen(connection)
    connection.close()
    assert findings["scripts"].level == "fault"
    told(findings["scripts"], "NOPERM", "~fastq:*")
    assert findings["queues"].level == "warn"


def test_no_scripts_no_queue(make_server: Any) -> None:
    server = make_server()
    connection = user_of(server, *WORKER_RULES, "-@scripting")
    finding = seen(connection)["scripts"]
    connection.close()
    assert finding.level == "fault"
    told(finding, "scripts cannot be run", "+@scripting")


def test_the_rights_that_it_asks_for_are_those_of_the_page(make_server: Any) -> None:
    """Less locks a worker out, more lets it flush the server."""
    assert doctor.RIGHTS.encode().split() == acl_rules()
    server = make_server()
    connection = user_of(server, *WORKER_RULES, "-@scripting")
    fix = seen(connection)["scripts"].fix
    connection.close()
    assert fix.endswith(doctor.RIGHTS)


def test_every_command_of_the_scripts_is_asked_for() -> None:
    assert {"HSET", "LPOP", "ZADD", "SMISMEMBER", "PEXPIREAT"} <= set().union(
        *(doctor._calls(name) for name in doctor.scripts.names())
    )


# -- clocks and distance ------------------------------------------------------------------------------


def test_a_clock_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    (good,) = said(doctor._clock(), {"TIME": [str(int(doctor.time.time())).encode(), b"500000"]})
    assert good.level == "ok"
    (bad,) = said(doctor._clock(), {"TIME": [b"1000", b"0"]})
    assert bad.level == "warn"
    told(bad, "s from this host's", "NTP")


def test_a_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(ticks) / 10)
    (finding,) = said(doctor._latency(), {"PING": b"PONG"})
    assert finding.level == "warn"
    told(finding, "100.00 ms")


# -- the fleet ----------------------------------------------------------------------------------------


def test_nobody_does_the_work(connection: SyncConnection, raw: Any) -> None:
    q = QueueKeys("fastq", "mail")
    connection.call(commands.enqueue(q, 5, "p", 1, [NewJob("a", b"\x97"), NewJob("b", b"\x97", 60_000)]))
    raw.sadd("fastq:queues", "mail")
    findings = seen(connection)
    told(findings["queues"], "'mail' has 1 pending jobs and no worker", "fastq worker --queues mail")
    told(findings["scheduler"], "no scheduler runs: 1 scheduled")
    connection.call(commands.register(q, "w1", -120_000, b""))
    told(seen(connection)["recovery"], "w1 lost its lease 1")


def test_nobody_takes_new_jobs(connection: SyncConnection, raw: Any) -> None:
    q = QueueKeys("fastq", "mail")
    connection.call(commands.enqueue(q, 5, "p", 1, [NewJob("a", b"\x97")]))
    raw.sadd("fastq:queues", "mail")
    card = WorkerCard("host", 1, 10, 0, "0")
    connection.call(commands.register(q, "w1", 60_000, encode(card)))
    assert "queues" not in seen(connection)
    assert connection.call(commands.describe(q, "w1", encode(replace(card, state="quiet"))))
    told(seen(connection)["queues"], "'mail' has 1 pending jobs", "w1 is quiet", "SIGCONT")
    assert not connection.call(commands.describe(q, "w2", b"gone"))
    assert raw.hkeys(q.info) == [b"w1"]


def test_a_fleet_at_work(connection: SyncConnection, raw: Any) -> None:
    q = QueueKeys("fastq", "mail")
    raw.sadd("fastq:queues", "mail", "bulk")
    connection.call(commands.register(q, "w1", 15_000, b""))
    connection.call(commands.lead(GlobalKeys("fastq"), "s1", 5_000))
    findings = seen(connection)
    told(findings["scheduler"], "s1 leads")
    assert "queues" not in findings
    raw.set("fastq:{bulk}:paused", "1")
    told(seen(connection)["queues"], "'bulk' is paused", "fastq queues resume bulk")


# -- at start ---------------------------------------------------------------------------------------------


def test_what_a_worker_says_when_it_starts(make_server: Any) -> None:
    """F-24: each reason to lose jobs is one line with the line to change."""
    server = make_server(appendonly=True)
    connection = SyncConnection(parse_url(server.url))
    assert connection.run(startup_warnings("fastq")) == []
    server.ask(b"CONFIG", b"SET", b"appendonly", b"no")
    server.ask(b"CONFIG", b"SET", b"maxmemory-policy", b"allkeys-lru")
    first, second = connection.run(startup_warnings("fastq"))
    connection.close()
    assert "no append-only file" in first
    assert "appendonly yes" in first
    assert "allkeys-lru" in second
    assert second.endswith("maxmemory-policy noeviction")
