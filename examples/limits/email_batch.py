"""Pattern 1, with a context manager: a batch of e-mails, counted; a pause whenever the provider's quota is used up."""

from __future__ import annotations

import asyncio
import logging
import os

from stage import Api, post, redis, show

from fastq import get_or_clone_limiter

logger = logging.getLogger(__name__)


async def send_email_batch(emails: list[str], *, timeout: float = 60.0, pause: float = 10.0) -> tuple[int, int]:
    """Send an e-mail batch with rate limiting: how many were sent, how many were not."""
    limiter = await get_or_clone_limiter("sendgrid_api", "email-worker")
    sent_count = failed_count = 0
    for email in emails:
        try:
            async with limiter.acquire_context(timeout=timeout):
                await post(os.environ["SENDGRID_URL"], {"to": email})
                sent_count += 1
        except TimeoutError:
            logger.warning("SendGrid rate limit - pausing")
            failed_count += 1
            await asyncio.sleep(pause)
        except Exception:
            logger.exception("Failed to send email")
            failed_count += 1
    logger.info("Email batch complete", extra={"sent": sent_count, "failed": failed_count})
    return sent_count, failed_count


async def main() -> None:
    async with Api(limit=15, window=1.0, broken=2) as api:
        with redis(SENDGRID_URL=api.url, SENDGRID_LIMIT=15, SENDGRID_WINDOW=1.25):
            logging.disable()  # two are broken on purpose
            # Two batches at once share the quota. The first waits for it, the second one gives up after 0.2 s each time.
            batches = await asyncio.gather(
                send_email_batch([f"{n}@example.org" for n in range(25)]),
                send_email_batch([f"{n}@example.com" for n in range(15)], timeout=0.2, pause=0.3),
            )
            limiter = await get_or_clone_limiter("sendgrid_api")
            await limiter.aclose()
    show({"patient": batches[0], "impatient": batches[1], "sendgrid": api.facts()})


if __name__ == "__main__":
    asyncio.run(main())
