"""Whether what lies in Redis fits together: every job in exactly one place, nothing that belongs to no job.

:func:`check` is `fastq check`. It works on a live server: it pages through what there is and notes what looks wrong, then
``check.lua`` (or ``mend.lua``) looks at each suspect in one instant, so jobs that move meanwhile are no findings. Unlike the
inspector it walks the whole key space under the prefix; every single command is bounded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import msgspec

from fastq.broker.command import Command, Operation, raw
from fastq.broker.keys import PAD, TABLE, GlobalKeys, QueueKeys, describe
from fastq.broker.views import text_of
from fastq.partitions import check_partition, is_partition, queue_of

__all__ = ["Checked", "Fault", "check"]

MOST_JOBS = 1_000_000
"""Jobs of one queue that are compared with its ready lists: this process remembers their ids, about 150 bytes each."""

MOST_FAULTS = 1_000
"""Findings after which a check ends: something is wrong with the whole."""

PASSES = 3
"""Times that a repair looks at a queue: what was mended may show what else is wrong, and twice was the most that was seen."""

PAGE = 200  # names that one command looks at: 1 to 3 ms
SCAN = 1_000  # keys that one SCAN looks at
ROWS = 50  # suspects that one call looks at
WORK = 100_000  # entries of ready lists that one call may search: about 1 ms

FIXED = {
    info.pattern.removeprefix("{q}:"): info.type
    for info in TABLE
    if info.pattern.startswith("{q}:") and "<" not in info.pattern
}
"""How the keys end that each queue has once, and their types."""

State = Literal["open", "reparable", "repaired"]
STATES: tuple[State, ...] = ("open", "reparable", "repaired")

WORDS = {
    "lost": "the job is in no place: nobody would ever run it",
    "twice": "the job is in several places: {detail}",
    "empty": "there is no such job in {queue}, but an entry for it: {detail}",
    "ghost": "more entries are to be skipped than there are: {detail}",
    "stray": "an entry of {detail} belongs to nothing",
    "unique": "its unique key {detail} does not lead to it",
    "letter": "a dead letter without its part {detail}",
    "limit": "jobs wait for this limit, and {detail}",
    "orphan": "a running set whose worker has no lease: {detail}",
    "pad": "the pad is missing in {detail}",
    "unknown": "no key of fastq",
    "type": "the key is of type {detail}",
    "endless": "the key should expire and does not",
    "unannounced": "the queue is missing in the set of queues: schedulers do not see it",
}
"""What a code means, for people; docs/cli.md lists them."""


class Fault(msgspec.Struct, frozen=True):
    """One thing that does not fit.

    Attributes:
        code: for programs; see docs/cli.md.
        queue: of which queue; "" for a key that belongs to none.
        name: the job's id, the worker's, the limit's, or the key.
        detail: where, or how much.
        state: ``reparable``; ``repaired``; ``open``: mending it would be a guess.
    """

    code: str
    queue: str
    name: str
    detail: str = ""
    state: State = "open"

    @property
    def fix(self) -> str:
        """What only people can do: a foreign key may be all that somebody has of something.

        The new name does not begin with the prefix: ``running:w.foreign`` would be a worker's set, and of the wrong type again.
        """
        if self.code != "type":
            return ""
        return f"RENAME {self.name} foreign:{self.name} puts it away, DEL {self.name} loses what is in it"

    def __str__(self) -> str:
        return f"{self.name}: {WORDS[self.code].format(detail=self.detail, queue=self.queue)}"


class Checked(msgspec.Struct, kw_only=True):
    """What a check has looked at and found.

    Attributes:
        jobs: those not finished.
        skipped: queues of which nothing was looked at but the types of their keys, as one of these is wrong.
        complete: False when there was more than is looked at (see :data:`MOST_JOBS`, :data:`MOST_FAULTS`).
        at: the queue that was looked at last.
    """

    queues: int = 0
    jobs: int = 0
    keys: int = 0
    faults: list[Fault] = []
    skipped: list[str] = []
    complete: bool = True
    at: str = ""

    @property
    def left(self) -> list[Fault]:
        """What is still wrong."""
        return [fault for fault in self.faults if fault.state != "repaired"]


class Row(NamedTuple):
    """One question to check.lua or mend.lua."""

    kind: str  # job | limit | worker | pad
    name: bytes
    hint: bytes = b""


def survey(key: bytes, kind: str, cursor: bytes, count: int = PAGE) -> Command[list[Any]]:
    """The next names in a hash, set, sorted set or list: [cursor of the next call, names]. ``b"0"`` begins and ends."""
    return Command("survey", (key,), (kind, cursor, count), list)


def ask(q: QueueKeys, how: str, rows: Sequence[Row], orphans: Sequence[bytes] = ()) -> Command[list[list[list[Any]]]]:
    """Look at these; ``how``: "look" (the ready lists are not searched), "full", "mend". The reply stands in check.lua.

    Only what mends is a script that writes: a Redis that takes no writes can be looked at.
    """
    words = (word for row in rows for word in row)
    return Command("mend" if how == "mend" else "check", _needed(q), (how, PAD, len(orphans), *orphans, *words), list)


def _needed(q: QueueKeys) -> tuple[bytes, ...]:
    """The keys of check.lua and mend.lua; they also look at ``running:`` and ``parked:by:``."""
    return (
        q.jobs, q.due, q.ghosts, q.workers, q.unique, q.unique_of, q.unique_start, q.deliveries, q.cancels, q.awaited,
        q.parked, q.parked_of, q.dead, q.dead_jobs, q.dead_errors, q.wake, q.info, *q.levels,
    )  # fmt: skip


def check(
    prefix: str, queues: Iterable[str] | None = None, *, repair: bool = False, found: Checked | None = None
) -> Operation[Checked]:
    """Look at everything under a prefix, or at some queues only.

    Args:
        prefix: the first part of every key.
        queues: names; None: all that are announced or have a key.
        repair: mend what needs no guess. Nothing that could be a job is ever deleted.
        found: is filled and returned: what it holds is true, too, when Redis refuses something in the middle.

    Raises:
        InvalidQueueName: one of ``queues`` cannot be the name of a queue.
    """
    found = Checked() if found is None else found
    wanted = {check_partition(name) for name in queues} if queues is not None else None
    unreadable = yield from _mistyped({GlobalKeys(prefix).queues: "set"}, "")
    announced = [] if unreadable else (yield raw("SMEMBERS", GlobalKeys(prefix).queues))
    space = yield from _key_space(prefix, found)
    if wanted is not None:
        found.faults = [fault for fault in found.faults if wanted & {fault.queue, queue_of(fault.queue)}]
    _add(found, unreadable)
    names = set(map(text_of, announced))
    unannounced = set() if unreadable else set(space) - names
    for name in sorted(names | set(space) | (wanted or set())):
        if not is_partition(name) or (wanted is not None and not wanted & {name, queue_of(name)}):
            continue
        found.queues += 1
        found.at = name
        if name in unannounced:
            yield from _announce(prefix, name, found, repair=repair)
        yield from _look_at_queue(QueueKeys(prefix, name), space.get(name, {}), found, repair=repair)
        if len(found.faults) >= MOST_FAULTS:
            found.complete = False
            break
    return found


def _add(found: Checked, faults: Iterable[Fault]) -> None:
    """Those that the key space has not told already."""
    found.faults += [fault for fault in faults if fault not in found.faults]


# -- the key space ----------------------------------------------------------------------------------

Space = dict[str, dict[str, list[bytes]]]
"""Queue -> kind of key -> what its name ends with, for the keys of which a queue has several."""


def _key_space(prefix: str, found: Checked) -> Operation[Space]:
    """Every key under the prefix: one of ours, of its type, with an end if it should have one."""
    space: Space = {}
    doubtful: list[bytes] = []
    ours = re.compile(re.escape(prefix) + r":(?:\{([^}/]+)\}:(running:|parked:by:)?(.*)|[^{].*)\Z", re.DOTALL)
    cursor = b"0"
    while True:
        cursor, names = yield raw("SCAN", cursor, "MATCH", f"{prefix}:*", "COUNT", SCAN)
        found.keys += len(names)
        for name in names:
            match = ours.match(text_of(name))
            if match and match[1] and is_partition(match[1]):
                space.setdefault(match[1], {}).setdefault(match[2] or "", []).append(match[3].encode())
        doubtful += [name for name, why in (yield from _look_at_keys(names)) if why]
        if cursor == b"0" or len(doubtful) > MOST_FAULTS:
            break
    for name, why in (yield from _look_at_keys(doubtful)):  # once more: it may have expired between two replies
        if why and not (why[0] == "endless" and (yield from _is_open_group(text_of(name)))):
            match = ours.match(text_of(name))
            found.faults.append(Fault(why[0], (match and match[1]) or "", text_of(name), why[1]))
    return space


def _is_open_group(name: str) -> Operation[bool]:
    """The keys of a workflow or a batch begin to expire when it has ended."""
    match = re.match(r"(.*\}:)(?:flow|batch):([^:]+)", name)
    return match is not None and (yield raw("ZSCORE", f"{match[1]}groups", match[2])) is not None


def _look_at_keys(names: Sequence[bytes]) -> Operation[list[tuple[bytes, tuple[str, str] | None]]]:
    if not names:
        return []
    replies = yield [raw(word, name) for name in names for word in ("TYPE", "PTTL")]
    return [(n, _verdict(n, text_of(replies[2 * i]), replies[2 * i + 1])) for i, n in enumerate(names)]


def _verdict(name: bytes, kind: str, ttl: int) -> tuple[str, str] | None:
    info = describe(text_of(name))
    if kind == "none":
        return None
    if info is None:
        return "unknown", ""
    if kind != info.type:
        return "type", f"{kind}, not {info.type}"
    return ("endless", "") if info.lifetime == "ttl" and ttl == -1 else None


def _announce(prefix: str, name: str, found: Checked, *, repair: bool) -> Operation[None]:
    found.faults.append(Fault("unannounced", name, name, state="reparable"))  # told, too, when it cannot be mended
    if repair:
        yield raw("SADD", GlobalKeys(prefix).queues, name)
        found.faults[-1] = Fault("unannounced", name, name, state="repaired")


# -- one queue --------------------------------------------------------------------------------------


def _look_at_queue(q: QueueKeys, several: dict[str, list[bytes]], found: Checked, *, repair: bool) -> Operation[None]:
    """The types of its keys first: the first command on a foreign one would end the check. Then the jobs."""
    more = [(q.running(text_of(worker)), "set") for worker in several.get("running:", [])]
    more += [(q.parked_by(text_of(limit)), "zset") for limit in several.get("parked:by:", [])]
    fixed = {(q.base + name).encode(): kind for name, kind in FIXED.items()} | dict.fromkeys(q.levels, "list")
    mistyped = yield from _mistyped(fixed | dict(more), q.queue)
    _add(found, mistyped)
    needed = {text_of(key) for key in (*_needed(q), *dict(more))}
    if needed.isdisjoint(fault.name for fault in mistyped):
        yield from _look_at_jobs(q, several, found, repair=repair)
    else:
        found.skipped.append(q.queue)


def _mistyped(types: Mapping[bytes, str], queue: str) -> Operation[list[Fault]]:
    faults = []
    for keys in _chunks(types, SCAN):
        for key, reply in zip(keys, (yield [raw("TYPE", key) for key in keys]), strict=True):
            if (kind := text_of(reply)) not in ("none", types[key]):
                faults.append(Fault("type", queue, text_of(key), f"{kind}, not {types[key]}"))
    return faults


def _look_at_jobs(q: QueueKeys, several: dict[str, list[bytes]], found: Checked, *, repair: bool) -> Operation[None]:
    """Once; after a repair again, until there was nothing to mend."""
    first, jobs = len(found.faults), found.jobs
    for _ in range(PASSES if repair else 1):
        before, found.jobs = len(found.faults), jobs
        look = _Queue(q, several, found)
        yield from look.walk()
        yield from look.judge(repair=repair)
        mended = any(fault.state == "repaired" for fault in found.faults[before:])
        # what an earlier pass has left was found again, or is gone with what was mended
        found.faults[first:before] = [fault for fault in found.faults[first:before] if fault.state == "repaired"]
        if not mended or len(found.faults) >= MOST_FAULTS:
            return


class _Queue:
    """One walk over a queue, which collects suspects, and the judgement of them."""

    def __init__(self, q: QueueKeys, several: dict[str, list[bytes]], found: Checked) -> None:
        self.q = q
        self.several = several
        self.found = found
        self.waiting: set[bytes] = set()  # jobs that can only be in a ready list
        self.entries: Counter[bytes] = Counter()  # of the ready lists
        self.suspects: dict[Row, None] = {}
        self.orphans: list[bytes] = []  # who has a running set and no lease

    def walk(self) -> Operation[None]:
        """Jobs first, then where they may be: what is enqueued meanwhile is seen in its list, and looked up."""
        q = self.q
        yield from self._workers_and_limits()
        yield from self._pages(q.jobs, "hash", count=True)
        for level in q.levels:
            yield from self._ready(level)
        yield from self._compare()
        for key, kind in (
            (q.due, "zset"), (q.parked_of, "hash"), (q.deliveries, "hash"), (q.cancels, "hash"), (q.unique_of, "hash"),
            (q.unique_start, "hash"), (q.awaited, "hash"), (q.dead, "zset"), (q.dead_jobs, "hash"), (q.dead_errors, "hash"),
        ):  # fmt: skip
            yield from self._pages(key, kind)
        for worker in self.several.get("running:", []):
            yield from self._pages(q.running(text_of(worker)), "set")
        for limit in self.several.get("parked:by:", []):
            yield from self._pages(q.parked_by(text_of(limit)), "zset", b"by:" + limit)
        yield from self._unique_keys()
        yield from self._ghosts()

    def judge(self, *, repair: bool) -> Operation[None]:
        """One look at every suspect, in which nothing moves."""
        longest = sum((yield [raw("LLEN", level) for level in self.q.levels]))
        size = max(1, min(ROWS, WORK // (longest + 1)))
        hinted = {row.name for row in self.suspects if row.hint}
        for rows in _chunks((row for row in self.suspects if row.hint or row.name not in hinted), size):
            replies = yield self._ask("full", rows)
            faults = {row: self._faults(row, reply) for row, reply in zip(rows, replies, strict=True) if reply}
            begun = len(self.found.faults)
            self.found.faults += chain(*faults.values())
            if repair:
                yield from self._mend(faults, begun)
            if len(self.found.faults) >= MOST_FAULTS:
                return

    def _mend(self, faults: dict[Row, list[Fault]], begun: int) -> Operation[None]:
        """One row a call: when Redis refuses one, it is known which were mended before."""
        for row in [row for row, told in faults.items() if any(fault.state == "reparable" for fault in told)]:
            faults[row] = self._faults(row, *(yield self._ask("mend", [row])))
            self.found.faults[begun:] = chain(*faults.values())

    def _faults(self, row: Row, reply: Iterable[list[Any]]) -> list[Fault]:
        name = text_of(row.name) or "jobs"
        return [
            Fault(text_of(code), self.q.queue, name, text_of(detail), STATES[state]) for code, detail, state in reply
        ]

    def _ask(self, how: str, rows: Sequence[Row]) -> Command[list[list[list[Any]]]]:
        return ask(self.q, how, rows, self.orphans)

    def _workers_and_limits(self) -> Operation[None]:
        q = self.q
        leases, cards, limits = yield [
            raw("ZRANGE", q.workers, 0, -1), raw("HKEYS", q.info), raw("ZRANGE", q.parked, 0, -1),
        ]  # fmt: skip
        workers = sorted({*leases, *cards, *self.several.get("running:", [])})
        self.orphans = sorted(set(self.several.get("running:", [])).difference(leases))
        rows = [Row("worker", worker) for worker in workers]
        rows += [Row("limit", limit) for limit in sorted({*limits, *self.several.get("parked:by:", [])})]
        for chunk in _chunks([*rows, Row("pad", b"")], PAGE):
            self._suspect(chunk, (yield self._ask("look", chunk)))

    def _suspect(self, rows: Iterable[Row], replies: Iterable[list[list[Any]]]) -> Iterable[Row]:
        """Note the rows that look wrong; of those that may wait in a ready list the rows are returned."""
        waiting = []
        for row, faults in zip(rows, replies, strict=True):
            if any(fault[0] == b"ready" for fault in faults):
                waiting.append(row)
            if any(fault[0] != b"ready" for fault in faults):
                self.suspects[row] = None
        return waiting

    def _pages(self, key: bytes, kind: str, hint: bytes = b"", *, count: bool = False) -> Operation[None]:
        cursor = b"0"
        while True:
            cursor, names = yield survey(key, kind, cursor)
            rows = [Row("job", name, hint) for name in names if name != PAD.encode() and name != b"*"]
            if rows:
                waiting = self._suspect(rows, (yield self._ask("look", rows)))
                if count:
                    self.found.jobs += len(rows)
                    self._remember(waiting)
            if cursor == b"0":
                return

    def _remember(self, rows: Iterable[Row]) -> None:
        self.waiting.update(row.name for row in islice(rows, MOST_JOBS - len(self.waiting)))
        if len(self.waiting) == MOST_JOBS:
            self.found.complete = False

    def _ready(self, level: bytes) -> Operation[None]:
        """The entries of one list; those that are no job that was seen before are looked up."""
        cursor = b"0"
        while True:
            cursor, names = yield survey(level, "list", cursor)
            self.entries.update(names)
            rows = [Row("job", name) for name in dict.fromkeys(names) if name not in self.waiting]
            if rows:
                known = {row.name for row in self._suspect(rows, (yield self._ask("look", rows)))}
                ghosts = yield raw("HMGET", self.q.ghosts, *(row.name for row in rows))
                unknown = [r for r, ghost in zip(rows, ghosts, strict=True) if r.name not in known and not ghost]
                self.suspects.update(dict.fromkeys(unknown))
            if cursor == b"0" or len(self.entries) > 2 * MOST_JOBS:
                return

    def _compare(self) -> Operation[None]:
        """Jobs that wait and were not seen in a list are asked for once more: most have been taken meanwhile."""
        missing = (Row("job", name) for name in self.waiting - self.entries.keys())
        for chunk in _chunks(missing, PAGE):
            self.suspects.update(dict.fromkeys(self._suspect(chunk, (yield self._ask("look", chunk)))))
        for chunk in _chunks([name for name, count in self.entries.items() if count > 1], PAGE):
            ghosts = yield raw("HMGET", self.q.ghosts, *chunk)
            for name, ghost in zip(chunk, ghosts, strict=True):
                if self.entries[name] - int(ghost or 0) > 1:
                    self.suspects[Row("job", name)] = None

    def _unique_keys(self) -> Operation[None]:
        cursor = b"0"
        while True:
            cursor, pairs = yield raw("HSCAN", self.q.unique, cursor, "COUNT", PAGE)
            rows = [Row("job", holder, b"key:" + key) for key, holder in zip(pairs[::2], pairs[1::2], strict=True)]
            if rows:
                self._suspect(rows, (yield self._ask("look", rows)))
            if cursor == b"0":
                return

    def _ghosts(self) -> Operation[None]:
        cursor = b"0"
        while True:
            cursor, pairs = yield raw("HSCAN", self.q.ghosts, cursor, "COUNT", PAGE)
            for name, count in zip(pairs[::2], pairs[1::2], strict=True):
                if int(count) > self.entries[name]:
                    self.suspects[Row("job", name)] = None
            if cursor == b"0":
                return


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    stream = iter(items)
    while chunk := list(islice(stream, size)):
        yield chunk
