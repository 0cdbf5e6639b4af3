"""One job asked, waited for, watched, explained, cancelled and done once: ``python examples/asking.py``.

Everything on a private server in this process (``memory://``); the worker is a real one, on this event loop.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import fastq

begun = asyncio.Event()
app = fastq.FastQ("memory://", log_level="error", result_ttl=600)


@app.task
async def resize(pages: int, job: fastq.JobContext) -> str:
    for page in range(pages):
        await job.progress(page + 1, pages, message=f"page {page + 1}")
        await asyncio.sleep(0.01)
    return f"{pages} pages"


@app.task(soft_timeout=60, timeout=90)
async def crawl(site: str) -> str:
    begun.set()
    await asyncio.Event().wait()
    return site


@app.task(unique="until_executed")
async def sync(account: int) -> int:
    return account


async def ask() -> None:
    """Results, progress, events, what is in the way."""
    job = await resize.enqueue(5)
    print("before a worker has it:", await app.explain(job.id))
    running = asyncio.create_task(app.drain())
    kinds = [event.kind async for event in job.events()]
    print("its result:", await job.result(timeout=10), "| what happened:", sorted(set(kinds)))
    await running
    status = await job.status()
    assert status is not None
    print(
        "its status:",
        status.to_dict()["status"],
        "after",
        status.attempts,
        "attempt; unknown:",
        await app.get_status("nobody"),
    )


async def cancel() -> None:
    """One that runs, and all of a tag."""
    job = await crawl.enqueue("https://example.org")
    running = asyncio.create_task(app.drain())
    await begun.wait()
    print("cancelled:", await job.cancel(terminate=True))
    with suppress(fastq.JobCancelled):
        await job.result(timeout=10)
    await running
    for site in ("a", "b", "c"):
        await crawl.options(tags=["tenant:42"], delay=3_600).enqueue(site)
    print("with the tag:", await app.cancel_tag("tenant:42"), "cancelled")


async def once() -> None:
    """A second call of the same thing is the first one."""
    first, second = await sync.enqueue(7), await sync.enqueue(7)
    print("unique:", first.id == second.id, "| created:", [first.created, second.created])
    key = fastq.make_idempotency_key("sync", (8,), {})
    calls = [await sync.options(unique=None, idempotency_key=key).enqueue(8) for _ in range(3)]
    await app.drain()
    print(
        "idempotent:",
        [await call.result(timeout=10) for call in calls],
        "from",
        len({call.id for call in calls}),
        "job",
    )


async def queues() -> None:
    """Pause, look, take by hand, purge."""
    await app.queues.pause(task=sync)
    job = await sync.enqueue(9)
    print("paused:", [cause.code for cause in (await app.explain(job.id)).causes])
    await app.queues.resume(task=sync)
    async with app.consume() as messages:
        message = await messages.reserve_next()
        assert message is not None
        await message.ack({"by": "hand"})
    await sync.enqueue(10)
    print("left:", await app.queue_length(), "| purged:", await app.purge_queue())


async def main() -> None:
    """One after the other."""
    for part in (ask, cancel, once, queues):
        await part()
    await app.aclose()


if __name__ == "__main__":
    asyncio.run(main())
