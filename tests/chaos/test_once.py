"""What is to happen once, while workers are killed."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

from tests.conftest import eventually
from tests.process.fleet import PATIENCE, Fleet

MakeFleet = Callable[..., Fleet]


def test_an_idempotent_call_is_one_job_and_one_charge_across_a_kill(
    make_fleet: MakeFleet, redis_url: str, raw: Any
) -> None:
    """F305, F306, F312: concurrent duplicates, before and after the SIGKILL of the worker that runs the job."""
    fleet = make_fleet(redis_url, workers=2, concurrency=2).serving()
    gate = str(fleet.gate())
    assert fleet.producer  # made before there are threads: each of them would make one
    with concurrent.futures.ThreadPoolExecutor(8) as threads:

        def call(_: int) -> str:
            return fleet.enqueue("charged", "k", gate)

        ids = set(threads.map(call, range(40)))
        assert len(ids) == 1
        (job_id,) = ids
        first = fleet.until_started("k").of("s", "k")[0].pid
        eventually(lambda: raw.hget(f"fastq:{{default}}:steps:{job_id}", "charge"), PATIENCE)
        fleet.kill(first)
        ids |= set(threads.map(call, range(40)))
        eventually(lambda: len(fleet.story().of("s", "k")) == 2, PATIENCE)
        fleet.gate().touch()
        fleet.until_done(["k"])
        eventually(lambda: (status := fleet.producer.get_status_sync(job_id)) and status.state.final, PATIENCE)
        ids |= set(threads.map(call, range(40)))
    status = fleet.producer.get_status_sync(job_id)
    assert status is not None
    assert ids == {job_id}
    assert (status.state, status.result) == ("success", first), "the step of the dead worker was not called again"
    assert len(fleet.story().of("s", "k")) == 2
    assert [event.pid for event in fleet.story().of("p", "k")] == [first]


def test_a_step_that_is_called_twice_is_found(make_fleet: MakeFleet, redis_url: str, raw: Any) -> None:
    """The planted bug `forgets_steps`: the second run charges once more, and the analysis above sees it."""
    fleet = make_fleet(redis_url, workers=2, concurrency=2).serving(plant="forgets_steps")
    job_id = fleet.enqueue("charged", "k", str(fleet.gate()))
    first = fleet.until_started("k").of("s", "k")[0].pid
    eventually(lambda: raw.hget(f"fastq:{{default}}:steps:{job_id}", "charge"), PATIENCE)
    fleet.kill(first)
    eventually(lambda: len(fleet.story().of("p", "k")) == 2, PATIENCE)
