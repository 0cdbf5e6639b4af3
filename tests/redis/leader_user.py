"""A process that wants to lead, for tests with several: ``python -m tests.redis.leader_user URL NAME TTL [sync]``.

Prints a line ``lead TOKEN`` when it leads and ``lost TOKEN FIRST LAST`` when that is over: the first and the last instant, by
CLOCK_MONOTONIC (which all processes share), at which it believed to lead.
"""

from __future__ import annotations

import asyncio
import sys
import time

import fastq


async def believe(term: fastq.Term) -> None:
    print("lead", term.token, flush=True)
    first = last = time.monotonic()
    try:
        while True:
            now = time.monotonic()
            term.check()
            last = now
            await asyncio.sleep(0.002)
    finally:
        print("lost", term.token, first, last, flush=True)


def believe_blocking(term: fastq.SyncTerm) -> None:
    print("lead", term.token, flush=True)
    first = last = time.monotonic()
    try:
        while True:
            now = time.monotonic()
            term.check()
            last = now
            time.sleep(0.002)
    finally:
        print("lost", term.token, first, last, flush=True)


if __name__ == "__main__":
    url, name, ttl, *how = sys.argv[1:]
    leader = fastq.FastQ(url).leader(name, ttl=float(ttl))
    if how:
        leader.sync.run(believe_blocking)
    else:
        asyncio.run(leader.run(believe))
