"""What is wrong with this Redis, in words and with the line to change (A-08, F-24). Reads only; nothing is written.

:func:`examine` is `fastq doctor`; :func:`startup_warnings` is the part of it that a worker says when it starts. What an ACL
or a hosting provider forbids to look at is reported as such and is never a crash.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Iterator, Mapping, Sequence

from fastq.broker import masters, scripts
from fastq.broker.command import Operation, raw
from fastq.broker.commands import status
from fastq.broker.inspector import Inspector
from fastq.broker.keys import QueueKeys
from fastq.broker.masters import Finding, Level, Probe, allowed, at, config
from fastq.broker.pauses import Pause
from fastq.broker.schema import look
from fastq.broker.url import Endpoint
from fastq.broker.views import QueueInfo, WorkerInfo
from fastq.errors import BrokerOutOfMemory, BrokerReplyError, BrokerUnavailable, SchemaMismatch

__all__ = ["Finding", "Level", "examine", "startup_warnings"]

Info = Mapping[str, str]
Version = tuple[int, ...]

OLDEST: Mapping[str, Version] = {"Redis": (7, 0), "Valkey": (7, 2)}
"""The oldest servers that run our scripts (`#!lua flags=`)."""

PATCHED: Mapping[str, tuple[Version, ...]] = {
    "Redis": ((7, 2, 11), (7, 4, 6), (8, 0, 4), (8, 2, 2)),
    "Valkey": ((7, 2, 11), (8, 0, 6), (8, 1, 4)),
}
"""Per release line the first version without CVE-2025-49844 (whoever may run scripts takes the server over)."""

CLOCK = 1.0  # seconds that two clocks may differ before log lines of two hosts can no longer be put in order
LATENCY = 0.010  # seconds: a worker pays two round trips per batch
FULL = 0.8  # of maxmemory or maxclients: time to act
LOST = 60.0  # seconds after which somebody should have recovered a lease
PINGS = 7

PROBE = "#!lua flags=no-writes\nreturn redis.acl_check_cmd(unpack(ARGV)) and 1 or 0"
"""Asks Redis what this user may do instead of trying it."""

NEEDED = ("BLPOP", "RPUSH", "SADD", "SMEMBERS", "TIME")
"""What workers and producers send besides the scripts."""

_CALL = re.compile(r"redis\.call\('([A-Z]+)'")


def examine(prefix: str, endpoint: Endpoint | None = None) -> Operation[list[Finding]]:
    """Look at the server, or at each master of a cluster, at what this user may do there, and at the fleet that uses it.

    Args:
        prefix: the first part of every key.
        endpoint: how it was reached; without it nothing is said about passwords, and a cluster is looked at as one server.
    """
    if endpoint is not None and endpoint.nodes:
        findings = yield from masters.examine(
            prefix, endpoint, lambda master: _machine(master.endpoint(endpoint), master.probe)
        )
    else:
        findings = yield from _machine(endpoint)
    if not any(finding.level == "fault" and finding.name in ("role", "cluster") for finding in findings):
        findings += yield from _schema(prefix)
        findings += yield from _scripts(prefix)
        findings += yield from _writes(prefix)
        findings += yield from _fleet(prefix)
    return findings


def startup_warnings(prefix: str, endpoint: Endpoint | None = None) -> Operation[list[str]]:
    """One line for each reason why jobs may be lost on this server, or on a master of this cluster, with the line to change;
    what cannot be seen is not warned of.
    """
    if endpoint is not None and endpoint.nodes:
        findings = yield from masters.of_each(prefix, endpoint, lambda master: _durability(master.probe))
    else:
        findings = yield from _durability()
    lasting = [finding for finding in findings if finding.level != "ok" and finding.name != "security"]
    return [f"{finding.message}: {finding.fix}" for finding in lasting]


def _machine(endpoint: Endpoint | None, near: Probe = None) -> Operation[list[Finding]]:
    """One server."""
    info = yield from _info(near)
    findings = _server(info) if info else (yield from _hello(near))
    findings += [
        *_role(info, clustered=near is not None),
        *(_stand_by(info) if endpoint is not None and endpoint.sentinels else ()),
        *_persistence(info),
        *(yield from _fsync(info, near)),
        *_eviction(info),
        *_memory(info),
    ]
    findings += _clients(info)
    findings += yield from _access(endpoint, near)
    findings += yield from _clock(near)
    findings += yield from _latency(near)
    return findings


def _durability(near: Probe = None) -> Operation[list[Finding]]:
    info = yield from _info(near)
    return [*_server(info), *_persistence(info), *_eviction(info)] if info else []


# -- asking -------------------------------------------------------------------------------------


def _info(near: Probe = None) -> Operation[dict[str, str]]:
    """INFO as a mapping; empty when it is forbidden."""
    reply = yield from allowed(raw("INFO"), near)
    lines = (reply or b"").decode("utf-8", "replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))


def _unseen(name: str, what: str) -> Finding:
    return _unasked(name, what, "+info")


def _unasked(name: str, what: str, grant: str) -> Finding:
    return Finding("warn", name, f"cannot see {what}: this user may not ask", f"allow it: {grant}")


# -- the server -----------------------------------------------------------------------------------


def _server(info: Info) -> list[Finding]:
    kind = "Valkey" if "valkey_version" in info else "Redis"
    return list(_version(kind, info.get("valkey_version") or info.get("redis_version", "")))


def _hello(near: Probe = None) -> Operation[list[Finding]]:
    """Without INFO: the greeting names the server, too."""
    reply = yield from allowed(raw("HELLO"), near)
    words = iter(reply if isinstance(reply, list) else [])
    said = {key: value for key, value in zip(words, words, strict=False) if isinstance(value, bytes)}
    kind = "Valkey" if said.get(b"server") == b"valkey" else "Redis"
    version = said.get(b"version", b"").decode("utf-8", "replace")
    return [*(_version(kind, version) if version else [_unseen("server", "the server's version")])]


def _version(kind: str, text: str) -> Iterator[Finding]:
    version = tuple(int(part) for part in re.findall(r"\d+", text)[:3])
    oldest = OLDEST[kind]
    shown = f"{kind} {text}"
    if version < oldest:
        least = ".".join(map(str, oldest))
        yield Finding("fault", "server", f"{shown} is too old", f"upgrade to {kind} {least} or later")
        return
    yield Finding("ok", "server", shown)
    if _vulnerable(kind, version):
        fixed = ", ".join(".".join(map(str, patched)) for patched in PATCHED[kind])
        message = f"{shown} lets whoever may run scripts take it over (CVE-2025-49844)"
        yield Finding("warn", "security", message, f"upgrade to {fixed}, or make sure that your vendor has patched it")


def _vulnerable(kind: str, version: Version) -> bool:
    line = [patched for patched in PATCHED[kind] if patched[:2] == version[:2]]
    return version < line[0] if line else version < PATCHED[kind][-1]


def _role(info: Info, *, clustered: bool = False) -> Iterator[Finding]:
    if info.get("role", "master") != "master":
        yield Finding("fault", "role", "this is a replica and takes no writes", "name the primary in the URL")
    if info.get("cluster_enabled", "0") == "1" and not clustered:
        message = "this is one node of a cluster, and most queues are on others"
        yield Finding("fault", "cluster", message, "use redis+cluster://host:port,host:port")


def _stand_by(info: Info) -> Iterator[Finding]:
    """Whether the Sentinels have somebody to turn to."""
    replicas = info.get("connected_slaves")
    if replicas == "0":
        message = "no replica is connected to this master: the Sentinels have nobody to turn to when it dies"
        yield Finding("warn", "replicas", message, "start one: replicaof HOST PORT")
    elif replicas is not None:
        yield Finding("ok", "replicas", f"{replicas} connected")


def _persistence(info: Info) -> Iterator[Finding]:
    if not info:
        yield _unseen("persistence", "whether there is an append-only file")
        return
    if info.get("aof_enabled") != "1":
        message = "Redis has no append-only file: a crash loses every job since its last snapshot"
        yield Finding("warn", "persistence", message, "appendonly yes (CONFIG SET appendonly yes, then CONFIG REWRITE)")
    elif info.get("aof_last_write_status", "ok") != "ok":
        message = "Redis cannot write its append-only file and refuses jobs"
        yield Finding("fault", "persistence", message, "make room on its disk; its log says more")
    else:
        yield Finding("ok", "persistence", "append-only file on")
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        message = "the last snapshot of Redis failed; it refuses jobs unless stop-writes-on-bgsave-error is no"
        yield Finding("fault", "snapshot", message, "make room on its disk (or in memory, to fork); its log says more")


def _fsync(info: Info, near: Probe = None) -> Operation[list[Finding]]:
    if info.get("aof_enabled") != "1":
        return []
    value = yield from config("appendfsync", near)
    if value is None:
        return [Finding("ok", "fsync", "cannot see appendfsync (CONFIG is forbidden)")]
    if value == "no":
        message = "appendfsync is no: a power loss costs as much as the kernel has not written, up to 30 s"
        return [Finding("warn", "fsync", message, "appendfsync everysec")]
    return [Finding("ok", "fsync", f"appendfsync {value}")]


def _eviction(info: Info) -> Iterator[Finding]:
    policy = info.get("maxmemory_policy")
    if policy is None:
        yield _unseen("eviction", "maxmemory-policy")
    elif policy == "noeviction":
        yield Finding("ok", "eviction", "maxmemory-policy noeviction")
    else:
        everything = policy.startswith("allkeys")
        lost = "jobs that wait" if everything else "records of finished jobs and the scheduler's lease"
        message = f"maxmemory-policy is {policy}: when memory is full, Redis throws away {lost}"
        yield Finding("fault" if everything else "warn", "eviction", message, "maxmemory-policy noeviction")


def _memory(info: Info) -> Iterator[Finding]:
    if "maxmemory" not in info:
        return
    most, used = int(info["maxmemory"]), int(info.get("used_memory", 0))
    if not most:
        message = "maxmemory is not set: when memory is full, the kernel ends Redis instead of Redis refusing jobs"
        three_quarters = int(info.get("total_system_memory", 0)) * 3 // 4 >> 20
        fix = f"maxmemory {three_quarters}mb (three quarters of the machine's memory; in a container, of its limit)"
        yield Finding(
            "warn", "memory", message, fix if three_quarters else "maxmemory, three quarters of its machine's memory"
        )
    elif used > FULL * most:
        message = (
            f"Redis uses {used / most:.0%} of its maxmemory ({used >> 20} of {most >> 20} MiB) and refuses jobs at 100%"
        )
        yield Finding("warn", "memory", message, "raise maxmemory, purge, or shorten result_ttl")
    else:
        yield Finding("ok", "memory", f"{used >> 20} of {most >> 20} MiB used")


def _clients(info: Info) -> Iterator[Finding]:
    if "maxclients" not in info:
        return
    most, now = int(info["maxclients"]), int(info.get("connected_clients", 0))
    if now > FULL * most:
        yield Finding("warn", "clients", f"{now} of {most} connections are in use", f"maxclients {most * 2}")
    else:
        yield Finding("ok", "clients", f"{now} of {most} connections in use")


def _access(endpoint: Endpoint | None, near: Probe = None) -> Operation[list[Finding]]:
    """Who else can reach it: a Redis open to the world is taken over within minutes."""
    if endpoint is None:
        return []
    if endpoint.path:
        return [Finding("ok", "access", "a unix socket: the file's permissions decide")]
    if endpoint.unverified:
        message = "TLS without a look at the certificate: whoever is between reads the password and the jobs"
        return [
            Finding("warn", "access", message, "leave ssl_cert_reqs=none out, and name the CA with ssl_ca_certs=PATH")
        ]
    if endpoint.password:
        return [Finding("ok", "access", f"a password{' and TLS' if endpoint.tls else ''}")]
    fix = "requirepass, or a user per application (ACL SETUSER), and the password in the URL"
    if not _is_loopback(endpoint.host):
        return [Finding("fault", "access", f"{endpoint.host} asks for no password", fix)]
    protected = yield from config("protected-mode", near)
    bind = yield from config("bind", near)
    if protected is None or bind is None:
        return [Finding("warn", "access", "no password, and cannot see whether others can reach it", fix)]
    closed = protected == "yes" or (bind != "" and all(_is_loopback(name.lstrip("-")) for name in bind.split()))
    if closed:
        return [Finding("ok", "access", "no password; only this host is let in")]
    return [Finding("fault", "access", f"no password, and open to the network (bind {bind or '*'})", fix)]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# -- the way to it ----------------------------------------------------------------------------------


def _clock(near: Probe = None) -> Operation[list[Finding]]:
    before = time.time()
    seconds, micros = yield from at(raw("TIME"), near)
    offset = int(seconds) + int(micros) / 1e6 - (before + time.time()) / 2
    if abs(offset) <= CLOCK:
        return [Finding("ok", "clock", f"{offset * 1_000:+.0f} ms from this host's")]
    message = f"Redis's clock is {offset:+.1f} s from this host's: jobs follow Redis's, log lines this host's"
    return [Finding("warn", "clock", message, "run an NTP client on both hosts")]


def _latency(near: Probe = None) -> Operation[list[Finding]]:
    times = []
    for _ in range(PINGS):
        begun = time.perf_counter()
        if (yield from allowed(raw("PING"), near)) is None:
            return [_unasked("latency", "how long a round trip takes", "+ping")]
        times.append(time.perf_counter() - begun)
    median = sorted(times)[len(times) // 2]
    shown = f"a round trip takes {median * 1_000:.2f} ms (worst of {PINGS}: {max(times) * 1_000:.2f} ms)"
    if median <= LATENCY:
        return [Finding("ok", "latency", shown)]
    return [
        Finding("warn", "latency", shown, "run workers in Redis's own network; find slow commands with SLOWLOG GET")
    ]


def _schema(prefix: str) -> Operation[list[Finding]]:
    try:
        yield from look(prefix)
    except SchemaMismatch as error:
        return [Finding("fault", "schema", str(error), "upgrade this fastq, or use another FASTQ_PREFIX")]
    except BrokerReplyError:
        pass  # may not be read: said below
    return []


RIGHTS = (
    "resetkeys ~fastq:* resetchannels &fastq:* -@all +@read +@write +@scripting +@connection +@pubsub +time -@dangerous "
    "+info +client|list +client|kill +cluster|slots"
)
"""What fastq's user may do with the prefix ``fastq``; docs/security.md explains each."""


