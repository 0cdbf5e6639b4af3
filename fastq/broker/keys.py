"""Every key that fastq writes to Redis: its name, type, owner and lifetime.

All keys of a queue carry the hash tag ``{queue}``, those of a limiter ``{limit/<id>}``, those of a leader or a lock
``{lease/<kind>/<name>}``, so every script stays in one slot of a Redis Cluster.
docs/redis_keys.md is printed from :data:`TABLE`.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from fastq.errors import ConfigError
from fastq.limits import check_limiter_id, partition_name

PRIORITIES = 11
"""Ready lists of a queue: priorities 0 to 10."""

NORMAL = 5
"""The priority of most jobs (``job.JobPriority.NORMAL``)."""

PAD = "~fastq-pad~" + "." * 60
"""A member longer than 64 bytes. It keeps a hot SET or HASH a hash table: as a listpack of ~100 entries it would
cost 10 µs per job (measured, see docs/adr/0002-redis-layout.md). No job id is the same: they have no tilde."""


class KeyInfo(NamedTuple):
    """One kind of key."""

    pattern: str
    type: str
    owner: str
    lifetime: str  # "job" | "worker" | "bounded" | "ttl" | "queue" | "limiter"
    meaning: str


TABLE: tuple[KeyInfo, ...] = (
    KeyInfo("{q}:jobs", "hash", "enqueue", "job", "job id -> envelope, for every job that is not finished"),
    KeyInfo("{q}:ready:<0-10>", "list", "enqueue", "job", "ids of pending jobs of one priority, next one first"),
    KeyInfo("{q}:due", "zset", "enqueue", "job", "ids of scheduled jobs and retries by due time in ms"),
    KeyInfo("{q}:due:wake", "list", "enqueue", "bounded", "at most one token: the due set has a new head"),
    KeyInfo("{q}:wake", "list", "enqueue", "bounded", "at most one token: an idle worker should look"),
    KeyInfo(
        "{q}:wake:<worker>",
        "list",
        "cancel",
        "ttl",
        "at most one token: this worker should look, as a job that it holds was cancelled, or it has room again",
    ),
    KeyInfo("{q}:workers", "zset", "worker", "worker", "worker id -> end of its lease in ms"),
    KeyInfo("{q}:info", "hash", "worker", "worker", "worker id -> host, pid, slots (msgpack)"),
    KeyInfo("{q}:running:<worker>", "set", "worker", "worker", "ids the worker holds; membership is the fence"),
    KeyInfo("{q}:deliveries", "hash", "recover", "job", "job id -> workers that died with it"),
    KeyInfo("{q}:ghosts", "hash", "cancel", "job", "job id -> entries in the ready lists that must be skipped"),
    KeyInfo(
        "{q}:cancels", "hash", "cancel", "job", "job id -> what its worker is asked: c tell, t interrupt; its record"
    ),
    KeyInfo("{q}:unique", "hash", "enqueue", "job", "unique key -> job id"),
    KeyInfo("{q}:unique:of", "hash", "enqueue", "job", "job id -> unique key"),
    KeyInfo("{q}:parked", "zset", "park", "job", "limit with parked jobs -> when somebody should look at it, in ms"),
    KeyInfo("{q}:parked:of", "hash", "park", "job", "job id -> the limit that it waits for"),
    KeyInfo("{q}:parked:by:<limit>", "zset", "park", "job", "ids of the jobs that wait for one limit, next one first"),
    KeyInfo(
        "{q}:unique:start",
        "hash",
        "enqueue",
        "job",
        "job id -> unique key that ends when a worker takes the job; `|` latest due time",
    ),
    KeyInfo(
        "{q}:unique:ttl:<key>",
        "string",
        "enqueue",
        "ttl",
        "job id that a unique key named, for as long as the task says",
    ),
    KeyInfo(
        "{q}:said:<producer>:<sequence>", "string", "enqueue", "ttl", "what a call refused, should its reply be lost"
    ),
    KeyInfo("{q}:replicated", "string", "enqueue", "ttl", "written before WAIT, which waits for it and all before it"),
    KeyInfo("{q}:steps:<id>", "hash", "worker", "ttl", "step of a job -> its result (msgpack), see JobContext.once"),
    KeyInfo("{q}:paused", "string", "operator", "queue", "present while the queue is paused"),
    KeyInfo(
        "{q}:paused:tasks", "hash", "operator", "queue", "name of a pause -> the task, and arguments, that it means"
    ),
    KeyInfo("{q}:producers", "hash", "enqueue", "bounded", "producer id -> its last sequence number (µs); pruned"),
    KeyInfo("{q}:ticks", "hash", "scheduler", "queue", "schedule name -> last tick that was dealt with, in ms"),
    KeyInfo("{q}:schedules", "hash", "schedule", "queue", "schedule name -> its definition (msgpack)"),
    KeyInfo("{q}:suspended", "set", "operator", "queue", "names of paused schedules"),
    KeyInfo(
        "{q}:runs",
        "hash",
        "scheduler",
        "queue",
        "schedule name -> its last 20 runs: `tick job_id time state`, a line each",
    ),
    KeyInfo("{q}:dead", "zset", "worker", "bounded", "ids of the dead-letter queue by time of death in ms"),
    KeyInfo("{q}:dead:jobs", "hash", "worker", "bounded", "job id -> envelope"),
    KeyInfo("{q}:dead:errors", "hash", "worker", "bounded", "job id -> error (msgpack)"),
    KeyInfo("{q}:done", "zset", "worker", "bounded", "names of the buckets of finished jobs by their expiry in ms"),
    KeyInfo("{q}:done:<ttl>:<n>", "hash", "worker", "ttl", "job id -> record of a finished job"),
    KeyInfo("{q}:awaited", "hash", "follow", "ttl", "job id -> channels of the processes that wait for its end"),
    KeyInfo(
        "{q}:events",
        "stream",
        "worker",
        "ttl",
        "what happened to watched jobs, the last 10,000; gone 10 minutes after the last one",
    ),
    KeyInfo(
        "{q}:unfolding", "set", "flow_start", "job", "ids of workflows of which more is ripe than one call may begin"
    ),
    KeyInfo(
        "{q}:groups",
        "zset",
        "flow_start",
        "job",
        "ids of workflows and batches that have not ended, by their start in ms",
    ),
    KeyInfo(
        "{q}:batch:<id>:ends",
        "string",
        "batch_open",
        "ttl",
        "two bits per job of a batch: 0 has not ended, 1 success, 2 failed, 3 cancelled",
    ),
    KeyInfo(
        "{q}:batch:<id>",
        "hash",
        "batch_open",
        "ttl",
        "a batch: its counts and callbacks (include/batches.lua); both expire `result_ttl` after its end",
    ),
    KeyInfo(
        "{q}:flow:<id>:states",
        "string",
        "flow_add",
        "ttl",
        "one letter per node of a workflow: w g waiting (job, gather), a under way, s f c ended well, failed, cancelled, G gathered, - room for what a job adds",
    ),
    KeyInfo(
        "{q}:flow:<id>",
        "hash",
        "flow_add",
        "ttl",
        "a workflow: what it is made of and how far it is (include/flows.lua); both expire `result_ttl` after its end",
    ),
    KeyInfo("{q}:tag:<tag>", "zset", "tag", "ttl", "ids of jobs that carry a tag, by when they were enqueued, in ms"),
    KeyInfo("{q}:progress:<id>", "string", "report", "ttl", "how far a running job is (msgpack)"),
    KeyInfo(
        "{q}:logs:<id>",
        "list",
        "report",
        "ttl",
        "the last lines that a job has logged, with the setting job_log_lines",
    ),
    KeyInfo("{l}:rule", "string", "operator", "limiter", "the rule (msgpack) that overrides the configured one"),
    KeyInfo(
        "{l}:state:<key>",
        "hash",
        "acquire",
        "ttl",
        "what was granted: `at`, `debt` | `total`, `oldest`, end of a part in µs -> units | `start`, `count`; `until`: end of a penalty in µs; `pace`, `since`, `recovery`, `halved` of an adaptive one",
    ),
    KeyInfo("{l}:slots:<key>", "zset", "acquire", "ttl", "holder of a slot -> end of its lease in ms"),
    KeyInfo("{l}:wake:<key>", "list", "give_back", "ttl", "at most one token: a slot is free"),
    KeyInfo("{l}:given:<ticket>", "string", "give_back", "ttl", "present for a minute after units were given back"),
    KeyInfo(
        "{l}:known", "string", "acquire", "ttl", "the configured rule (msgpack), as a process that used it last has it"
    ),
    KeyInfo(
        "limits",
        "zset",
        "acquire",
        "bounded",
        "ids of limiters by the time in ms when a process noted them; the latest",
    ),
    KeyInfo("{n}:lease", "hash", "lease", "ttl", "`owner`, `until` (ms), `token` (the last one) of a leader or a lock"),
    KeyInfo("{n}:wake", "list", "lease", "ttl", "at most one token: it was given up"),
    KeyInfo("queues", "set", "enqueue", "queue", "names of all queues"),
    KeyInfo(
        "schedules",
        "hash",
        "schedule",
        "queue",
        "queue -> changes of its schedules so far; `@app` -> when that application's code was last declared, in ms",
    ),
    KeyInfo("leader", "string", "scheduler", "ttl", "id of the leading scheduler"),
    KeyInfo("schema", "string", "agree", "queue", "version of these keys: who does not know it does not start"),
)


def _regex(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(re.escape("{q}"), r"\{[A-Za-z0-9_-]{1,64}(:\d+)?\}")
    escaped = escaped.replace(re.escape("{l}"), r"\{limit/[A-Za-z0-9_.:-]{1,100}\}")
    escaped = escaped.replace("<limit>", "~?[A-Za-z0-9_.:-]{1,100}/~?[A-Za-z0-9_.:-]+")
    escaped = escaped.replace(re.escape("{n}"), r"\{lease/[a-z]+/~?[A-Za-z0-9_.:-]{1,100}\}")
    escaped = re.sub("<(key|ticket|id|tag)>", "~?[A-Za-z0-9_.:@/+=-]+", escaped)
    return re.compile(r"[A-Za-z0-9_.:-]+:" + re.sub(r"<[^>]+>", "[^:]+", escaped) + r"\Z")


@functools.cache
def _known() -> list[tuple[re.Pattern[str], KeyInfo]]:
    return [(_regex(info.pattern), info) for info in TABLE]


def describe(key: str) -> KeyInfo | None:
    """What kind of key this is; None for a name that fastq never writes."""
    return next((info for regex, info in _known() if regex.match(key)), None)


class QueueKeys:
    """The key names of one queue, or of one partition of it (``mail:3``, see :mod:`fastq.partitions`), built once."""

    def __init__(self, prefix: str, queue: str) -> None:
        self.queue = queue
        self.base = f"{prefix}:{{{queue}}}:"
        self._running = ("", b"")  # of the last worker asked for: mostly there is one
        self._takes: tuple[bytes, ...] = ()  # of reserve.lua, for that worker
        self._ends: tuple[bytes, ...] = ()  # of settle.lua, for that worker
        self.jobs = self._name("jobs")
        self.ready = tuple(self._name(f"ready:{priority}") for priority in range(PRIORITIES))
        self.levels = self.ready[::-1]  # highest priority first, as the scripts take them
        self.due = self._name("due")
        self.due_wake = self._name("due:wake")
        self.wake = self._name("wake")
        self.workers = self._name("workers")
        self.info = self._name("info")
        self.deliveries = self._name("deliveries")
        self.ghosts = self._name("ghosts")
        self.cancels = self._name("cancels")
        self.unique = self._name("unique")
        self.unique_of = self._name("unique:of")
        self.parked = self._name("parked")
        self.parked_of = self._name("parked:of")
        self.unique_start = self._name("unique:start")
        self.paused = self._name("paused")
        self.paused_tasks = self._name("paused:tasks")
        self.producers = self._name("producers")
        self.ticks = self._name("ticks")
        self.schedules = self._name("schedules")
        self.suspended = self._name("suspended")
        self.runs = self._name("runs")
        self.dead = self._name("dead")
        self.dead_jobs = self._name("dead:jobs")
        self.dead_errors = self._name("dead:errors")
        self.done = self._name("done")
        self.awaited = self._name("awaited")
        self.events = self._name("events")
        self.groups = self._name("groups")
        self.replicated = self._name("replicated")
        self.unfolding = self._name("unfolding")
        # The keys of enqueue.lua and of enqueue_plain.lua, by priority: as they are, they go with each call.
        self.stores = tuple(
            (self.jobs, ready, self.due, self.due_wake, self.wake, self.producers, self.dead, self.done)
            for ready in self.ready
        )
        self.plain_stores = tuple((self.jobs, ready, self.wake, self.producers) for ready in self.ready)

    def _name(self, name: str) -> bytes:
        return (self.base + name).encode()

    def running(self, worker: str) -> bytes:
        """The SET of job ids that ``worker`` holds."""
        of, name = self._running
        if of != worker:
            name = self._name(f"running:{worker}")
            self._running = (worker, name)
        return name

    def takes(self, worker: str) -> tuple[bytes, ...]:
        """The keys of reserve.lua, which are the same each time."""
        running, takes = self.running(worker), self._takes  # of other threads' workers, perhaps
        if not takes or takes[1] is not running:
            takes = self._takes = (
                self.workers, running, self.jobs, self.wake, self.unique, self.unique_of, self.events, self.groups,
                self.ready[NORMAL], self.paused, self.ghosts, self.deliveries, self.unique_start, self.awaited,
                *(level for level in self.levels if level != self.ready[NORMAL]),
            )  # fmt: skip
        return takes

    def ends(self, worker: str) -> tuple[bytes, ...]:
        """The keys of settle.lua, which are the same each time."""
        running, ends = self.running(worker), self._ends
        if not ends or ends[0] is not running:
            ends = self._ends = (
                running, self.jobs, self.due, self.due_wake, self.wake, self.dead, self.dead_jobs, self.dead_errors, self.deliveries,
                self.unique, self.unique_of, self.done, self.cancels, self.awaited, self.events, self.groups, *self.levels,
            )  # fmt: skip
        return ends

    def wake_of(self, worker: str) -> bytes:
        """The LIST of the token that is for ``worker`` alone."""
        return self._name(f"wake:{worker}")

    def tag(self, name: str) -> bytes:
        """The ZSET of the jobs that carry a tag."""
        return self._name(f"tag:{name}")

    def parked_by(self, limit: str) -> bytes:
        """The ZSET of the jobs that wait for a limit; its name is ``LimitKeys.name``."""
        return self._name(f"parked:by:{limit}")

    def steps(self, job_id: str) -> bytes:
        """The HASH of what steps of a job returned."""
        return self._name(f"steps:{job_id}")

    def said(self, producer: str, sequence: int) -> bytes:
        """The STRING that remembers what one call of a producer refused."""
        return self._name(f"said:{producer}:{sequence}")

    def progress(self, job_id: str) -> bytes:
        """The STRING that says how far a job is."""
        return self._name(f"progress:{job_id}")

    def logs(self, job_id: str) -> bytes:
        """The LIST of lines that a job has logged."""
        return self._name(f"logs:{job_id}")

    def flow(self, workflow: str) -> bytes:
        """The HASH of a workflow."""
        return self._name(f"flow:{workflow}")

    def flow_states(self, workflow: str) -> bytes:
        """The STRING of the letters of its nodes."""
        return self._name(f"flow:{workflow}:states")

    def batch(self, batch: str) -> bytes:
        """The HASH of a batch."""
        return self._name(f"batch:{batch}")

    def batch_ends(self, batch: str) -> bytes:
        """The STRING of how its jobs have ended."""
        return self._name(f"batch:{batch}:ends")

    def bucket(self, name: str) -> bytes:
        """The HASH of finished records with this bucket name (``<ttl>:<n>``)."""
        return self._name(f"done:{name}")


class LimitKeys:
    """The key names of one limiter, or of one partition of it (``key``). Raises ConfigError for an impossible name.

    >>> LimitKeys("fastq", "api", "tenant-42").state
    b'fastq:{limit/api}:state:tenant-42'
    """

    __slots__ = ("base", "key", "known", "limiter", "name", "rule", "slots", "state", "wake", "whole")

    def __init__(self, prefix: str, limiter: str, key: str = "") -> None:
        self.limiter = check_limiter_id(limiter)
        self.key = key
        self.base = f"{prefix}:{{limit/{limiter}}}:"
        partition = partition_name(key)
        self.name = f"{limiter}/{partition}"  # of the limit under which jobs are parked
        self.rule = (self.base + "rule").encode()
        self.known = (self.base + "known").encode()
        self.state = f"{self.base}state:{partition}".encode()
        self.slots = f"{self.base}slots:{partition}".encode()
        self.wake = f"{self.base}wake:{partition}".encode()
        self.whole = (f"{self.base}state:{partition_name('')}".encode(),) if key else ()
        """Of a partition the state of the whole limiter, whose penalty holds for it, too."""

    def given(self, ticket: str) -> bytes:
        """The STRING that remembers one giving back."""
        return f"{self.base}given:{ticket}".encode()


class LeaseKeys:
    """The key names of what one holder at a time has: ``kind`` is ``"leader"`` or another short word, ``name`` any text.

    >>> LeaseKeys("fastq", "leader", "daily_report").lease
    b'fastq:{lease/leader/daily_report}:lease'
    """

    __slots__ = ("lease", "wake")

    def __init__(self, prefix: str, kind: str, name: str) -> None:
        if not name:
            raise ConfigError(f"a {kind} needs a name")
        base = f"{prefix}:{{lease/{kind}/{partition_name(name)}}}:"
        self.lease = (base + "lease").encode()
        self.wake = (base + "wake").encode()


class GlobalKeys:
    """The few keys that belong to no queue; each is used alone."""

    def __init__(self, prefix: str) -> None:
        self.queues = f"{prefix}:queues".encode()
        self.leader = f"{prefix}:leader".encode()
        self.limits = f"{prefix}:limits".encode()
        self.schedules = f"{prefix}:schedules".encode()
        self.schema = f"{prefix}:schema".encode()


def bucket_of(ttl: float, now_ms: int) -> tuple[str, int]:
    """Name and expiry (ms) of the bucket for a record written now that must live at least ``ttl`` seconds.

    A bucket collects what is written in a quarter of the ttl, so a record lives between ttl and 1.25 ttl, and a
    look-up has at most six buckets of one ttl to ask.

    >>> bucket_of(3600, 1_000_000_000)
    ('3600000:1111', 1004400000)
    """
    ttl_ms = max(1_000, round(ttl * 1_000))
    width = max(250, ttl_ms // 4)
    number = now_ms // width
    return f"{ttl_ms}:{number}", (number + 1) * width + ttl_ms


def document() -> str:
    """docs/redis_keys.md."""
    rows = (f"| `fastq:{i.pattern}` | {i.type} | {i.owner} | {i.lifetime} | {i.meaning} |\n" for i in TABLE)
    return _PAGE + "".join(rows)


_PAGE = """\
# Keys in Redis

<!-- printed by `python -m fastq.broker.keys`; do not edit -->

`fastq` is the prefix (setting `prefix`). `{q}` is the queue's name in braces, as in `fastq:{default}:jobs`: the hash tag
keeps a queue in one slot of a cluster. A queue that is split has these keys once more for each partition, as in
`fastq:{default:0}:jobs`; its schedules are under its own name alone. `{l}` is a limiter, as in `fastq:{limit/stripe_api}:rule`; the key of its one
partition is `~all`, and one that does not fit into a key name is `~` and its hash. A limit in `parked` is `<limiter>/<key>`, a paused task `~paused/<task>`.
`{n}` is a leader or a lock, as in `fastq:{lease/leader/daily_report}:lease`. Times are milliseconds of Redis's clock
since the epoch unless they say µs.

Lifetimes: `job`: an entry goes with its job. `worker`: it goes with its worker, at the latest when its lease is recovered.
`bounded`: trimmed by count or age. `ttl`: the key expires. `queue`: it stays as long as the queue is used. `limiter`: it
stays until an operator removes it.

| key | type | owner | lifetime | meaning |
|---|---|---|---|---|
"""

if __name__ == "__main__":
    print(document(), end="")
