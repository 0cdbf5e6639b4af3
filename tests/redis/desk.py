"""What the tests of the inspector and of the command line look at: one queue, filled through the commands themselves."""

from __future__ import annotations

from typing import Any

import msgspec

from fastq.broker import commands
from fastq.broker.command import raw
from fastq.broker.commands import Batch, NewJob
from fastq.broker.connection import SyncConnection
from fastq.broker.inspector import Inspector, QueueInfo
from fastq.broker.keys import QueueKeys, bucket_of
from fastq.broker.url import parse_url
from fastq.broker.views import clock
from fastq.job import Envelope, ErrorInfo, Extra, JobRecord, WorkerCard, encode
from tests.conftest import eventually

NOT_MSGPACK = b"\xc1 not an envelope"


class Bench:
    """One queue, filled and worked on through the commands themselves."""

    def __init__(self, url: str, queue: str = "mail") -> None:
        self.connection = SyncConnection.to(parse_url(url))
        self.connection.connect()
        self.inspector = Inspector("fastq")
        self.queue = queue
        self.q = QueueKeys("fastq", queue)
        self.sequence = 0

    def now(self) -> int:
        return self.connection.clock.now_ms()

    def tick(self) -> None:
        """Let Redis's clock go to its next millisecond."""
        begun = self.connection.call(clock())
        eventually(lambda: self.connection.call(clock()) > begun)

    def run(self, operation: Any) -> Any:
        return self.connection.run(operation)

    def put(self, *ids: str, priority: int = 5, delay_ms: int = 0, age: int = 0, extra: Extra | None = None) -> None:
        jobs = [NewJob(i, self.envelope(priority, age, extra), delay_ms, chosen=True) for i in ids]
        self.put_raw(jobs, priority)

    def put_raw(self, jobs: list[NewJob], priority: int = 5) -> None:
        self.sequence += 1
        assert self.connection.call(commands.enqueue(self.q, priority, "p", self.sequence, jobs)) == []
        self.connection.call(raw("SADD", "fastq:queues", self.queue))

    def envelope(self, priority: int = 5, age: int = 0, extra: Extra | None = None, attempt: int = 0) -> bytes:
        body = encode({"to": "a@example.org"})
        return encode(Envelope(priority, 1, "send", body, self.now() - age * 1_000, attempt, extra))

    def worker(self, name: str = "w1", lease_ms: int = 15_000, info: bytes | None = None) -> str:
        card = encode(WorkerCard("host-a", 42, 100, self.now(), "0.1.0")) if info is None else info
        self.connection.call(commands.register(self.q, name, lease_ms, card))
        return name

    def reserve(self, worker: str, want: int = 100) -> list[str]:
        return [i.decode() for i in self.connection.call(commands.reserve(self.q, worker, want)).ids]

    def hold(self, worker: str, *ids: str) -> None:
        """Reserve just these jobs, whatever else waits."""
        moves = [[raw("LREM", self.q.ready[5], 1, i), raw("SADD", self.q.running(worker), i)] for i in ids]
        self.connection.call_many([command for move in moves for command in move])

    def bury(self, *ids: str, extra: Extra | None = None, envelope: bytes | None = None, attempts: int = 5) -> None:
        """These jobs fail for good."""
        self.put(*ids, extra=extra)
        worker = self.worker("undertaker")
        batch = Batch()
        self.hold(worker, *ids)
        for i in ids:
            error = ErrorInfo("exception", "ValueError", f"no {i}", "Traceback", attempts, self.now(), "host-a")
            batch.failed.append((i, envelope or self.envelope(extra=extra, attempt=attempts), encode(error)))
        assert self.connection.call(commands.settle(self.q, worker, batch, 100_000)).stale == []
        self.leave(worker)

    def finish(self, *ids: str, state: str = "success", ttl: float = 60, result: Any = None) -> None:
        self.put(*ids)
        worker = self.worker("finisher")
        name, expires = bucket_of(ttl, self.now())
        batch = Batch()
        self.hold(worker, *ids)
        for i in ids:
            kept = msgspec.Raw(encode(result))
            record = JobRecord(state, "send", self.now() - 20, self.now() - 10, self.now(), 1, kept)
            batch.recorded.append((name, expires, i, encode(record)))
        self.connection.call(commands.settle(self.q, worker, batch, 100))
        self.leave(worker)

    def leave(self, worker: str) -> None:
        self.connection.call(
            commands.recover(self.q, worker, expired=False, charge="none", max_deliveries=3, dead_max=100)
        )

    def info(self) -> QueueInfo:
        info = self.run(self.inspector.queue(self.queue))
        assert info is not None
        return info

    def state(self, job_id: str) -> str | None:
        status = self.run(self.inspector.status(job_id))
        return status and status.state
