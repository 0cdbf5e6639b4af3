"""Pattern 3: the clock starts the same function in every process; exactly one of them does the work.

This elects for one run. To lead for as long as a process lives, with renewal and a fencing token, see `app.leader`.
"""

from __future__ import annotations

import asyncio
import os
import sys

from stage import Api, begin, post, redis, show, together

from fastq import get_or_clone_limiter


async def scheduled_daily_report() -> str:
    """Generate daily report - only one worker should run this."""
    limiter = await get_or_clone_limiter("daily_report", "all-workers")
    try:
        if not await limiter.try_acquire(timeout=0):
            return "Another worker is generating report, skipping"
        await post(os.environ["REPORTS_URL"], {"report": os.getpid()})
        return "Daily report sent successfully"
    finally:
        await limiter.aclose()


async def main() -> None:
    async with Api() as api:
        with redis(REPORTS_URL=api.url):
            said = await together(__file__, 6)
    show({"workers": said, "reports": api.facts()})


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        begin()
        print(asyncio.run(scheduled_daily_report()))
    else:
        asyncio.run(main())
