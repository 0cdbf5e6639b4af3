"""Dead letters by what they died of: groups, and replay by a filter at a rate."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from fastq import FastQ
from fastq.broker.embedded import EmbeddedServer
from fastq.broker.letters import fingerprint, paced
from fastq.cli.dlq import verbs
from fastq.errors import InvalidOption
from fastq.job import DeadLetter
from tests.redis.workshop import working


def letter(message: str, task: str | None = "send", kind: str = "OSError") -> DeadLetter:
    return DeadLetter(
        id="a", queue="q", task=task, attempts=1, failed_at=1.0, enqueued_at=None, reason="exception",
        error_type=kind, error_message=message, traceback="", host="", body=b"",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("no user 17", "no user 4,211"),
        ("no key 'a' in 0x7f3a", 'no key "b" in 0xffff'),
        ("job 5a4f3e2d1c0b failed at 10:22:01.5", "job 99ffaa0011bb failed at 23:59:59.9"),
        ("id 123e4567-e89b-12d3-a456-426614174000", "id 00000000-e89b-12d3-a456-426614174001"),
    ],
)
def test_what_varies_from_job_to_job_does_not_count(one: str, other: str) -> None:
    assert fingerprint(letter(one)) == fingerprint(letter(other))


@pytest.mark.parametrize(
    "other", [letter("no order 17"), letter("no user 17", "mail"), letter("no user 17", kind="KeyError")]
)
def test_what_is_another_error_is_another_group(other: DeadLetter) -> None:
    assert fingerprint(letter("no user 17")) != fingerprint(other)


def test_a_message_of_hostile_length_costs_little() -> None:
    begun = time.perf_counter()
    assert len(fingerprint(letter("'" * 100_000))) == 8
    assert len(fingerprint(letter("a-" * 100_000, None))) == 8
    assert time.perf_counter() - begun < 0.5


def test_the_pieces_of_a_pace() -> None:
    ids = [str(n) for n in range(25)]
    assert list(paced(ids, None)) == [(ids, 0.0)]
    assert list(paced(ids, 100)) == [(ids[:10], 0.1), (ids[10:20], 0.1), (ids[20:], 0.0)]
    assert [pause for _, pause in paced(ids[:3], 2)] == [0.5, 0.5, 0.0]
    assert list(paced([], 5)) == []


@pytest.fixture
def app(redis_url: str) -> Iterator[FastQ]:
    app = FastQ(redis_url, concurrency=10)
    app.broken = True  # type: ignore[attr-defined]  # what the handlers look at

    @app.task(max_attempts=1)
    async def send(user: int) -> None:
        if app.broken:  # type: ignore[attr-defined]
            raise (ConnectionError(f"no route to host {user}") if user < 6 else KeyError(f"user {user}"))

    @app.task(max_attempts=1)
    async def mail(user: int) -> None:
        raise ConnectionError(f"no route to host {user}")

    yield app
    app.close()


async def _bury(app: FastQ) -> None:
    async with working(app) as shop:
        jobs = [await app.enqueue("send", n) for n in range(8)] + [await app.enqueue("mail", n) for n in range(3)]
        for job in jobs:
            assert (await shop.ended(job)).state == "failed"


async def test_groups(app: FastQ) -> None:
    await _bury(app)
    groups = await app.dead.groups()
    assert [(g.count, g.task, g.error_type) for g in groups] == [
        (6, "send", "ConnectionError"),
        (3, "mail", "ConnectionError"),
        (2, "send", "KeyError"),
    ]
    assert all(g.first <= g.last for g in groups)
    assert groups[0].message.startswith("no route to host ")
    assert app.dead.groups_sync() == groups
    await app.aclose()


async def test_replay_by_filter(app: FastQ) -> None:
    await _bury(app)
    groups = await app.dead.groups()
    assert await app.dead.replay(task="send", error="ConnectionError", limit=4) == 4
    assert await app.dead.replay(error="KeyError") == 2
    assert app.dead.replay_sync(group=groups[1].fingerprint) == 3
    assert await app.dead.replay(task="nobody") == 0
    assert [(x.task, x.error_type) for x in await app.dead.list()] == [("send", "ConnectionError")] * 2
    assert await app.queue_length() == 9
    with pytest.raises(InvalidOption, match="ids and a filter"):
        await app.dead.replay(ids=["a"], task="send")
    await app.aclose()


async def test_replay_at_a_rate(app: FastQ) -> None:
    await _bury(app)
    begun = time.monotonic()
    assert await app.dead.replay(rate=20) == 11
    assert time.monotonic() - begun >= 0.5, "11 at 20 a second, the first two at once"
    assert await app.queue_length() == 11
    for rate in (0, -1):
        with pytest.raises(InvalidOption, match="rate="):
            await app.dead.replay(rate=rate)
    await app.aclose()


async def test_on_the_command_line(app: FastQ, redis_server: EmbeddedServer) -> None:
    await _bury(app)
    await app.aclose()
    url = ["--redis-url", redis_server.url]
    listed = CliRunner().invoke(verbs["dlq"], ["groups", "default", *url]).output.splitlines()
    assert listed[0].split()[:3] == ["GROUP", "COUNT", "TASK"]
    assert [line.split()[1:3] for line in listed[1:]] == [["6", "send"], ["3", "mail"], ["2", "send"]]
    group = listed[2].split()[0]
    counted = CliRunner().invoke(verbs["dlq"], ["replay", "default", "--group", group, "--dry-run", *url]).output
    assert "3 jobs would be sent back" in counted
    sent = CliRunner().invoke(verbs["dlq"], ["replay", "default", "--error", "KeyError", "--rate", "100", *url]).output
    assert "2 jobs sent back" in sent
    none = CliRunner().invoke(verbs["dlq"], ["replay", "default", "--task", "nobody", *url])
    assert (none.output, none.exit_code) == ("default: none of them\n", 0)