def _scripts(prefix: str) -> Operation[list[Finding]]:
    """Run a script that only reads, then ask what the others would be allowed to do."""
    keys = QueueKeys(prefix, "fastq-doctor")
    try:
        yield status(keys, "fastq-doctor", [])
        refused = yield from _refused(keys)
    except BrokerReplyError as error:
        fix = f"ACL SETUSER <user> {RIGHTS.replace('fastq:', f'{prefix}:')}"
        return [Finding("fault", "scripts", f"scripts cannot be run: {error}", fix)]
    if refused:
        grant = " ".join(f"+{name.lower()}" for name in refused)
        message = f"this user may not run {', '.join(refused)} on {prefix}:*"
        fix = f"ACL SETUSER <user> ~{prefix}:* {grant}"
        return [Finding("ok", "scripts", "scripts run"), Finding("fault", "permissions", message, fix)]
    ok = [Finding("ok", "scripts", "scripts run"), Finding("ok", "permissions", f"all commands on {prefix}:*")]
    return [*ok, *(yield from _better(prefix, keys))]


_WRITES_NOTHING = "#!lua\nreturn 1"
"""A script that says that it may write is refused as one that does (https://redis.io/docs/latest/develop/programmability/eval-intro,
"Script flags")."""
_TO_WRITE = {
    "NOREPLICAS": "min-replicas-to-write asks for more replicas than are connected: bring them back, or lower it",
    "MISCONF": "the last snapshot failed: make room on the disk of Redis, its log says why",
    "OOM": "raise maxmemory, or let the workers drain: they go on meanwhile",
}


