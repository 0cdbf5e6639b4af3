"""A process that uses a limiter, for tests with several of them: ``python -m tests.redis.limit_user`` with JSON as argument.

Prints ``ready`` and waits for a line; then it uses the limiter until ``seconds`` have passed and prints one JSON list of
``[began, ended]`` by CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from typing import Any

import fastq


async def main(order: dict[str, Any]) -> None:
    app = fastq.FastQ(order["url"])
    limiter = app.limiter("shared", **order["options"])
    with contextlib.suppress(TimeoutError):
        await limiter.state()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    end, uses = time.monotonic() + order["seconds"], []

    async def one() -> None:
        while (now := time.monotonic()) < end:
            try:
                async with limiter.acquire_context(timeout=end - now):
                    began = time.monotonic()
                    if order.get("hold"):
                        if order.get("told"):
                            print("holding", flush=True)
                        await asyncio.sleep(
                            order["hold"] if order.get("told") else random.uniform(0, 2 * order["hold"])
                        )
                    uses.append((began, time.monotonic()))
            except TimeoutError:
                return

    await asyncio.gather(*(one() for _ in range(order["tasks"])))
    print(json.dumps(uses), flush=True)
    await app.aclose()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
