"""Schedules made, changed and looked at while everything runs: ``app.schedule`` and ``app.schedules`` (F090-F099, F105, F107, F346)."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import fastq
from fastq import config
from fastq.broker.planner import Planner
from fastq.cron import Cron, Every
from fastq.errors import ConfigError, InvalidOption, TaskDefinitionError, UnknownSchedule, UnknownTask
from fastq.job import Extra, decode_envelope
from fastq.schedules import declared_by
from tests.conftest import eventually_async
from tests.redis.lab import Lab
from tests.redis.test_scheduling import Rig
from tests.redis.workshop import working


@pytest.fixture
def app(redis_url: str) -> Iterator[fastq.FastQ]:
    app = fastq.FastQ(redis_url, default_queue="default")

    @app.task(priority=8, expires=60)
    def report(kind: str = "daily") -> None: ...

    yield app
    app.close()


def rig_of(app: fastq.FastQ, url: str, **options: Any) -> Rig:
    return Rig(url, app, **options)


# -- app.schedule and its relatives -------------------------------------------------------------


async def test_a_schedule_made_at_run_time_fires(app: fastq.FastQ, redis_url: str, lab: Lab) -> None:
    """F105: schedule_interval; a scheduler that runs already takes it in within a second."""
    async with rig_of(app, redis_url).running("lead", "periodic") as rig:
        await rig.ticker.service.settled()
        made = await app.schedule_interval("report", dt.timedelta(seconds=0.1), name="beat", kwargs={"kind": "x"})
        assert made == "beat"
        await eventually_async(lambda: len(lab.ready()) >= 3, timeout=5)
    ticks = sorted(int(job.rpartition("@")[2]) for job in lab.ready())
    assert {(tick - ticks[0]) % 100 for tick in ticks} == {0}, (
        "on the grid; one that came too late for the next is skipped"
    )
    assert len(set(ticks)) == len(ticks)
    envelope = decode_envelope(lab.value("jobs")[lab.ready()[0]])
    assert (envelope.task, envelope.priority) == ("report", 8)
    assert app.tasks["report"].arguments.decode(envelope.body) == ((), {"kind": "x"}) or envelope.body
    assert envelope.extra is not None
    assert envelope.extra.schedule == "beat"
    await app.aclose()


async def test_a_cron_made_at_run_time_is_listed(app: fastq.FastQ, lab: Lab) -> None:
    """F090, F096: schedule(task, cron=…, name=…, tz=…) -> id; list_scheduled says when it runs next."""
    made = await app.schedule("report", cron="0 9 * * *", name="daily-report", tz="Europe/Berlin")
    (info,) = await app.list_scheduled()
    assert (made, info.id, info.task, info.queue) == ("daily-report", "daily-report", "report", "default")
    assert info.schedule == "At 09:00 every day (Europe/Berlin)"
    assert info.next_run == Cron("0 9 * * *", "Europe/Berlin").next(lab.now() / 1_000)
    assert (info.last_run, info.last_status, info.paused, info.source) == (None, None, False, "")
    assert await app.unschedule(made)
    assert not await app.unschedule(made)
    assert await app.list_scheduled() == []
    assert set(lab.keys()) == {"fastq:schedules", "fastq:queues"}
    await app.aclose()


def test_the_sync_twins(app: fastq.FastQ, lab: Lab) -> None:
    app.schedule_sync("report", cron="@daily", name="a")
    app.schedule_interval_sync(app.tasks["report"], 300.0, name="b", args=("weekly",))
    assert next(info.id for info in app.list_scheduled_sync()) == "b"
    app.schedules.pause_sync("b")
    assert {info.id: info.paused for info in app.list_scheduled_sync()} == {"a": False, "b": True}
    app.schedules.resume_sync("b")
    job = app.schedules.run_now_sync("b")
    assert lab.ready() == [job]
    assert [run[1:2] + run[3:] for run in app.schedules.history_sync("b")] == [(job, "open")]
    assert app.unschedule_sync("a")
    assert app.schedules.remove_sync("b")


async def test_the_same_name_again_replaces(app: fastq.FastQ, lab: Lab) -> None:
    """F098, replace_existing: a service calls schedule() at each start; what has not changed goes on where it was."""
    await app.schedule("report", cron="0 9 * * *", name="daily")
    lab.raw.hset(lab.q.ticks, "daily", 1_000)
    await app.schedule("report", cron="0 9 * * *", name="daily")
    await app.schedule("report", cron="0 9 * * *", name="daily", overlap="skip")
    assert lab.value("ticks") == {"daily": b"1000"}
    await app.schedule("report", cron="0 10 * * *", name="daily")
    assert int(lab.value("ticks")["daily"]) == lab.near()
    await app.schedule("report", cron="0 10 * * *", name="daily", queue="other")
    (info,) = await app.list_scheduled()
    assert info.queue == "other"
    assert lab.value("schedules") is None
    await app.aclose()


async def test_what_is_wrong_is_told_at_the_call(app: fastq.FastQ, lab: Lab) -> None:
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TaskDefinitionError, "fields", {"cron": "0 9 * *"}),
        (TaskDefinitionError, "time zone", {"cron": "0 9 * * *", "tz": "Europe/Berln"}),
        (InvalidOption, "overlap", {"cron": "@daily", "overlap": "never"}),
        (InvalidOption, "misfire", {"cron": "@daily", "misfire": "twice"}),
        (InvalidOption, "coalesce", {"cron": "@daily", "misfire": "all", "coalesce": True}),
        (InvalidOption, "max_instances", {"cron": "@daily", "max_instances": 21}),
        (InvalidOption, "time zone", {"cron": "@daily", "start": dt.datetime(2027, 1, 1)}),  # noqa: DTZ001
        (InvalidOption, "before it starts", {"cron": "@daily", "start": dt.datetime(2027, 1, 2, tzinfo=dt.UTC), "end": dt.datetime(2027, 1, 1, tzinfo=dt.UTC)}),
        (InvalidOption, "jitter", {"cron": "@daily", "jitter": 400 * 86_400}),
        (InvalidOption, "did you mean 'overlap'", {"cron": "@daily", "overlapp": "skip"}),
        (fastq.InvalidArguments, "kin", {"cron": "@daily", "kwargs": {"kin": 1}}),
        (InvalidOption, "printable", {"cron": "@daily", "name": "a\nb"}),
    ]  # fmt: skip
    for error, said, options in wrong:
        with pytest.raises(error, match=said):
            await app.schedule("report", **options)
    with pytest.raises(UnknownTask, match="not a task name"):
        await app.schedule("no such task!", cron="@daily")
    with pytest.raises(UnknownSchedule, match="no schedule is named 'x'"):
        await app.schedules.pause("x")
    assert lab.keys() == {}
    await app.aclose()


async def test_a_task_of_another_service_is_scheduled_by_name(app: fastq.FastQ, lab: Lab) -> None:
    await app.schedule("billing.close", cron="@daily", kwargs={"month": 5})
    (info,) = await app.list_scheduled()
    assert (info.id, info.task) == ("billing.close 0 0 * * *", "billing.close")
    with pytest.raises(UnknownSchedule, match="did you mean"):
        await app.schedules.run_now("billing.close 0 0 * *")
    await app.aclose()


# -- what the schedulers make of it ----------------------------------------------------------------


async def test_a_removed_or_paused_schedule_fires_no_more(app: fastq.FastQ, redis_url: str, lab: Lab) -> None:
    """Once the call has returned, whatever the leader has in memory."""
    await app.schedule_interval("report", 0.1, name="beat")
    async with rig_of(app, redis_url).running("lead", "periodic"):
        await eventually_async(lambda: len(lab.ready()) >= 2)
        await app.schedules.pause("beat")
        fired = lab.ready()
        began = time.monotonic()
        await eventually_async(lambda: time.monotonic() > began + 0.5)
        assert lab.ready() == fired
        await app.schedules.resume("beat")
        await eventually_async(lambda: len(lab.ready()) >= len(fired) + 2, timeout=5)
        await app.unschedule("beat")
        fired = lab.ready()
        began = time.monotonic()
        await eventually_async(lambda: time.monotonic() > began + 0.5)
        assert lab.ready() == fired
    await app.aclose()


async def test_two_leaders_fire_run_time_schedules_once(app: fastq.FastQ, redis_url: str, lab: Lab) -> None:
    """F-54, F099."""
    await app.schedule_interval("report", 0.1, name="beat", misfire="all")
    async with (
        Rig(redis_url, app, lease_key="fastq:one").running("lead", "periodic"),
        Rig(redis_url, app, lease_key="fastq:two").running("lead", "periodic"),
    ):
        await eventually_async(lambda: len(lab.ready()) >= 15)
    ticks = sorted(int(job.rpartition("@")[2]) for job in lab.ready())
    assert {(tick - ticks[0]) % 100 for tick in ticks} == {0}, (
        "on the grid; one that came too late for the next is skipped"
    )
    assert len(set(ticks)) == len(ticks)
    await app.aclose()


async def test_start_end_and_jitter(app: fastq.FastQ, redis_url: str, lab: Lab) -> None:
    now = dt.datetime.now(dt.UTC)
    await app.schedule_interval("report", 0.1, name="later", start=now + dt.timedelta(hours=1))
    await app.schedule_interval("report", 0.1, name="over", end=now - dt.timedelta(hours=1))
    await app.schedule_interval("report", 0.1, name="spread", jitter=3_600)
    async with rig_of(app, redis_url).running("lead", "periodic"):
        await eventually_async(lambda: len(lab.value("due") or ()) >= 3)
        assert lab.ready() == []
    infos = {info.id: info for info in await app.list_scheduled()}
    assert infos["over"].next_run is None
    assert infos["later"].next_run is not None
    assert infos["later"].next_run >= (now + dt.timedelta(hours=1)).timestamp()
    for job, due in lab.value("due"):
        tick = int(job.rpartition("@")[2])
        assert 0 <= due - tick < 3_700_000
        extra = decode_envelope(lab.value("jobs")[job]).extra or Extra()
        assert abs((extra.due_at or 0) - due) < 1_000
        assert (extra.expires_at or 0) >= due + 59_000  # expires=60 counts from then
    await app.aclose()


async def test_a_run_that_ended_is_told(redis_url: str, lab: Lab) -> None:
    """List and history say how the last runs ended, also after the records are gone."""
    app = fastq.FastQ(redis_url)

    @app.task(max_attempts=1, result_ttl=60)
    async def work(bad: bool = False) -> None:
        if bad:
            raise ValueError("bad")

    await app.schedule("work", cron="@yearly", name="good")
    await app.schedule("work", cron="@yearly", name="bad", kwargs={"bad": True})
    rig = Rig(redis_url, app)
    async with rig.running("lead", "periodic"), working(app):
        await app.schedules.run_now("good")
        await app.schedules.run_now("bad")

        async def ended() -> bool:
            states = {info.id: info.last_status for info in await app.list_scheduled()}
            return states == {"good": "success", "bad": "failed"}

        deadline = time.monotonic() + 10
        while not await ended():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        (run,) = await app.schedules.history("good")
        assert (run.tick, run.state) == (None, "success")


@pytest.mark.parametrize("overlap", ["skip", "queue", "cancel"])
async def test_overlap(redis_url: str, lab: Lab, overlap: Any) -> None:
    """F098, max_instances: no two jobs of the schedule live at a time; "cancel" ends the one that still waits."""
    app = fastq.FastQ(redis_url)

    @app.every(0.1, name="beat", overlap=overlap, misfire="all")
    @app.task
    def beat() -> None: ...

    async with Rig(redis_url, app).running("lead", "periodic", "trace"):
        await eventually_async(lambda: len(lab.jobs()) == 1)
        (first,) = lab.jobs()
        for _ in range(50):
            assert len(lab.jobs()) <= 1
            await asyncio.sleep(0.01)
        if overlap == "cancel":
            await eventually_async(lambda: bool(lab.jobs()) and lab.jobs() != {first})
            assert (await app.get_status(first)).state == "cancelled"  # type: ignore[union-attr]
        else:
            assert lab.jobs() == {first}
            lab.raw.delete(lab.q.jobs, lab.q.ready[5])  # it has ended
            await eventually_async(lambda: bool(lab.jobs()), timeout=5)
            (second,) = lab.jobs()
            gap = int(second.rpartition("@")[2]) - int(first.rpartition("@")[2])
            assert gap == 100 if overlap == "queue" else gap >= 500
    await app.aclose()


# -- those of the code ------------------------------------------------------------------------------


def cron_app(url: str, *names: str) -> fastq.FastQ:
    app = fastq.FastQ(url)

    @app.task
    def work() -> None: ...

    for name in names:
        app.cron("@yearly", name=name)(app.tasks["work"])
    return app


async def test_schedules_of_the_code_are_reconciled_and_others_stay(redis_url: str, lab: Lab) -> None:
    """F-18: a removed one disappears at the next start, one made at run time survives, a pause does, too."""
    old = cron_app(redis_url, "kept", "dropped")
    planner = Planner("fastq")
    run = old.run
    await run(planner.declare("shop:app", declared_by(old, "shop:app")))
    await run(planner.declare("other:app", declared_by(cron_app(redis_url, "theirs"), "other:app")))
    await old.schedule("work", cron="@daily", name="mine")
    await old.schedules.pause("kept")
    lab.raw.hset(lab.q.ticks, "kept", 1_000)
    new = cron_app(redis_url, "kept", "added")
    await run(planner.declare("shop:app", declared_by(new, "shop:app")))
    infos = {info.id: (info.source, info.paused) for info in await old.list_scheduled()}
    assert infos == {
        "kept": ("shop:app", True),
        "added": ("shop:app", False),
        "theirs": ("other:app", False),
        "mine": ("", False),
    }
    assert lab.value("ticks")["kept"] == b"1000"
    with pytest.raises(InvalidOption, match="stands in the code of shop:app"):
        await old.schedule("work", cron="@daily", name="kept")
    await old.aclose()


async def test_a_leader_takes_in_what_newer_code_declares(redis_url: str, lab: Lab) -> None:
    """A rolling deploy: the leader still has the old code, the scheduler that was started last has the new one."""
    old, new = cron_app(redis_url, "dropped"), cron_app(redis_url)
    new.every(0.1, name="beat")(new.tasks["work"])
    async with Rig(redis_url, old).running("lead", "periodic", "declare") as leader:
        await eventually_async(lambda: [name for name, _ in leader.ticker.upcoming] == ["dropped"])
        standby = Rig(redis_url, new)
        await standby.ticker.declaring.start()
        await eventually_async(lambda: len(lab.ready()) >= 3, timeout=5)
        assert "dropped" not in lab.value("schedules")
        await standby.close()


async def test_an_empty_redis_gets_the_code_s_schedules_again(redis_url: str, lab: Lab) -> None:
    """F-18: without a reconnect, too."""
    app = cron_app(redis_url, "nightly")
    async with Rig(redis_url, app).running("lead", "periodic"):
        await eventually_async(lambda: lab.raw.hexists("fastq:schedules", "@jobs:app"))
        lab.raw.flushdb()
        await eventually_async(lambda: "nightly" in (lab.value("schedules") or ()), timeout=5)


# -- from settings and in the words of others -------------------------------------------------------


def declared(app: fastq.FastQ, **settings: Any) -> dict[str, Any]:
    app.adopt(config.load(arguments={"url": app.settings.url, **settings}, environ={}).settings)
    return {entry.definition.name: entry.definition for entry in declared_by(app, "x")}


def test_beat_schedule(app: fastq.FastQ) -> None:
    """F093, F094, F107: Celery's dict, its crontab objects, numbers and timedeltas."""
    app.beat_schedule(
        {
            "cleanup-sessions": {"task": "tasks.report", "schedule": fastq.crontab(minute=0, hour="*/6")},
            "daily-report": {"task": "report", "schedule": fastq.crontab(minute=0, hour=8), "args": ("daily",)},
            "sync": {"task": "report", "schedule": 300.0, "options": {"queue": "sync", "expires": 60}},
            "often": {"task": "report", "schedule": dt.timedelta(minutes=5), "kwargs": {"kind": "often"}},
        }
    )
    found = declared(app)
    assert {name: d.cron or d.interval for name, d in found.items()} == {
        "cleanup-sessions": "0 */6 * * *",
        "daily-report": "0 8 * * *",
        "sync": 300.0,
        "often": 300.0,
    }
    assert found["daily-report"].body == app.tasks["report"].arguments.encode(("daily",), {})
    assert found["sync"].expires == 60
    assert found["cleanup-sessions"].task == "report"
    with pytest.raises(ConfigError, match=r"beat_schedule: schedule 'x': .*one of cron, every"):
        app.beat_schedule({"x": {"task": "report"}})
    app.beat_schedule({"lost": {"task": "tasks.reprot", "schedule": 1}})
    with pytest.raises(UnknownTask, match="did you mean 'report'"):
        declared(app)


