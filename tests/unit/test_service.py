"""Services: loops that start, stop, wake and survive their errors (DESIGN habit 6: every loop passes the stress test)."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import random
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from fastq.errors import BrokerUnavailable
from fastq.retry import Fixed
from fastq.service import BACKOFF, Service
from tests.unit.service_contract import ManualClock, is_running, stress_start_stop


class Recorder:
    """A step that notes when it ran, and does what the test tells it to."""

    def __init__(self, clock: ManualClock, delay: float = 10.0) -> None:
        self.clock = clock
        self.delay: Any = delay
        self.ran_at: list[float] = []
        self.inside = 0
        self.then: Callable[[], Awaitable[object]] | None = None

    async def __call__(self) -> float:
        assert self.inside == 0, "two steps at a time"
        self.inside += 1
        try:
            self.ran_at.append(self.clock.now)
            if self.then is not None:
                await self.then()
            return self.delay  # type: ignore[no-any-return]
        finally:
            self.inside -= 1


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def step(clock: ManualClock) -> Recorder:
    return Recorder(clock)


@pytest.fixture
def service(clock: ManualClock, step: Recorder) -> Service:
    return Service("test", step, clock=clock)


async def test_the_step_says_when_it_runs_next(service: Service, step: Recorder, clock: ManualClock) -> None:
    async with service:
        await service.settled()
        assert step.ran_at == [0]
        await clock.advance(9.9, service)
        assert step.ran_at == [0]
        step.delay = 1.5
        await clock.advance(4, service)
        assert step.ran_at == [0, 10, 11.5, 13]
        assert service.runs == 4
    assert not is_running(service)
    assert clock.pending == []


async def test_a_pause_without_end_waits_for_wake(service: Service, step: Recorder, clock: ManualClock) -> None:
    step.delay = math.inf
    async with service:
        await service.settled()
        assert clock.pending == []
        await clock.advance(1e9, service)
        assert len(step.ran_at) == 1
        service.wake()
        await service.settled()
        assert len(step.ran_at) == 2


@pytest.mark.parametrize("delay", [0, -5, 0.0])
async def test_no_pause_lets_others_run(service: Service, step: Recorder, delay: float) -> None:
    step.delay = delay

    async def wake_again() -> None:
        service.wake()

    step.then = wake_again
    async with service:
        for _ in range(100):
            await asyncio.sleep(0)
    assert service.runs > 10


async def test_wake_runs_the_step_at_once(service: Service, step: Recorder, clock: ManualClock) -> None:
    async with service:
        await clock.advance(3, service)
        service.wake()
        service.wake()
        await service.settled()
        assert step.ran_at == [0, 3]
        await clock.advance(9.9, service)
        assert step.ran_at == [0, 3]  # the pause began anew
        await clock.advance(0.1, service)
        assert step.ran_at == [0, 3, 13]


async def test_a_wake_during_a_step_is_not_lost(service: Service, step: Recorder) -> None:
    entered, gate = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        entered.set()
        await gate.wait()

    step.then = wait
    async with service:
        await entered.wait()
        service.wake()
        service.wake()
        gate.set()
        await service.settled()
        assert len(step.ran_at) == 2


async def test_wake_of_a_stopped_service_does_nothing(service: Service, step: Recorder) -> None:
    service.wake()
    await service.settled()
    async with service:
        await service.settled()
    service.wake()
    await service.settled()
    assert len(step.ran_at) == 1


# -- errors -----------------------------------------------------------------------------------


async def failing(error: BaseException) -> None:
    raise error


async def test_errors_delay_the_step_and_end_nothing(
    service: Service, step: Recorder, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    step.then = lambda: failing(ZeroDivisionError("no"))
    caplog.set_level(logging.INFO, "fastq.service")
    async with service:
        await clock.advance(600, service)
        gaps = [after - before for before, after in zip(step.ran_at, step.ran_at[1:], strict=False)]
        for failures, gap in enumerate(gaps, 1):
            low, high = BACKOFF.bounds(failures)
            assert low <= gap <= high + 1e-9
        assert len(step.ran_at) > 600 / 15
        assert service.failures == len(step.ran_at)
        assert service.runs == 0
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == service.failures
        assert [bool(record.exc_info) for record in errors[:3]] == [True, False, False]
        assert errors[0].fields["error"] == "ZeroDivisionError: no"  # type: ignore[attr-defined]
        step.then = None
        service.wake()
        await service.settled()
        assert (service.failures, service.runs) == (0, 1)
        assert "service is back" in caplog.text
        await clock.advance(10, service)
        assert service.runs == 2


async def test_an_expected_error_is_a_line_without_traceback(
    service: Service, step: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """F-49: Redis away for an hour is a line every 15 s."""
    step.then = lambda: failing(BrokerUnavailable("cannot reach Redis"))
    async with service:
        await service.settled()
    (record,) = caplog.records
    assert (record.levelno, record.exc_info) == (logging.WARNING, None)


@pytest.mark.parametrize("delay", [None, "5", math.nan, True, [1]])
async def test_a_step_that_returns_no_seconds_has_failed(step: Recorder, clock: ManualClock, delay: Any) -> None:
    step.delay = delay
    service = Service("test", step, clock=clock, backoff=Fixed(1))
    async with service:
        await clock.advance(2, service)
        assert service.failures == 3


async def test_a_cancelled_thing_inside_a_step_is_an_error(
    service: Service, step: Recorder, clock: ManualClock
) -> None:
    """CancelledError ends the loop only if the loop was meant."""
    step.then = lambda: failing(asyncio.CancelledError())
    async with service:
        await clock.advance(5, service)
        assert service.failures > 2
        assert is_running(service)


async def test_a_cancelled_loop_has_ended(service: Service, step: Recorder) -> None:
    """As at the end of asyncio.run: a stop afterwards has nothing to do, a start begins anew."""
    for early in (True, False):
        before = asyncio.all_tasks()
        await service.start()
        (task,) = asyncio.all_tasks() - before
        if not early:
            await service.settled()
        task.cancel()
        await asyncio.wait([task])
        await service.settled()
        assert not is_running(service)
        await service.stop()


# -- start and stop ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pause", [0.0, 0.001, math.inf])
async def test_start_and_stop_in_any_order(seed: int, pause: float) -> None:
    inside, rng = 0, random.Random(seed)

    async def step() -> float:
        nonlocal inside
        assert inside == 0
        inside += 1
        try:
            for _ in range(rng.randint(0, 8)):
                await asyncio.sleep(0)
        finally:
            inside -= 1
        return pause

    await stress_start_stop(lambda: Service("stressed", step), seed=seed)
    assert inside == 0


async def test_a_failing_service_keeps_the_contract_too(caplog: pytest.LogCaptureFixture) -> None:
    async def step() -> float:
        await asyncio.sleep(0)
        raise OSError("no")

    await stress_start_stop(lambda: Service("stressed", step, backoff=Fixed(0)))


async def test_the_stress_test_finds_a_broken_service() -> None:
    class Broken:
        """Whose stop does not wait."""

        task: asyncio.Task[Any] | None = None

        @property
        def running(self) -> bool:
            return self.task is not None and not self.task.done()

        async def start(self) -> None:
            self.task = self.task or asyncio.create_task(asyncio.sleep(60))

        async def stop(self) -> None:
            if self.task is not None:
                self.task.cancel()

    with pytest.raises(AssertionError):
        await stress_start_stop(Broken)


async def test_stop_waits_for_the_step(service: Service, step: Recorder) -> None:
    entered, gate = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        entered.set()
        await gate.wait()

    step.then = wait
    await service.start()
    await entered.wait()
    stopping = asyncio.create_task(service.stop())
    await asyncio.sleep(0)
    assert not stopping.done()
    assert is_running(service)
    gate.set()
    await stopping
    assert (service.runs, step.inside, is_running(service)) == (1, 0, False)


async def test_stop_cancels_a_step_after_its_grace(service: Service, step: Recorder, clock: ManualClock) -> None:
    entered = asyncio.Event()

    async def hang() -> None:
        entered.set()
        await asyncio.Event().wait()

    step.then = hang
    await service.start()
    await entered.wait()
    stopping = asyncio.create_task(service.stop(grace=3))
    await asyncio.sleep(0)
    await clock.advance(2.9)
    await asyncio.sleep(0)
    assert not stopping.done()
    await clock.advance(0.1)
    await stopping
    assert (service.runs, step.inside, is_running(service)) == (0, 0, False)


async def test_a_cancelled_stop_still_stops(service: Service, step: Recorder) -> None:
    entered, gate = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        entered.set()
        await gate.wait()

    step.then = wait
    await service.start()
    await entered.wait()
    stopping = asyncio.create_task(service.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert step.inside == 1, "the step was not touched"
    gate.set()
    await service.settled()
    assert (service.runs, is_running(service)) == (1, False)


async def test_a_start_while_stopping_begins_after_it(service: Service, step: Recorder) -> None:
    entered, gate = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        entered.set()
        await gate.wait()

    step.then = wait
    await service.start()
    await entered.wait()
    stopping = asyncio.create_task(service.stop())
    await asyncio.sleep(0)
    starting = asyncio.create_task(service.start())
    await asyncio.sleep(0)
    step.then = None
    gate.set()
    await asyncio.gather(stopping, starting)
    await service.settled()
    assert (service.runs, is_running(service)) == (2, True)
    await service.stop()


async def test_a_stop_after_a_start_that_waits_wins(service: Service, step: Recorder) -> None:
    entered, gate = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        entered.set()
        await gate.wait()

    step.then = wait
    await service.start()
    await entered.wait()
    calls = []
    for call in (service.stop, service.start, service.stop):
        calls.append(asyncio.create_task(call()))
        await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*calls)
    await service.settled()
    assert (service.runs, is_running(service)) == (1, False)


async def test_a_step_may_stop_its_service(service: Service, step: Recorder) -> None:
    step.then = service.stop
    await service.start()
    await service.settled()
    assert (service.runs, is_running(service)) == (1, False)
    step.then = None
    await service.start()
    await service.settled()
    assert (service.runs, is_running(service)) == (2, True)
    await service.stop()


async def test_a_step_cannot_restart_its_service(service: Service, step: Recorder) -> None:
    """It would wait for its own end."""

    async def restart() -> None:
        await service.stop()
        await service.start()

    step.then = restart
    await service.start()
    await service.settled()
    assert (service.failures, is_running(service)) == (1, False)


async def test_the_context_ends_what_it_began(service: Service) -> None:
    with pytest.raises(KeyError):
        async with service:
            raise KeyError
    assert not is_running(service)


def test_a_service_may_be_started_in_another_loop(service: Service, step: Recorder) -> None:
    async def live() -> None:
        async with service:
            await service.settled()

    asyncio.run(live())
    asyncio.run(live())
    assert service.runs == 2


async def test_nothing_is_kept_of_a_stopped_service(clock: ManualClock) -> None:
    service = Service("test", Recorder(clock), clock=clock)
    async with service:
        await service.settled()
    left = weakref.ref(service)
    del service
    gc.collect()
    assert left() is None


# -- jitter, names ------------------------------------------------------------------------------


async def test_jitter_shortens_the_pause(step: Recorder, clock: ManualClock) -> None:
    """F-43: processes that were started together do not stay together; a deadline is never missed by jitter."""
    service = Service("test", step, clock=clock, jitter=0.2, rng=random.Random(5))
    async with service:
        await clock.advance(1_000, service)
    gaps = [after - before for before, after in zip(step.ran_at, step.ran_at[1:], strict=False)]
    assert 8 <= min(gaps) < 8.2
    assert 9.8 < max(gaps) <= 10
    assert len(set(gaps)) > 90


@pytest.mark.parametrize("jitter", [-0.1, 1.1, math.nan])
def test_jitter_is_a_part(step: Recorder, jitter: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Service("test", step, jitter=jitter)


async def test_the_state_is_shown(service: Service) -> None:
    assert repr(service) == "<Service test: stopped, runs=0, failures=0>"
    async with service:
        assert "fastq:test" in {task.get_name() for task in asyncio.all_tasks()}
        await service.settled()
        assert repr(service) == "<Service test: running, runs=1, failures=0>"


async def test_the_event_loop_s_own_clock() -> None:
    ran = asyncio.Event()
    runs = 0

    async def step() -> float:
        nonlocal runs
        runs += 1
        if runs == 3:
            ran.set()
        return 0.001

    async with Service("test", step):
        await ran.wait()
