"""An application for tests of limiters; and their scripts on a real server, with its own clock or with one that a test sets."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from fastq import FastQ
from fastq.broker import commands, scripts
from fastq.broker.command import Command, raw
from fastq.broker.commands import GivenBack
from fastq.broker.connection import SyncConnection
from fastq.broker.keys import LimitKeys
from fastq.broker.url import parse_url
from fastq.limits import Acquired, LimitState, Rule, Terms
from tests.unit.limit_fleet import START

T = TypeVar("T")

NAMES = ("acquire", "give_back", "hold", "lease", "penalize", "limit_state")
CLOCK = (scripts.FOLDER / "include" / "now_us.lua").read_text("utf-8")
GIVEN = "local function now_us() return tonumber(string.match(KEYS[#KEYS], '[0-9]+$')) end\n"


@contextlib.asynccontextmanager
async def application(url: str) -> AsyncIterator[FastQ]:
    """An application of this event loop, closed at the end."""
    app = FastQ(url)
    try:
        yield app
    finally:
        await app.aclose()
        app.close()


class SetClock:
    """Runs the scripts as they are, but for the include that reads the clock: the time comes as one more key of their slot."""

    def __init__(self, conn: SyncConnection) -> None:
        self.conn = conn
        self.texts: dict[str | None, str] = {}
        for name in NAMES:
            text = scripts.expand(name)
            assert CLOCK in text
            self.texts[name] = text.replace(CLOCK, GIVEN)

    def __call__(self, command: Command[T], now: int) -> T:
        if command.script is None:
            return self.conn.call(command)
        keys = (*command.keys, command.keys[0].partition(b"}")[0] + b"}:%d" % now)
        words = ("EVAL", self.texts[command.script], len(keys), *keys, *command.args)
        return self.conn.call(raw(*words, decode=command.decode))


class LimitLab:
    """One limiter, called with short arguments. ``now`` is the clock of the scripts: START plus what ``after`` says."""

    def __init__(self, url: str, raw: Any) -> None:
        self.raw = raw
        self.conn = SyncConnection.to(parse_url(url))
        self.engine = SetClock(self.conn)
        self.keys = LimitKeys("fastq", "api")
        self.now = START
        self.terms: Terms = Rule(None, 1).terms(START)
        self.tickets = 0

    def use(self, rule: Rule) -> Terms:
        self.terms = rule.terms(self.now)
        return self.terms

    def after(self, seconds: float) -> LimitLab:
        self.now += round(seconds * 1_000_000)
        return self

    def call(self, command: Command[T]) -> T:
        return self.engine(command, self.now)

    def acquire(self, need: int = 1, want: int = 0, **options: Any) -> Acquired:
        return self.call(commands.acquire(self.keys, self.terms, need=need, want=want, **options))

    def slots(self, *holders: str, most: int = 2, cost: int = 1, lease_ms: int = 15_000) -> Acquired:
        wanted = [(holder, cost) for holder in holders]
        return self.call(commands.acquire(self.keys, self.terms, most=most, lease_ms=lease_ms, holders=wanted))

    def give_back(
        self, units: int = 0, granted_us: int = 0, holders: tuple[str, ...] = (), ticket: str = ""
    ) -> GivenBack:
        self.tickets += 1
        command = commands.give_back(
            self.keys, self.terms, ticket or f"p:{self.tickets}", units=units, granted_us=granted_us, holders=holders
        )
        return self.call(command)

    def hold(self, *holders: str, lease_ms: int = 15_000) -> list[bool]:
        return self.call(commands.hold(self.keys, lease_ms, holders))

    def penalize(self, seconds: float, recovery: float = 0.0) -> int:
        return self.call(commands.penalize(self.keys, self.terms, seconds, recovery))

    def state(self) -> LimitState:
        return self.call(commands.limit_state(self.keys, self.terms))

    def stored(self) -> dict[str, Any]:
        """Every key of the server, as it is."""
        return {key.decode(): self.raw.dump(key) for key in self.raw.keys("*")}

    def expires(self, key: bytes) -> int:
        """When a key goes, in ms."""
        return int(self.raw.execute_command("PEXPIRETIME", key))
