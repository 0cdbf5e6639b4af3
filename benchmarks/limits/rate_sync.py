"""rate-sync's acquire on Redis, sequential, with a limit that is never reached. Run by a virtual environment of its own.

python rate_sync.py URL SECONDS
"""

from __future__ import annotations

import asyncio
import sys
import time

from ratesync import configure_limiter, configure_store, get_or_clone_limiter


async def main(url: str, seconds: float) -> None:
    configure_store("redis", strategy="redis", url=url)
    configure_limiter("speed", store_id="redis", algorithm="token_bucket", rate_per_second=10_000_000.0)
    limiter = await get_or_clone_limiter("speed", "bench")
    for _ in range(50):
        await limiter.acquire()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        await limiter.acquire()
        calls += 1
    print(calls / (time.perf_counter() - start), flush=True)


asyncio.run(main(sys.argv[1], float(sys.argv[2])))
