"""The rule that is in force, as far as one gate knows it: its own, or one that an operator has put in its place."""

from __future__ import annotations

from fastq.errors import BrokerReplyError, ConfigError
from fastq.limiter.plan import Plan
from fastq.limiter.stores import Store
from fastq.limits import Rule

__all__ = ["CurrentRule"]


class CurrentRule:
    """A rule, its terms for the present, and since when it holds."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.rule = plan.rule
        self.override = b""
        """What Redis has in place of the configured rule, as it is there; b"": nothing."""
        self.terms = plan.rule.terms(store.now_us())
        """As of the last request."""
        self._plan = plan
        self._store = store
        self._ahead = 0  # µs that the store's clock is before what was learnt of it when it was connected to
        self._since = 0  # the store's time at which the rule was last seen to have changed, µs

    def renew(self) -> None:
        """Bring the terms to the present: those of a fixed window are of one window."""
        terms = self.terms
        if terms.kind == "fixed" and not terms.b <= (now := self._store.now_us() + self._ahead) < terms.c:
            self.terms = self.rule.terms(now)

    def set_clock(self, now_us: int) -> None:
        """The store says that it is another window's time: its clock has been set, or drifts."""
        self._ahead = now_us - self._store.now_us()
        self.terms = self.rule.terms(now_us)

    def take_on(self, override: bytes, now_us: int) -> None:
        """Another rule is in force.

        Raises BrokerReplyError: it cannot be read, as it is of another release, say. The old one is not in force any more all the same.
        """
        try:
            rule = Rule.decode(override) if override else self._plan.rule
        except ConfigError as error:
            raise BrokerReplyError(str(error)) from None
        self.rule, self.override, self.terms, self._since = rule, override, rule.terms(now_us), now_us

    def has_counted(self, granted: float) -> bool:
        """Whether units of that time (the store's, µs) were granted under this rule: another one's cannot be given back to it."""
        return granted >= self._since
