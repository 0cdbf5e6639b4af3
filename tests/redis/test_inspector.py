"""The inspector on a real server: what it sees is what the scripts wrote, what it repairs stays repaired."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from fastq.broker import commands
from fastq.broker.command import raw
from fastq.broker.commands import Batch, NewJob
from fastq.broker.connection import AsyncConnection
from fastq.broker.inspector import PAGE
from fastq.broker.url import parse_url
from fastq.errors import BrokerReplyError, InvalidOption, InvalidQueueName, UndecodableJob
from fastq.job import Extra, JobRecord, JobState, decode_envelope, encode, new_id
from tests.redis.desk import NOT_MSGPACK, Bench


@pytest.fixture
def bench(redis_url: str) -> Iterator[Bench]:
    made = Bench(redis_url)
    yield made
    made.connection.close()


@pytest.fixture
def other(redis_url: str) -> Iterator[Bench]:
    made = Bench(redis_url, "bulk")
    yield made
    made.connection.close()


# -- queues -----------------------------------------------------------------------------------


def test_a_queue_in_numbers(bench: Bench) -> None:
    """F189: the size of every part of a queue."""
    bench.put("a", "b", age=7)
    bench.put("urgent", priority=10)
    bench.put("later", delay_ms=60_000)
    bench.bury("x")
    bench.finish("y", "z")
    held = bench.reserve(bench.worker(), 1)
    bench.put("fresh", priority=10)
    info = bench.info()
    assert (held, info.name, info.pending, info.ready) == (["urgent"], "mail", 3, {10: 1, 5: 2})
    assert (info.scheduled, info.running, info.dead, info.finished, info.workers) == (1, 1, 1, 2, 1)
    assert info.oldest_age is not None
    assert 7 <= info.oldest_age < 60
    assert not info.paused


def test_a_retry_is_as_old_as_its_due_time(bench: Bench) -> None:
    """Else a job that is retried once a day would look like a day of backlog."""
    bench.put("a", age=86_400, extra=Extra(due_at=bench.now() - 3_000))
    age = bench.info().oldest_age
    assert age is not None
    assert 3 <= age < 60


def test_cancelled_jobs_are_not_pending(bench: Bench) -> None:
    """The ids stay in their lists until a worker skips them; counts, ages and pages must see through that."""
    bench.put(*(f"gone-{i}" for i in range(120)), age=100)
    bench.put("here", age=5)
    for i in range(120):
        assert bench.run(bench.inspector.cancel(f"gone-{i}")) == "cancelled"
    info = bench.info()
    assert info.pending == 1
    assert info.oldest_age is not None
    assert 5 <= info.oldest_age < 60
    assert [job.id for job in bench.run(bench.inspector.jobs("mail", "pending", 0, PAGE))] == ["here"]


def test_an_unknown_queue_is_none(bench: Bench) -> None:
    assert bench.run(bench.inspector.queue("nope")) is None
    assert bench.run(bench.inspector.queues()) == []
    assert bench.run(bench.inspector.overview()) == []


def test_a_queue_that_only_workers_serve_is_known(bench: Bench) -> None:
    bench.worker()
    assert bench.info().workers == 1


def test_overview_of_many_queues_takes_three_round_trips(bench: Bench, redis_url: str) -> None:
    for name in ("a", "b", "c"):
        one = Bench(redis_url, name)
        one.put(f"{name}-1", f"{name}-2")
        one.connection.close()
    operation, trips = bench.inspector.overview(), 0
    step = next(operation)
    with pytest.raises(StopIteration) as stop:
        while True:
            trips += 1
            many = isinstance(step, list)
            step = operation.send(bench.connection.call_many(step) if many else bench.connection.call(step))
    assert [(info.name, info.pending) for info in stop.value.value] == [("a", 2), ("b", 2), ("c", 2)]
    assert trips == 3


def test_names_that_cannot_be_queues_are_not_shown(bench: Bench, raw: Any) -> None:
    """A-06: whoever can write to Redis can put anything into the set of queues."""
    bench.put("a")
    raw.sadd("fastq:queues", "}evil{", "<script>", b"\xff\xfe", "x" * 65)
    assert bench.run(bench.inspector.queues()) == ["mail"]


def test_a_bad_queue_name_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidQueueName, match="no}pe"):
        bench.run(bench.inspector.queue("no}pe"))


def test_pause_and_resume(bench: Bench, raw: Any) -> None:
    worker = bench.worker()
    assert bench.run(bench.inspector.pause("mail")) is True
    assert bench.run(bench.inspector.pause("mail")) is False
    bench.put("a")
    raw.delete("fastq:{mail}:wake")
    assert bench.info().paused
    assert bench.reserve(worker) == []
    assert bench.run(bench.inspector.resume("mail")) is True
    assert raw.lrange("fastq:{mail}:wake", 0, -1) == [b"1"], "an idle worker waits for this token"
    assert bench.run(bench.inspector.resume("mail")) is False
    assert raw.llen("fastq:{mail}:wake") == 1
    assert bench.reserve(worker) == ["a"]


def test_purge_leaves_what_runs(bench: Bench, raw: Any) -> None:
    worker = bench.worker()
    bench.put("running")
    assert bench.reserve(worker) == ["running"]
    bench.put(*(f"job-{i}" for i in range(1_100)))
    bench.put("later", delay_ms=60_000)
    assert bench.run(bench.inspector.purge("mail")) == 1_101
    assert bench.run(bench.inspector.purge("mail")) == 0
    assert (bench.info().pending, bench.info().scheduled, bench.info().running) == (0, 0, 1)
    assert set(raw.hkeys("fastq:{mail}:jobs")) - {k for k in raw.hkeys("fastq:{mail}:jobs") if len(k) > 64} == {
        b"running"
    }


# -- workers ------------------------------------------------------------------------------------


def test_workers_of_one_and_of_all_queues(bench: Bench, other: Bench) -> None:
    bench.put("a")
    other.put("b", "c")
    for each in (bench, other):
        each.worker()
        each.reserve("w1")
    (worker,) = bench.run(bench.inspector.workers())
    assert (worker.id, worker.queues, worker.running) == ("w1", ["bulk", "mail"], 3)
    assert (worker.host, worker.pid, worker.concurrency, worker.version) == ("host-a", 42, 100, "0.1.0")
    assert 0 < worker.lease_left <= 15
    assert worker.started_at == pytest.approx(bench.now() / 1_000, abs=60)
    assert [w.running for w in bench.run(bench.inspector.workers("mail"))] == [1]
    assert bench.run(bench.inspector.workers("nope")) == []


def test_a_worker_whose_lease_ran_out_is_shown_but_not_counted(bench: Bench) -> None:
    bench.put("a")
    bench.worker("late", lease_ms=-5_000)
    (worker,) = bench.run(bench.inspector.workers("mail"))
    assert worker.lease_left < -4
    assert bench.info().workers == 0


@pytest.mark.parametrize("card", [b"", b"\xc1", encode(["host", "not a pid"]), encode({"host": 1})])
def test_a_card_that_cannot_be_read_hides_no_worker(bench: Bench, card: bytes) -> None:
    bench.worker(info=card)
    (worker,) = bench.run(bench.inspector.workers("mail"))
    assert (worker.id, worker.host, worker.pid) == ("w1", "", 0)


def test_the_leader_of_the_schedulers(bench: Bench) -> None:
    assert bench.run(bench.inspector.leader()) is None
    bench.connection.call(commands.lead(bench.inspector._global, "scheduler-1", 5_000))
    assert bench.run(bench.inspector.leader()) == "scheduler-1"


# -- one job --------------------------------------------------------------------------------------


def test_status_in_every_state(bench: Bench) -> None:
    bench.put("running")
    worker = bench.worker()
    bench.reserve(worker)
    bench.put("pending", priority=8)
    bench.put("scheduled", delay_ms=60_000, extra=Extra(error="ValueError: once"))
    bench.bury("failed", attempts=5)
    bench.finish("success", result={"sent": True})

    scheduled = bench.run(bench.inspector.status("scheduled"))
    assert (scheduled.state, scheduled.last_error) == (JobState.SCHEDULED, "ValueError: once")
    assert scheduled.due_at == pytest.approx(bench.now() / 1_000 + 60, abs=30)
    running = bench.run(bench.inspector.status("running"))
    assert (running.state, running.worker, running.task) == ("running", "w1", "send")
    failed = bench.run(bench.inspector.status("failed", "mail"))
    assert (failed.state, failed.attempts, failed.last_error) == ("failed", 5, "ValueError: no failed")
    success = bench.run(bench.inspector.status("success"))
    assert (success.state, success.result, success.attempts) == ("success", {"sent": True}, 1)
    assert success.enqueued_at < success.started_at < success.finished_at


def test_status_of_a_pending_job(bench: Bench) -> None:
    bench.put("a", priority=8)
    status = bench.run(bench.inspector.status("a"))
    assert (status.state, status.priority, status.queue, status.attempts) == ("pending", 8, "mail", 0)
    assert status.enqueued_at == pytest.approx(bench.now() / 1_000, abs=30)


@pytest.mark.parametrize("job_id", ["nope", "", "x" * 1_000, "a b", "\udcff", "a\r\nDEL fastq:queues"])
def test_an_unknown_id_is_no_error(bench: Bench, job_id: str) -> None:
    bench.put("a")
    assert bench.run(bench.inspector.status(job_id)) is None
    assert bench.run(bench.inspector.cancel(job_id)) == "unknown"
    assert bench.run(bench.inspector.retry(job_id)) == "unknown"
    assert bench.run(bench.inspector.dead_show(job_id)) is None
    assert bench.run(bench.inspector.replay_report("mail", [job_id])).missing == [job_id]
    assert bench.run(bench.inspector.purge_dead("mail", [job_id])) == 0


def test_of_two_queues_with_one_id_the_living_job_is_meant(bench: Bench, other: Bench) -> None:
    other.finish("same")
    bench.put("same")
    assert bench.state("same") == "pending"
    assert bench.run(bench.inspector.status("same", "bulk")).state == "success"


def test_a_worker_that_comes_while_we_ask_is_seen(bench: Bench, redis_url: str) -> None:
    """status.lua can say "running" only for workers it is told of: a change under way makes the inspector ask again."""
    bench.put("a")
    operation = bench.inspector.status("a")
    step = bench.connection.call(next(operation))  # the queues
    leases = operation.send(step)
    asked = operation.send(bench.connection.call_many(leases))  # type: ignore[arg-type]
    bench.worker("late")
    bench.reserve("late")
    again = operation.send(bench.connection.call_many(asked))  # type: ignore[arg-type]
    with pytest.raises(StopIteration) as stop:
        operation.send(bench.connection.call_many(again))  # type: ignore[arg-type]
    assert (stop.value.value.state, stop.value.value.worker) == ("running", "late")


def test_an_envelope_that_cannot_be_read_is_shown_as_such(bench: Bench) -> None:
    bench.put_raw([NewJob("odd", NOT_MSGPACK)])
    status = bench.run(bench.inspector.status("odd"))
    assert (status.state, status.task) == ("pending", None)
    assert "cannot be decoded" in status.last_error
    assert bench.info().oldest_age is None
    assert bench.run(bench.inspector.cancel("odd")) == "cancelled"


def test_a_record_that_cannot_be_read_is_named(bench: Bench, raw: Any) -> None:
    bench.finish("a", "b")
    (bucket,) = raw.zrange("fastq:{mail}:done", 0, -1)
    raw.hset(b"fastq:{mail}:done:" + bucket, "a", NOT_MSGPACK)
    with pytest.raises(UndecodableJob, match="'a' in queue 'mail'"):
        bench.run(bench.inspector.status("a"))
    assert [job.id for job in bench.run(bench.inspector.jobs("mail", "success"))] == ["b"]


# -- cancel and retry -----------------------------------------------------------------------------


@pytest.mark.parametrize("delay_ms", [0, 60_000])
def test_a_cancelled_job_leaves_a_record(bench: Bench, delay_ms: int) -> None:
    bench.put("a", delay_ms=delay_ms)
    assert bench.run(bench.inspector.cancel("a")) == "cancelled"
    assert bench.run(bench.inspector.cancel("a")) == "unknown"
    status = bench.run(bench.inspector.status("a"))
    assert (status.state, status.task, status.started_at) == ("cancelled", "send", None)
    assert [job.id for job in bench.run(bench.inspector.jobs("mail", "cancelled"))] == ["a"]
    assert bench.reserve(bench.worker()) == []


def test_a_job_that_wants_no_trace_leaves_none(bench: Bench, raw: Any) -> None:
    bench.put("a", extra=Extra(result_ttl=0))
    assert bench.run(bench.inspector.cancel("a")) == "cancelled"
    assert bench.state("a") is None
    assert raw.exists("fastq:{mail}:done") == 0


def test_the_record_of_a_cancelled_job_lives_as_long_as_it_says(bench: Bench, raw: Any) -> None:
    bench.put("a", extra=Extra(result_ttl=100))
    bench.run(bench.inspector.cancel("a"))
    (bucket,) = raw.keys("fastq:{mail}:done:*")
    assert 100_000 <= raw.pttl(bucket) <= 126_000


def test_the_worker_of_a_running_job_is_asked(bench: Bench) -> None:
    bench.put("a")
    bench.reserve(bench.worker())
    assert bench.run(bench.inspector.cancel("a")) == "requested"
    assert bench.state("a") == "running"


def test_workers_that_change_under_a_cancel(bench: Bench) -> None:
    """cancel.lua answers "again" when it was told of the wrong workers; the inspector then asks who there is."""
    bench.put("a", "b")
    bench.worker("w1")
    operation = bench.inspector.cancel("a", "mail")
    step, changes = next(operation), 0
    with pytest.raises(StopIteration) as stop:
        while True:
            if not isinstance(step, list) and step.script == "cancel" and changes < 3:
                changes += 1
                bench.worker(f"new-{changes}")
            many = isinstance(step, list)
            step = operation.send(bench.connection.call_many(step) if many else bench.connection.call(step))
    assert (stop.value.value, changes) == ("cancelled", 3)


def test_retry_replays_a_dead_letter(bench: Bench) -> None:
    bench.bury("a")
    assert bench.run(bench.inspector.retry("a")) == "replayed"
    assert bench.state("a") == "pending"
    assert bench.run(bench.inspector.retry("a")) == "pending"


def test_retry_makes_a_scheduled_job_due_now(bench: Bench) -> None:
    bench.put("a", delay_ms=3_600_000)
    assert bench.run(bench.inspector.retry("a")) == "promoted"
    assert bench.state("a") == "pending"
    assert bench.info().scheduled == 0
    assert bench.reserve(bench.worker()) == ["a"]
    assert bench.run(bench.inspector.retry("a")) == "running"


def test_retry_of_a_finished_job_says_so(bench: Bench) -> None:
    bench.finish("a")
    assert bench.run(bench.inspector.retry("a")) == "success"


# -- pages ------------------------------------------------------------------------------------------


def test_pages_of_pending_jobs_go_through_the_priorities(bench: Bench) -> None:
    bench.put(*(f"low-{i}" for i in range(5)), priority=0)
    bench.put(*(f"high-{i}" for i in range(5)), priority=9)
    everything = [*(f"high-{i}" for i in range(5)), *(f"low-{i}" for i in range(5))]
    for offset in range(11):
        page = bench.run(bench.inspector.jobs("mail", "pending", offset, 3))
        assert [job.id for job in page] == everything[offset : offset + 3]


def test_pages_of_scheduled_and_failed_jobs(bench: Bench) -> None:
    for i in range(5):
        bench.put(f"s{i}", delay_ms=60_000 + i)
    assert [job.id for job in bench.run(bench.inspector.jobs("mail", "scheduled", 1, 2))] == ["s1", "s2"]
    for i in range(3):
        bench.bury(f"f{i}")
    jobs = bench.run(bench.inspector.jobs("mail", "failed", 0, 2))
    assert {job.id for job in jobs} < {"f0", "f1", "f2"}
    assert [job.finished_at for job in jobs] == sorted((job.finished_at for job in jobs), reverse=True)


def test_pages_of_running_jobs_go_through_the_workers(bench: Bench) -> None:
    bench.put(*(f"j{i}" for i in range(900)))
    for worker, want in (("w1", 400), ("w2", 0), ("w3", 500)):
        bench.worker(worker)
        bench.reserve(worker, want)
    seen = [
        job.id for at in range(0, 1_000, PAGE) for job in bench.run(bench.inspector.jobs("mail", "running", at, PAGE))
    ]
    assert sorted(seen) == sorted(f"j{i}" for i in range(900))


def test_pages_of_finished_jobs(bench: Bench) -> None:
    bench.finish(*(f"j{i}" for i in range(450)))
    bench.finish(*(f"k{i}" for i in range(50)), ttl=120)
    bench.put("gone")
    bench.run(bench.inspector.cancel("gone"))
    seen = [
        job.id for at in range(0, 600, PAGE) for job in bench.run(bench.inspector.jobs("mail", "success", at, PAGE))
    ]
    assert len(seen) == len(set(seen)) == 500
    assert [job.id for job in bench.run(bench.inspector.jobs("mail", "cancelled"))] == ["gone"]


def test_states_that_do_not_exist(bench: Bench) -> None:
    assert bench.run(bench.inspector.jobs("mail", "waiting")) == []
    with pytest.raises(InvalidOption, match="did you mean 'pending'"):
        bench.run(bench.inspector.jobs("mail", "pendng"))


@pytest.mark.parametrize("state", ["pending", "scheduled", "running", "failed", "success"])
@pytest.mark.parametrize(("offset", "limit"), [(-1, 5), (0, -1), (0, 0), (10**9, 10), (0, 10**9), (2**80, 2**80)])
def test_numbers_are_clamped(bench: Bench, state: str, offset: int, limit: int) -> None:
    """A-07: whatever a page parameter says, at most 200 rows come back and nothing fails."""
    bench.put(*(f"p{i}" for i in range(300)))
    bench.worker()
    bench.reserve("w1", 50)
    assert len(bench.run(bench.inspector.jobs("mail", state, offset, limit))) <= PAGE
    assert len(bench.run(bench.inspector.dead("mail", offset, limit))) <= PAGE


def test_no_look_keeps_redis_busy(bench: Bench, raw: Any) -> None:
    """A-07: with 200,000 jobs of every kind no single command of any view takes 10 ms."""
    fill = """
    for i = 1, 200000 do
      local id = 'job-' .. i
      redis.call('HSET', KEYS[1], id, ARGV[1])
      redis.call('RPUSH', KEYS[2], id)
      redis.call('ZADD', KEYS[3], 4e12 + i, id)
      redis.call('ZADD', KEYS[4], i, id)
      redis.call('HSET', KEYS[5], id, ARGV[1])
      redis.call('HSET', KEYS[6], id, ARGV[2])
    end
    redis.call('ZADD', KEYS[7], 4e12, '60000:1')
    redis.call('PEXPIREAT', KEYS[6], 4000000000000)
    """
    q, now = bench.q, bench.now()
    record = encode(JobRecord("success", "send", now, now, now, 1))
    keys = [q.jobs, q.ready[5], q.due, q.dead, q.dead_jobs, q.bucket("60000:1"), q.done]
    raw.eval(fill, len(keys), *keys, bench.envelope(), record)
    raw.sadd("fastq:queues", "mail")
    raw.config_set("slowlog-log-slower-than", 10_000)
    inspector = bench.inspector
    looks = [
        functools.partial(inspector.jobs, "mail", state, offset, PAGE)
        for state in ("pending", "scheduled", "failed", "success", "cancelled")
        for offset in (0, 100_000, 199_990)
    ]
    looks += [inspector.overview, inspector.workers, functools.partial(inspector.status, "job-77")]
    looks += [functools.partial(inspector.replay_report, "mail", limit=1_000, dry_run=True)]
    for look in looks:
        # The slow log's clock also runs while the server waits for a processor: the quietest of five looks is its work.
        assert min((_slow(bench, raw, look) for _ in range(5)), key=len) == []


def _slow(bench: Bench, raw: Any, look: Callable[[], Any]) -> list[bytes]:
    """The commands of one look that took 10 ms or longer."""
    raw.slowlog_reset()
    bench.run(look())
    return [entry["command"][:60] for entry in raw.slowlog_get()]


# -- dead letters -----------------------------------------------------------------------------------


def test_a_dead_letter_tells_everything(bench: Bench) -> None:
    """F295, F296."""
    bench.bury("a")
    letter = bench.run(bench.inspector.dead_show("a"))
    assert (letter.id, letter.queue, letter.task, letter.attempts) == ("a", "mail", "send", 5)
    assert (letter.reason, letter.error_type, letter.error_message) == ("exception", "ValueError", "no a")
    assert (letter.traceback, letter.host) == ("Traceback", "host-a")
    assert msgspec.msgpack.decode(letter.body) == {"to": "a@example.org"}
    assert letter.failed_at == pytest.approx(bench.now() / 1_000, abs=30)
    assert bench.run(bench.inspector.dead("mail")) == [letter]
    assert bench.run(bench.inspector.dead("nope")) == []


def test_a_dead_letter_of_a_foreign_writer_is_shown(bench: Bench, raw: Any) -> None:
    raw.zadd("fastq:{mail}:dead", {"odd": 1_000})
    raw.hset("fastq:{mail}:dead:jobs", "odd", NOT_MSGPACK)
    raw.hset("fastq:{mail}:dead:errors", "odd", b"\xff")
    raw.zadd("fastq:{mail}:dead", {"hollow": 2_000})
    hollow, odd = bench.run(bench.inspector.dead("mail"))
    assert (odd.task, odd.body, odd.reason) == (None, NOT_MSGPACK, "unknown")
    assert (hollow.id, hollow.task, hollow.body) == ("hollow", None, b"")


def test_a_replay_gives_a_fresh_budget(bench: Bench) -> None:
    """F-48: attempts, errors and expiry are gone, options stay, and the death that was undone is on record."""
    kept = {"timeout": 9.0, "max_attempts": 7, "result_ttl": 33.0, "schedule": "nightly"}
    extra = Extra(error="ValueError: no", expires_at=1, snoozes=4, strays=3, due_at=5, **kept)
    bench.bury("a", extra=extra)
    died = bench.run(bench.inspector.dead_show("a")).failed_at
    assert bench.run(bench.inspector.replay("mail", ["a"])) == 1
    envelope = decode_envelope(bench.connection.call(raw("HGET", bench.q.jobs, "a")))
    assert envelope.attempt == 0
    assert envelope.extra is not None
    assert envelope.extra.due_at == pytest.approx(bench.now(), abs=30_000)
    expected = Extra(due_at=envelope.extra.due_at, replayed_from=round(died * 1_000), **kept)
    assert envelope.extra == expected
    assert msgspec.msgpack.decode(envelope.body) == {"to": "a@example.org"}


def test_a_replay_keeps_the_priority(bench: Bench) -> None:
    bench.bury("a", envelope=bench.envelope(priority=9))
    bench.run(bench.inspector.replay("mail"))
    assert bench.info().ready == {9: 1}


def test_replay_twice_is_once(bench: Bench) -> None:
    """F-48."""
    bench.bury("a", "b", "c")
    assert bench.run(bench.inspector.replay("mail")) == 3
    assert bench.run(bench.inspector.replay("mail")) == 0
    assert bench.run(bench.inspector.replay("mail", ["a", "a", "nope"])) == 0
    assert (bench.info().pending, bench.info().dead) == (3, 0)


def test_a_replay_that_is_killed_half_way_is_finished_by_the_next(bench: Bench) -> None:
    """F-48: 1,000 dead letters, the replayer vanishes between any two commands; every job comes back once."""
    ids = [f"job-{i}" for i in range(1_000)]
    bench.bury(*ids[:500])
    bench.bury(*ids[500:])
    choose = random.Random(48)
    for _ in range(6):
        operation = bench.inspector.replay("mail", limit=None)
        step = next(operation)
        for _ in range(choose.randrange(1, 9)):
            many = isinstance(step, list)
            step = operation.send(bench.connection.call_many(step) if many else bench.connection.call(step))
        operation.close()
    bench.run(bench.inspector.replay("mail", limit=None))
    reserved: list[str] = []
    worker = bench.worker()
    while some := bench.reserve(worker, 500):
        reserved += some
    assert sorted(reserved) == sorted(ids)
    assert bench.info().dead == 0


def test_a_replay_ends_although_its_jobs_die_again(bench: Bench) -> None:
    """What died before the replay began is sent back, once: a job that always fails must not keep it going."""
    bench.bury(*(f"job-{i}" for i in range(120)))
    operation = bench.inspector.replay("mail", limit=None)
    step, replays = next(operation), 0
    with pytest.raises(StopIteration) as stop:
        while True:
            many = isinstance(step, list)
            reply = bench.connection.call_many(step) if many else bench.connection.call(step)
            if not isinstance(step, list) and step.script == "replay":
                replays += 1
                worker = bench.worker("again")
                batch = Batch()
                for i in bench.reserve(worker):
                    batch.failed.append((i, bench.envelope(), b""))
                bench.tick()
                bench.connection.call(commands.settle(bench.q, worker, batch, 1_000))
                bench.leave(worker)
            step = operation.send(reply)
    assert (stop.value.value, replays) == (120, 3)
    assert bench.info().dead == 120


def test_what_cannot_be_read_is_counted_and_stays(bench: Bench, raw: Any) -> None:
    bench.bury(*(f"good-{i}" for i in range(70)))
    for i in range(60):
        raw.zadd("fastq:{mail}:dead", {f"odd-{i}": i})
        raw.hset("fastq:{mail}:dead:jobs", f"odd-{i}", NOT_MSGPACK)
    planned = bench.run(bench.inspector.replay_report("mail", limit=None, dry_run=True))
    assert bench.info().dead == 130
    report = bench.run(bench.inspector.replay_report("mail", limit=None))
    assert (report.replayed, len(report.undecodable), report.missing) == (70, 60, [])
    assert planned == report
    assert bench.info().dead == 60
    assert bench.run(bench.inspector.retry("odd-1")) == "undecodable"


def test_a_replay_is_limited_and_takes_the_oldest_first(bench: Bench) -> None:
    for i in range(3):
        bench.bury(f"job-{i}")
        bench.tick()
    assert bench.run(bench.inspector.replay("mail", limit=2)) == 2
    assert [letter.id for letter in bench.run(bench.inspector.dead("mail"))] == ["job-2"]
    assert bench.run(bench.inspector.replay("mail", limit=0)) == 0


def test_purging_dead_letters(bench: Bench, raw: Any) -> None:
    bench.bury(*(f"new-{i}" for i in range(5)))
    for i in range(1_200):
        raw.zadd("fastq:{mail}:dead", {f"old-{i}": bench.now() - 100_000})
    assert bench.run(bench.inspector.purge_dead("mail", ["new-1", "nope"])) == 1
    assert bench.run(bench.inspector.purge_dead("mail", older_than=50)) == 1_200
    assert bench.run(bench.inspector.purge_dead("mail")) == 4
    assert bench.run(bench.inspector.purge_dead("mail")) == 0
    assert raw.exists("fastq:{mail}:dead", "fastq:{mail}:dead:jobs", "fastq:{mail}:dead:errors") == 0


# -- the movers ---------------------------------------------------------------------------------------


async def test_both_movers_give_the_same(bench: Bench, redis_url: str) -> None:
    bench.put("a", "b")
    bench.bury("x")
    connection = AsyncConnection.to(parse_url(redis_url))
    try:
        inspector = bench.inspector
        assert await connection.run(inspector.status("a")) == bench.run(inspector.status("a"))
        assert await connection.run(inspector.dead("mail")) == bench.run(inspector.dead("mail"))
        ours, theirs = await connection.run(inspector.queue("mail")), bench.info()
        assert msgspec.structs.replace(ours, oldest_age=0) == msgspec.structs.replace(theirs, oldest_age=0)
        assert await connection.run(inspector.replay("mail")) == 1
        with pytest.raises(InvalidOption):
            await connection.run(inspector.jobs("mail", "nope"))
    finally:
        await connection.close()


async def test_an_operation_sees_error_replies(bench: Bench, redis_url: str) -> None:
    """Both movers raise an error reply at the `yield`, and go on with what the operation does about it."""

    def operation(commands_: Any) -> Any:
        try:
            yield commands_
        except BrokerReplyError as error:
            return error.code, (yield raw("PING"))

    wrong = raw("HGET", "only-a-key")
    connection = AsyncConnection.to(parse_url(redis_url))
    try:
        for broken in (wrong, [raw("PING"), wrong]):
            assert bench.run(operation(broken)) == ("ERR", b"PONG")
            assert await connection.run(operation(broken)) == ("ERR", b"PONG")
    finally:
        await connection.close()


def test_ids_of_our_own_are_found(bench: Bench) -> None:
    job_id = new_id()
    bench.put(job_id)
    assert bench.state(job_id) == "pending"
