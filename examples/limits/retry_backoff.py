"""Pattern 5: an operation that is tried again, later each time, and asks its limiter before every attempt.

For a job there is nothing to write: `@app.task(max_attempts=5, retry=fastq.Exponential(base=2))` waits between attempts
without holding a worker (docs/retries.md). This is for code that is no job, and as an operation inside one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from stage import Api, post, redis, show

from fastq import get_or_clone_limiter

logger = logging.getLogger(__name__)
T = TypeVar("T")


async def retry_with_backoff(
    operation: Callable[[], Awaitable[T]],
    limiter_id: str,
    max_retries: int = 5,
    base_delay: float = 1.0,
    *,
    timeout: float = 30.0,
) -> T:
    """Retry operation with exponential backoff and rate limiting."""
    limiter = await get_or_clone_limiter(limiter_id, "retry-worker")
    for attempt in range(max_retries):
        try:
            async with limiter.acquire_context(timeout=timeout):
                return await operation()
        except Exception as error:  # a TimeoutError of the limiter among them
            reason = "Rate limit timeout" if isinstance(error, TimeoutError) else "Operation failed"
            if attempt == max_retries - 1:
                logger.error("Max retries exceeded")
                raise
            delay = base_delay * 2**attempt
            logger.warning("%s - retry %d/%d in %s s: %s", reason, attempt + 1, max_retries, delay, error)
            await asyncio.sleep(delay)
    raise ValueError("max_retries must be at least 1")


async def outcome(work: Awaitable[Any]) -> str:
    try:
        await work
    except Exception as error:  # noqa: BLE001 - whatever it is, its name is what is shown
        return type(error).__name__
    return "done"


async def main() -> None:
    logging.disable()  # failing on purpose
    async with Api(broken=3) as flaky, Api(broken=99) as dead, Api() as healthy:
        with redis(EXTERNAL_LIMIT=8):
            limiter = await get_or_clone_limiter("external_api")
            facts: dict[str, Any] = {
                "flaky": await outcome(retry_with_backoff(lambda: post(flaky.url), "external_api", base_delay=0.1)),
                "dead": await outcome(retry_with_backoff(lambda: post(dead.url), "external_api", 3, base_delay=0.05)),
                "remaining": (await limiter.state()).remaining,
            }
            await limiter.acquire()  # the last one of this minute
            limited = retry_with_backoff(lambda: post(healthy.url), "external_api", 3, base_delay=0.05, timeout=0.1)
            facts["limited"] = await outcome(limited)
            await limiter.aclose()
    show(facts | {"flaky_api": flaky.facts(), "dead_api": dead.facts(), "healthy_api": healthy.facts()})


if __name__ == "__main__":
    asyncio.run(main())
