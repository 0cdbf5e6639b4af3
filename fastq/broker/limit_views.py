"""Limiters as an operator looks at them: operations for both movers. Never used by a worker.

Which limiters there are stands in a registry, ``limits``: each process notes a limiter, with its rule, when it first asks for it
(``limiter.stores``), the 10,000 latest are kept. So nobody has to SCAN a database that holds other things, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from fastq.broker.command import Command, Operation, raw
from fastq.broker.commands import limit_state, override_rule, penalize, reset_limit
from fastq.broker.keys import GlobalKeys, LimitKeys, QueueKeys
from fastq.errors import ConfigError
from fastq.limits import Rule, Terms, check_limiter_id, partition_name, size_of
from fastq.partitions import is_partition, queue_of

__all__ = ["Holder", "LimitInfo", "LimitInspector"]

MOST_LIMITS = 1_000
"""Parked partitions of one queue that are looked at: those that somebody looks at first."""


class LimitInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A limiter, or one partition of it. ``rule`` is the one in force, None: nobody has said it.

    ``parked`` are jobs by queue, of all partitions of the limiter, or of the one that was asked for. Times are seconds.
    """

    id: str
    key: str = ""
    rule: str | None = None
    overridden: bool = False
    limit: float | None = None
    remaining: int | None = None
    reset_in: float = 0.0
    penalty: float = 0.0
    pace: float = 1.0
    max_concurrent: int | None = None
    holders: int = 0
    parked: dict[str, int] = {}


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who has a slot: ``<host>.<process id>.<random>:<n>``, and the seconds that are left of its lease."""

    holder: str
    lease: float


class LimitInspector:
    """Look at limiters and change them. ``configured`` are rules that the caller knows; Redis may know more."""

    def __init__(self, prefix: str, configured: Mapping[str, Rule]) -> None:
        self._prefix = prefix
        self._configured = configured
        self._global = GlobalKeys(prefix)

    def names(self) -> Operation[list[str]]:
        """Every limiter that is configured here, or that a process has used."""
        seen = yield raw("ZRANGE", self._global.limits, 0, -1)
        return sorted({*self._configured, *(name.decode("utf-8", "replace") for name in seen)})

    def overview(self) -> Operation[list[LimitInfo]]:
        """All of them, each as a whole."""
        names = yield from self.names()
        parked = yield from self._parked()
        found: list[LimitInfo] = []
        for name in names:
            info = yield from self._info(LimitKeys(self._prefix, name), parked.get(name, {}))
            found.append(info)
        return found

    def show(self, name: str, key: str = "") -> Operation[tuple[LimitInfo, list[Holder]]]:
        """One of them, or one partition, and up to 1,000 that hold its slots."""
        keys = LimitKeys(self._prefix, check_limiter_id(name), key)
        partition = f"{name}/{partition_name(key)}" if key else ""
        parked = yield from self._parked(partition)
        info = yield from self._info(keys, parked.get(name, {}))
        now_us = yield from self._now_us()
        rows = yield raw("ZRANGEBYSCORE", keys.slots, f"({now_us // 1_000}", "+inf", "WITHSCORES", "LIMIT", 0, 1_000)
        holders = [
            Holder(holder=rows[i].decode("utf-8", "replace"), lease=max(0.0, float(rows[i + 1]) / 1e3 - now_us / 1e6))
            for i in range(0, len(rows), 2)
        ]
        return info, holders

    def set(self, name: str, change: Rule) -> Operation[Rule]:
        """Let a changed rule be in force for everybody, all partitions. What ``change`` does not say stays."""
        keys = LimitKeys(self._prefix, check_limiter_id(name))
        rule, _ = yield from self._rule(keys)
        rule = change if rule is None else rule.changed(change)
        yield override_rule(keys, rule)
        return rule

    def penalize(self, name: str, seconds: float, key: str = "") -> Operation[float]:
        """Grant nothing for so long; the seconds that a penalty lasts now. Raises ConfigError: nobody has said the rule."""
        keys = LimitKeys(self._prefix, check_limiter_id(name), key)
        terms = yield from self._terms(keys)
        left: int = yield penalize(keys, terms, seconds)
        return left / 1e6

    def reset(self, name: str, key: str = "") -> Operation[bool]:
        """The configured rule again, no penalty, nothing granted; slots stay with their holders. Whether anything changed."""
        keys = LimitKeys(self._prefix, check_limiter_id(name), key)
        replies = yield [reset_limit(keys), *([] if key else [override_rule(keys, None)])]
        return any(replies)

    # -- inside ---------------------------------------------------------------------------------------

    def _rule(self, keys: LimitKeys) -> Operation[tuple[Rule | None, bool]]:
        """The rule in force, and whether it overrides the configured one."""
        override, known = yield [raw("GET", keys.rule), raw("GET", keys.known)]
        configured = self._configured.get(keys.limiter)
        if override:
            return Rule.decode(override), True
        return (configured or (Rule.decode(known) if known else None)), False

    def _terms(self, keys: LimitKeys) -> Operation[Terms]:
        rule, _ = yield from self._rule(keys)
        if rule is None:
            raise ConfigError(f"the rule of limiter {keys.limiter!r} is not known: no process has used it lately")
        return rule.terms((yield from self._now_us()))

    def _now_us(self) -> Operation[int]:
        seconds, us = yield raw("TIME")
        return int(seconds) * 1_000_000 + int(us)

    def _info(self, keys: LimitKeys, parked: dict[str, int]) -> Operation[LimitInfo]:
        rule, overridden = yield from self._rule(keys)
        if rule is None:
            return LimitInfo(id=keys.limiter, key=keys.key, parked=parked)
        now_us = yield from self._now_us()
        state = yield limit_state(keys, rule.terms(now_us))
        return LimitInfo(
            id=keys.limiter,
            key=keys.key,
            rule=str(rule),
            overridden=overridden,
            limit=size_of(rule),
            remaining=None if state.left < 0 else state.left,
            reset_in=state.reset_us / 1e6,
            penalty=state.penalty_us / 1e6,
            pace=state.pace / 1e6,
            max_concurrent=rule.max_concurrent,
            holders=state.holders,
            parked=parked,
        )

    def _parked(self, only: str = "") -> Operation[dict[str, dict[str, int]]]:
        """Parked jobs by limiter and queue; ``only``: of that limit (limiter and partition)."""
        found: dict[str, dict[str, int]] = {}
        for queue in _names((yield raw("SMEMBERS", self._global.queues))):
            q = QueueKeys(self._prefix, queue)
            limits = [name.decode("utf-8", "replace") for name in (yield raw("ZRANGE", q.parked, 0, MOST_LIMITS - 1))]
            chosen = [limit for limit in limits if only in ("", limit)]
            counts: Sequence[int] = (yield [_count(q, limit) for limit in chosen]) if chosen else ()
            for limit, count in zip(chosen, counts, strict=True):
                queues = found.setdefault(limit.partition("/")[0], {})
                whole = queue_of(queue)
                queues[whole] = queues.get(whole, 0) + count
        return found


def _count(q: QueueKeys, limit: str) -> Command[Any]:
    return raw("ZCARD", q.parked_by(limit))


def _names(reply: Iterable[bytes]) -> Iterable[str]:
    names = (name.decode("utf-8", "replace") for name in sorted(reply))
    return filter(is_partition, names)  # others were written by somebody else