@pytest.mark.parametrize(
    ("fields", "expression"),
    [
        ({"hour": "*/6"}, "0 */6 * * *"),
        ({"hour": 2, "minute": 0}, "0 2 * * *"),
        ({"minute": "*/15"}, "*/15 * * * *"),
        ({"day": 1, "hour": 9}, "0 9 1 * *"),
        ({"month": 1}, "0 0 1 1 *"),
        ({"day_of_week": "0-4", "hour": 4, "minute": 30}, "30 4 * * MON-FRI"),
        ({"day_of_week": "sun"}, "0 0 * * SUN"),
    ],
)
def test_cron_trigger(fields: dict[str, Any], expression: str) -> None:
    """F097: APScheduler's defaults (finer fields at their least) and its weekdays (0 = Monday)."""
    assert fastq.CronTrigger(**fields).expression == expression


def test_crontab_fields() -> None:
    """F091, F093: 0 = Sunday; lists; a field that is not given matches always."""
    assert fastq.crontab(minute=0).expression == "0 * * * *"
    assert fastq.crontab(0, 9, day_of_week=[1, 3]).expression == "0 9 * * 1,3"
    assert fastq.crontab(0, 0, day_of_week=0) == Cron("0 0 * * 0")


def test_scheduled_job(app: fastq.FastQ) -> None:
    """F097, F098: APScheduler's decorator and the options of its jobs."""

    @app.scheduled_job("cron", hour=2, minute=0, id="cleanup", misfire_grace_time=300, coalesce=True, max_instances=1)
    def cleanup() -> None: ...

    app.scheduled_job("interval", minutes=5, id="ping")(app.tasks["report"])
    found = declared(app)
    assert (found["cleanup"].cron, found["cleanup"].grace, found["cleanup"].misfire) == ("0 2 * * *", 300.0, "once")
    assert (found["cleanup"].overlap, found["cleanup"].most) == ("skip", 1)
    assert found["ping"].interval == 300.0