def _writes(prefix: str) -> Operation[list[Finding]]:
    """Whether Redis would take a job now; nothing is written."""
    try:
        yield raw("EVAL", _WRITES_NOTHING, 1, QueueKeys(prefix, "fastq-doctor").jobs)
    except (BrokerUnavailable, BrokerOutOfMemory) as error:
        if isinstance(error, BrokerUnavailable) and not error.refused:
            raise
        fix = next((fix for code, fix in _TO_WRITE.items() if code in str(error)), "look at the log of Redis")
        return [Finding("fault", "writes", f"Redis takes no new jobs: {error}", fix)]
    except BrokerReplyError:
        pass  # may not run scripts: said above
    return []


def _refused(keys: QueueKeys) -> Operation[list[str]]:
    words = sorted({*NEEDED, *(name for script in scripts.names() for name in _calls(script))})
    key = keys.jobs  # twice: DEL and EXISTS take any number of them
    answers = yield [raw("EVAL", PROBE, 1, key, word, key, key) for word in words]
    return [word for word, answer in zip(words, answers, strict=True) if not answer]


def _better(prefix: str, keys: QueueKeys) -> Operation[list[Finding]]:
    """What goes without, and better with."""
    channel = f"{prefix}:fastq-doctor"
    asked = {
        (f"+@pubsub &{prefix}:*", "who waits for a job is not told of its end, and asks again and again"): (
            ("SUBSCRIBE", channel),
            ("PUBLISH", channel, ""),
        ),
        ("+client|list +client|kill", "a worker cannot end a connection that it has lost before it uses a new one"): (
            ("CLIENT", "LIST", "ID", 1),
            ("CLIENT", "KILL", "ID", 1),
        ),
    }
    findings = []
    for (grant, effect), calls in asked.items():
        if not all((yield [raw("EVAL", PROBE, 1, keys.jobs, *call) for call in calls])):
            findings.append(Finding("warn", "permissions", effect, f"ACL SETUSER <user> {grant}"))
    return findings


