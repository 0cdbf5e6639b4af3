"""Three Sentinels and a replica: the master is killed or stops under load (F-28)."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from fastq.broker.keys import PAD
from tests.chaos.load import OUTAGES, Load
from tests.conftest import eventually
from tests.nodes import Sentinels
from tests.process.fleet import PATIENCE, Fleet
from tests.sound import assert_sound

MakeFleet = Callable[..., Fleet]
Figure = Callable[[str], None]


@pytest.mark.parametrize("how", OUTAGES)
def test_the_master_fails_over(how: str, make_fleet: MakeFleet, figure: Figure) -> None:
    """F-28, F-22: nobody exits, work resumes within 2 s of the new master; what replication lost is counted, not hidden.

    A stopped master keeps its connections open and says nothing, as one that the network cuts off; it comes back as a replica.
    """
    with Sentinels(down_after=1.0) as sentinels:
        fleet = make_fleet(sentinels.url, workers=2, concurrency=10, lease=5.0, response_timeout=10.0).serving()
        old, new = sentinels.servers
        with Load(sentinels.url, enqueue_timeout=10.0) as load:
            eventually(load.more(300), PATIENCE)
            down = time.monotonic()
            old.kill() if how == "killed" else old.pause()
            accepts = sentinels.until_failed_over(old)
            eventually(load.more(300), PATIENCE)
            if how == "stopped":
                old.resume()
                eventually(lambda: sentinels.role(old) == "slave", PATIENCE)
                eventually(load.more(300), PATIENCE)
        jobs, client = "fastq:{default}:jobs", sentinels.at(new.port)
        eventually(lambda: client.hlen(jobs) == client.hexists(jobs, PAD), PATIENCE)
        lost = fleet.story().lost(load.confirmed)
        resumed = min(e.at for e in fleet.story().of("s") if e.at > accepts) - accepts
        figure(
            f"new master {accepts - down:.1f} s after; {len(load.confirmed)} jobs confirmed, {len(lost)} of them lost, "
            f"{len(load.refused)} refused, {len(fleet.story().repeated())} run twice; longest time without a confirmation "
            f"{load.gap('default'):.1f} s; first job {resumed:.2f} s after"
        )
        assert resumed <= 2.0
        assert len(lost) <= 2 * (Load.CONCURRENT + 1), "what was under way when it went down, and when it was left"
        assert_sound(sentinels.url)
        assert fleet.logged("worker exited") == fleet.logged("scheduler exited") == fleet.logged("monitor exited") == []
        assert fleet.stop() == 0


@pytest.mark.at_length("half of it is waiting for what does not come")
def test_who_asks_the_sentinels_once_is_found(make_fleet: MakeFleet) -> None:
    """The planted bug of the test above: nobody works for the new master."""
    with Sentinels(down_after=1.0) as sentinels:
        fleet = make_fleet(sentinels.url, workers=1, lease=5.0, response_timeout=10.0).serving(
            plant="stays_with_the_first"
        )
        old, _ = sentinels.servers
        with Load(sentinels.url, enqueue_timeout=10.0) as load:
            eventually(load.more(100), PATIENCE)
            old.kill()
            accepts = sentinels.until_failed_over(old)
            eventually(load.more(100), PATIENCE)
        with pytest.raises(AssertionError, match="not true within"):
            fleet.until_done(load.confirmed, 3.0)
        assert not [event for event in fleet.story().of("s") if event.at > accepts]
