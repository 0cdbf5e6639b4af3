"""What a gate has taken out of its store and has to bring back: slots that are held, units that nobody used."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastq.broker.commands import give_back
from fastq.broker.keys import LimitKeys
from fastq.errors import BrokerError, BrokerUnavailable
from fastq.limiter.plan import Plan
from fastq.limiter.stores import Slot, Store, this_process
from fastq.limits import Terms
from fastq.logs import fields

__all__ = ["Slots"]

log = logging.getLogger("fastq.limits")


class Slots:
    """The slots that are held through one gate, and the way back for them and for units."""

    def __init__(self, plan: Plan, store: Store, keys: LimitKeys, owner: object) -> None:
        self.held: list[str] = []
        """Holders whose slots nobody has given back."""
        self.unchecked = 0
        """Those who passed while the store could not be asked: they have no slot, and may say later that they give it back."""
        self._plan = plan
        self._store = store
        self._keys = keys
        self._owner = owner
        self._process = this_process()

    def ticket(self) -> str:
        """A name that nobody else has: of a holder, or of a request that may be repeated."""
        return self._process.ticket()

    def hold(self, holder: str, terms: Terms) -> None:
        """Keep a slot alive from now on."""
        self.held.append(holder)
        self._process.keep(Slot(self._store, self._keys, terms, holder, self._plan.lease, self._owner))

    def drop(self, holder: str) -> Sequence[str]:
        """Keep it no longer. Who has to be told to the store: nobody, if there was no slot."""
        if not holder:
            return ()
        self._process.let_go(holder)
        if holder in self.held:
            self.held.remove(holder)
        return (holder,)

    async def give_back(self, terms: Terms, units: int, granted: float, holders: Sequence[str]) -> None:
        """Tell the store of units that were granted at ``granted`` (its µs) and of the slots of ``holders``."""
        if not units and not holders:
            return
        ticket = self.ticket()
        command = give_back(self._keys, terms, ticket, units=units, granted_us=int(granted), holders=holders)
        for _ in range(2):  # the ticket makes a repetition harmless
            try:
                await self._store.ask(command)
            except BrokerUnavailable:
                continue
            except BrokerError as error:
                log.warning("cannot give back", extra=fields(limiter_id=self._plan.id, error=str(error)))
            return

    async def pass_on(self) -> None:
        """Let another process know of the free slot that this one was told of."""
        try:
            await self._store.pass_on(self._keys)
        except BrokerError as error:
            log.debug("a wake-up was lost", extra=fields(limiter_id=self._plan.id, error=str(error)))