def _calls(script: str) -> set[str]:
    """The Redis commands of a script."""
    return set(_CALL.findall(scripts.load(script).text.decode()))


# -- the fleet --------------------------------------------------------------------------------------


def _fleet(prefix: str) -> Operation[list[Finding]]:
    """Whether anybody does the work; nothing to say where no queue exists yet."""
    inspector = Inspector(prefix)
    try:
        infos = yield from inspector.overview()
        if not infos:
            return []
        leader = yield from inspector.leader()
        workers = yield from inspector.workers()
        paused = yield from inspector.paused_tasks()
    except BrokerReplyError as error:
        return [Finding("warn", "queues", f"cannot see the queues: {error}", f"allow it: ~{prefix}:* +@read")]
    return [*_scheduler(leader, infos), *_queues(infos, workers), *_paused_tasks(paused), *_lost(workers)]


def _paused_tasks(paused: Mapping[str, Sequence[Pause]]) -> Iterator[Finding]:
    for queue, pauses in paused.items():
        for pause in pauses:
            how = f"fastq queues resume {queue} --task {pause.task}" + (" --where …" if pause.where else "")
            yield Finding("warn", "queues", f"{pause} is paused in queue {queue!r}", how)


def _scheduler(leader: str | None, infos: list[QueueInfo]) -> Iterator[Finding]:
    if leader is not None:
        yield Finding("ok", "scheduler", f"{leader} leads")
    else:
        waiting = sum(info.scheduled for info in infos)
        message = f"no scheduler runs: {waiting} scheduled jobs and retries wait, lost leases are not recovered"
        yield Finding("warn", "scheduler", message, "start one: fastq supervise, or fastq scheduler")


