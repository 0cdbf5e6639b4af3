"""remember.lua: the first result of a step stays."""

from __future__ import annotations

from fastq.broker import commands
from tests.redis.lab import Lab


def test_the_first_result_stays_and_the_steps_of_a_job_go_together(lab: Lab) -> None:
    command = commands.remember(lab.q, "a", "charge", b"first", 60_000)
    assert lab.twice(command) == (b"first", b"first")
    assert lab.call(commands.remember(lab.q, "a", "charge", b"second", 60_000)) == b"first"
    assert lab.call(commands.remember(lab.q, "a", "mail", b"sent", 90_000)) == b"sent"
    assert lab.value("steps:a") == {"charge": b"first", "mail": b"sent"}
    assert 60_000 < lab.raw.pttl(lab.key("steps:a")) <= 90_000
    assert lab.call(commands.recall(lab.q, "a", "mail")) == b"sent"
    assert lab.call(commands.recall(lab.q, "b", "mail")) is None
