"""Pattern 6: one job calls several services; each has a limiter of its own, asked right before its call.

To have units of all of them before the first call: `async with fastq.acquire_all([stripe, sendgrid], timeout=10):`, which
keeps nothing of one while it waits for another.
"""

from __future__ import annotations

import asyncio
import os

from stage import Api, ended, post, redis, show, workers

import fastq
from fastq import get_or_clone_limiter

app = fastq.FastQ()


@app.task
async def process_order(order_id: str) -> None:
    """Process order - calls multiple external services."""
    # Step 1: Verify payment
    stripe_limiter = await get_or_clone_limiter("stripe_api", "order-processor")
    async with stripe_limiter.acquire_context(timeout=10.0):
        await post(os.environ["STRIPE_URL"], order_id)

    # Step 2: Send confirmation email
    sendgrid_limiter = await get_or_clone_limiter("sendgrid_api", "order-processor")
    async with sendgrid_limiter.acquire_context(timeout=30.0):
        await post(os.environ["SENDGRID_URL"], order_id)

    # Step 3: Update inventory
    inventory_limiter = await get_or_clone_limiter("inventory_api", "order-processor")
    async with inventory_limiter.acquire_context(timeout=5.0):
        await post(os.environ["INVENTORY_URL"], order_id)


async def main() -> None:
    async with Api() as stripe, Api(limit=25, window=1.0) as sendgrid, Api() as inventory:
        limits = {"STRIPE_RATE": 40, "SENDGRID_LIMIT": 25, "SENDGRID_WINDOW": 1.25, "INVENTORY_RATE": 30}
        urls = {"STRIPE_URL": stripe.url, "SENDGRID_URL": sendgrid.url, "INVENTORY_URL": inventory.url}
        with redis(**limits, **urls, INVENTORY_BURST=10):
            producer = fastq.FastQ()
            async with workers("several_services:app"):
                states = await ended([await producer.enqueue("process_order", f"order-{n}") for n in range(70)])
            await producer.aclose()
    apis = {"stripe": stripe.facts(), "sendgrid": sendgrid.facts(), "inventory": inventory.facts()}
    show({"jobs": states, **apis})


if __name__ == "__main__":
    asyncio.run(main())
