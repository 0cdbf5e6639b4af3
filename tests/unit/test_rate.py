"""The rate of a worker: steady where the load is, quick where it breaks in, and never deceived by jobs that end together."""

from __future__ import annotations

from fastq.worker.rate import LEAST, RISE, SMOOTH, Rate

SLOTS = 100


def test_a_steady_load_is_measured() -> None:
    rate = Rate(0.0, SLOTS)
    assert [rate.measure(0.1 * tick, 500 * tick) for tick in range(1, 31)] == [500] * 30
    assert abs(rate.value - 5_000) < 1


def test_one_tick_says_little() -> None:
    """Smoothed over SMOOTH seconds, up and down alike."""
    rate = Rate(0.0, SLOTS)
    rate.measure(0.1, 900)
    assert abs(rate.value - 9_000 * 0.1 / SMOOTH) < 1e-6
    before = rate.value
    rate.measure(0.2, 900)
    assert abs(rate.value - before * (1 - 0.1 / SMOOTH)) < 1e-6


def test_a_rise_is_noticed_before_the_next_tick() -> None:
    """A load of 50,000 a second breaks in: most of it is known after 90 ms; by ticks alone it takes 300."""
    rate, finished, now = Rate(0.0, SLOTS), 0, 0.0
    while rate.value < 35_000:
        now += 0.002
        finished += SLOTS
        rate.notice(now, finished)
    assert now <= 3 * RISE
    slow, ticks = Rate(0.0, SLOTS), 0
    while slow.value < 35_000:
        ticks += 1
        slow.measure(0.1 * ticks, 5_000 * ticks)
    assert ticks >= 3


def test_what_was_noticed_is_not_measured_again() -> None:
    """The next tick takes its rate from there on; but all that ended since the last one are signs that jobs do end."""
    rate = Rate(0.0, SLOTS)
    rate.notice(0.06, 3_000 + SLOTS)
    assert rate.value == 50_000
    assert rate.measure(0.1, 5_000 + SLOTS) == 5_000 + SLOTS
    assert abs(rate.value - 50_000) < 1e-6
    rate.notice(0.16, 9_000 + SLOTS)
    assert rate.measure(0.2, 9_000 + SLOTS) == 4_000, "noticed just before the tick"


def test_waves_are_no_rise() -> None:
    """All slots in step, a wave each 49 ms: two of them fall into a tick, and are seen as what they are at most."""
    rate, now, tick, wave, most = Rate(0.0, SLOTS), 0.0, 0.1, 0.049, 0.0
    finished = 0
    for _ in range(400):
        if wave < tick:
            now, wave, finished = wave, wave + 0.049, finished + SLOTS
            rate.notice(now, finished)
        else:
            now, tick = tick, tick + 0.1
            assert rate.measure(now, finished) > 0, "jobs end all the time: nothing is to be handed back"
        most = max(most, rate.value)
    assert most < 1.2 * SLOTS / 0.049


def test_jobs_that_end_together_are_no_rate() -> None:
    """All slots end at once: nobody knows yet how long the next ones take."""
    rate = Rate(0.0, SLOTS)
    rate.notice(0.05, SLOTS)
    assert rate.value == 0.0
    rate.notice(0.05, SLOTS + 1)
    assert rate.value > 0.0


def test_too_short_a_time_is_no_rate() -> None:
    rate = Rate(0.0, SLOTS)
    rate.notice(LEAST / 2, 10 * SLOTS)
    assert rate.value == 0.0
    rate.notice(LEAST, 10 * SLOTS)
    assert rate.value > 0.0


def test_a_look_in_between_never_lowers_the_rate() -> None:
    rate = Rate(0.0, SLOTS)
    rate.measure(1.0, 50_000)
    rate.notice(1.1, 50_000 + SLOTS + 1)
    assert rate.value == 50_000
    assert rate.measure(1.1, 50_000 + SLOTS + 1) == SLOTS + 1, "nor takes the jobs from the next tick"


def test_what_did_not_start_is_forgotten() -> None:
    rate = Rate(0.0, SLOTS)
    rate.measure(1.0, 50_000)
    rate.forget()
    assert rate.value == 0.0
    assert rate.measure(1.1, 50_000) == 0
