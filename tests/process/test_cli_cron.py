"""``fastq cron`` on what lies in Redis: status, add, run, history, pause, resume, rm."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastq import FastQ
from fastq.broker import commands
from fastq.job import WorkerCard, encode
from tests.process.test_cli import ran


def test_a_task_that_no_worker_knows_is_told(tmp_path: Path, redis_url: str) -> None:
    """On stderr, as is a queue without workers: one may be about to start."""

    def fastq(*words: str) -> Any:
        return ran(tmp_path, *words, FASTQ_REDIS_URL=redis_url)

    add = ("cron", "add", "daily", "reprot", "--cron", "@daily")
    nobody = "fastq: no live worker serves queue default\n"
    assert (fastq("enqueue", "reprot").err, fastq(*add).err) == (nobody, nobody)
    app = FastQ(redis_url)
    card = WorkerCard("host", 1, 10, int(time.time() * 1_000), "0", 0, ["report"])
    app.run_sync(only(commands.register(app.keys("default"), "w", 60_000, encode(card))))
    app.close()
    said = "fastq: no live worker of queue default knows task reprot - did you mean 'report'?\n"
    for words in (("enqueue", "reprot"), add):
        told = fastq(*words)
        assert (told.code, told.err) == (0, said), words
        assert told.out
    assert fastq("enqueue", "report").err == ""
    said = "fastq: no live worker serves queue defualt - did you mean 'default'?\n"
    assert fastq("enqueue", "report", "-q", "defualt").err == said


def only(command: Any) -> Any:
    return (yield command)


def test_a_schedule_s_life_from_the_command_line(tmp_path: Path, redis_url: str, raw: Any) -> None:
    def fastq(*words: str) -> Any:
        return ran(tmp_path, *words, FASTQ_REDIS_URL=redis_url)

    assert fastq("cron", "status").out == "there is no schedule\n"
    added = fastq(
        "cron", "add", "daily", "report", "--cron", "0 9 * * *", "--tz", "Europe/Berlin", "--args", '{"kind": "x"}'
    )
    assert (added.code, added.out, added.err) == (
        0,
        "daily: At 09:00 every day (Europe/Berlin)\n",
        "fastq: no live worker serves queue default\n",
    )
    assert fastq("cron", "add", "ping", "health", "--every", "5m", "--overlap", "skip", "--queue", "ops").code == 0
    lines = fastq("cron", "status").out.splitlines()
    assert lines[0].split() == ["NAME", "TASK", "QUEUE", "SCHEDULE", "NEXT", "LAST", "STATUS", "FROM"]
    assert [line.split()[:3] for line in lines[1:]] == [["ping", "health", "ops"], ["daily", "report", "default"]]
    job = fastq("cron", "run", "daily").out.strip()
    assert raw.lrange("fastq:{default}:ready:5", 0, -1) == [job.encode()]
    history = fastq("cron", "history", "daily", "--json").json
    assert [(run["tick"], run["job_id"], run["state"]) for run in history] == [(None, job, "open")]
    assert "by hand" in fastq("cron", "history", "daily").out
    assert fastq("cron", "pause", "daily").out == "daily is paused\n"
    assert {i["id"]: i["paused"] for i in fastq("cron", "status", "--json").json} == {"ping": False, "daily": True}
    assert fastq("cron", "resume", "daily").out == "daily goes on\n"
    assert fastq("cron", "rm", "daily").out == "daily is removed\n"
    gone = fastq("cron", "rm", "pin")
    assert (gone.code, gone.err) == (1, "fastq: no schedule is named 'pin' - did you mean 'ping'?\n")
    assert fastq("cron", "add", "x", "report").code == 2
    wrong = fastq("cron", "add", "x", "report", "--cron", "0 9 * *")
    assert (wrong.code, "4 fields, not 5" in wrong.err) == (2, True)
