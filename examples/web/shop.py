"""The jobs of a shop. The web applications beside this file enqueue them; ``fastq supervise shop:app`` runs them."""

from __future__ import annotations

import fastq

app = fastq.FastQ(result_ttl="10m", enqueue_timeout=2.0)  # connects at the first call, not here


@app.task(queue="emails")
async def send_receipt(order: int, to: str) -> str:
    """Where a real one would talk to a mail server."""
    return f"receipt {order} for {to}"