def _queues(infos: list[QueueInfo], workers: list[WorkerInfo]) -> Iterator[Finding]:
    for info in infos:
        live = [worker for worker in workers if worker.lease_left > 0 and info.name in worker.queues]
        if info.pending and live and all(worker.state != "running" for worker in live):
            message = (
                f"queue {info.name!r} has {info.pending} pending jobs, and no worker of it takes any: {_resting(live)}"
            )
            yield Finding(
                "warn", "queues", message, "SIGCONT to the quiet ones, or to their supervisor; or start another"
            )
        if info.paused:
            yield Finding("warn", "queues", f"queue {info.name!r} is paused", f"fastq queues resume {info.name}")
        elif info.pending and not info.workers:
            message = f"queue {info.name!r} has {info.pending} pending jobs and no worker"
            yield Finding("warn", "queues", message, f"start one: fastq worker --queues {info.name}")
        unserved = [part.name for part in info.partitions if part.pending and not part.workers]
        if unserved and info.workers:
            message = f"nobody serves {', '.join(unserved[:5])}, and jobs are pending there"
            yield Finding("warn", "queues", message, f"replace the workers of {info.name} that know no partitions")


def _resting(workers: list[WorkerInfo]) -> str:
    more = f" and {len(workers) - 5} more" if len(workers) > 5 else ""
    return ", ".join(f"{worker.id} is {worker.state}" for worker in workers[:5]) + more


def _lost(workers: list[WorkerInfo]) -> Iterator[Finding]:
    for worker in workers:
        if worker.lease_left < -LOST:
            message = f"worker {worker.id} lost its lease {-worker.lease_left:.0f} s ago with {worker.running} jobs"
            yield Finding("warn", "recovery", message, "start a scheduler: it hands them back")
