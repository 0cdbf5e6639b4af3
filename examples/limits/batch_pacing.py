"""Pattern 4: a large batch in chunks, at the limiter's pace; what fails is counted and does not stop the others."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence

from stage import Api, post, redis, show

from fastq import get_or_clone_limiter

logger = logging.getLogger(__name__)


async def process_batch_with_pacing(
    items: Sequence[int], limiter_id: str, chunk_size: int = 100, *, pause: float = 1.0
) -> tuple[int, int]:
    """Process large batch in chunks with rate limiting: how many were processed, how many failed."""
    limiter = await get_or_clone_limiter(limiter_id, "batch-processor")
    chunks = [items[i : i + chunk_size] for i in range(0, len(items), chunk_size)]
    processed = failed = 0
    for number, chunk in enumerate(chunks, 1):
        logger.info("Processing chunk %d/%d", number, len(chunks))
        for item in chunk:
            try:
                async with limiter.acquire_context(timeout=60.0):
                    await process_item(item)
                    processed += 1
            except TimeoutError:
                logger.warning("Rate limit timeout - skipping item")
                failed += 1
            except Exception:
                logger.exception("Item processing failed")
                failed += 1
        if number < len(chunks):
            await asyncio.sleep(pause)
    logger.info("Batch processing complete", extra={"total": len(items), "processed": processed, "failed": failed})
    return processed, failed


async def process_item(item: int) -> None:
    if item % 20 == 13:
        raise ValueError("an item that cannot be processed")
    await post(os.environ["INVENTORY_URL"], item)


async def main() -> None:
    async with Api() as api:
        with redis(INVENTORY_URL=api.url, INVENTORY_RATE=50, INVENTORY_BURST=5):
            logging.disable()  # some fail on purpose
            processed, failed = await process_batch_with_pacing(range(100), "inventory_api", chunk_size=40, pause=0.4)
            await (await get_or_clone_limiter("inventory_api")).aclose()
    show({"processed": processed, "failed": failed, "api": api.facts()})


if __name__ == "__main__":
    asyncio.run(main())
