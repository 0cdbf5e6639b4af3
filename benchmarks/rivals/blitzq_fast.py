"""BlitzQ in its fast mode, which loses the jobs of a killed worker."""

from __future__ import annotations

import os

os.environ["BENCH_BLITZQ_MODE"] = "fast"

from benchmarks.rivals.blitzq import many, one, work  # noqa: F401

ABOUT = {
    "packages": ["blitzq==1.1.0", "hiredis==3.5.0", "uvloop==0.23.0"],
    "least": [3, 12],
    "guarantee": "at most once (mode=fast: popped before it runs)",
    "settings": "mode=fast, store_results=False, concurrency=500, batch-size=500, enqueue_many by 1,000",
    "handlers": "both",
}