def test_from_the_environment(app: fastq.FastQ, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    """F346, F109: JOBS_SCHEDULE_JSON, an array with interval_seconds and module:function targets."""
    text = json.dumps([{"name": "cleanup", "interval_seconds": 300, "target": f"{__name__}:app.<locals>.report"},
                       {"name": "nightly", "cron": "0 3 * * *", "task": "report", "misfire": "skip"}])  # fmt: skip
    for variable in ("FASTQ_SCHEDULE_JSON", "JOBS_SCHEDULE_JSON"):
        monkeypatch.setenv(variable, text)
        app.adopt(config.load(arguments={"url": redis_url}).settings)
        found = {entry.definition.name: entry.definition for entry in declared_by(app, "x")}
        assert (found["cleanup"].interval, found["cleanup"].task) == (300.0, "report")
        assert (found["nightly"].cron, found["nightly"].misfire) == ("0 3 * * *", "skip")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("JOBS_SCHEDULE_JSON", "[{")
    app.adopt(config.load(arguments={"url": redis_url}).settings)
    with pytest.raises(ConfigError, match="the setting schedules is no JSON"):
        declared_by(app, "x")


def test_from_a_file(app: fastq.FastQ, tmp_path: Path, redis_url: str) -> None:
    """F095: schedules as configuration, a table each."""
    file = tmp_path / "fastq.toml"
    file.write_text(
        '[schedules.nightly]\ntask = "report"\ncron = "0 3 * * *"\ntz = "Europe/Berlin"\noverlap = "skip"\n'
        'start = 2027-01-01T00:00:00Z\n[schedules.ping]\ntask = "report"\nevery = "5m"\nargs = ["x"]\n'
    )
    app.adopt(config.load(arguments={"url": redis_url}, environ={}, file=file).settings)
    found = {entry.definition.name: entry.definition for entry in declared_by(app, "x")}
    nightly, ping = found["nightly"], found["ping"]
    assert (nightly.cron, nightly.tz, nightly.overlap) == ("0 3 * * *", "Europe/Berlin", "skip")
    assert nightly.start == dt.datetime(2027, 1, 1, tzinfo=dt.UTC).timestamp()
    assert ping.interval == 300.0
    for text, said in (
        ("[schedules.x]\ntask = 'report'\n", "give one of"),
        ("[schedules.x]\ntask = 'report'\nevery = '5m'\nevry = 1\n", "unknown option 'evry'"),
        ("[schedules.x]\ncron = '@daily'\n", "names no task"),
    ):
        file.write_text(text)
        app.adopt(config.load(arguments={"url": redis_url}, environ={}, file=file).settings)
        with pytest.raises(ConfigError, match=said):
            declared_by(app, "x")


def test_a_name_in_code_and_settings_is_refused(app: fastq.FastQ) -> None:
    app.cron("@daily", name="nightly")(app.tasks["report"])
    table = msgspec.json.encode({"nightly": {"task": "report", "every": 60}}).decode()
    with pytest.raises(TaskDefinitionError, match="defined twice"):
        declared(app, schedules=table)


def test_every_interval_is_a_schedule(app: fastq.FastQ) -> None:
    """F107: numbers of seconds; F092: the documented patterns are those of tests/unit/test_cron.py."""
    app.every(300.0, name="sync", jitter=dt.timedelta(seconds=5))(app.tasks["report"])
    (found,) = declared(app).values()
    assert found.schedule({}) == Every(300)
    assert [0 <= found.delay_ms(tick) <= 5_000 for tick in range(50)] == [True] * 50
    assert len({found.delay_ms(tick) for tick in range(50)}) > 25
    assert found.delay_ms(7) == found.delay_ms(7)


async def test_a_tick_does_not_look_at_unique_keys(redis_url: str, lab: Lab) -> None:
    """As docs/schedules.md says: what must not overlap says so in its schedule."""
    app = fastq.FastQ(redis_url)

    @app.task(unique="until_executed")
    async def report() -> None: ...

    await report.enqueue()
    daily = await app.schedule("report", cron="0 9 * * *", name="daily")
    assert await app.schedules.run_now(daily)
    assert len(lab.jobs()) == 2
    await app.unschedule(daily)
    await app.aclose()
