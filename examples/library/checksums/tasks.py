"""The tasks of the library. It knows no application and no Redis: whoever installs it has those."""

from __future__ import annotations

import hashlib
import zlib

import fastq

tasks = fastq.Tasks()


@tasks.task(name="checksums.crc32")  # the library's name in front keeps its tasks apart from everybody else's
async def crc32(text: str) -> int:
    return zlib.crc32(text.encode())


@tasks.task(name="checksums.sha256", timeout=60, max_attempts=3, retry=fastq.Fixed(10), retry_on=OSError)
def sha256(path: str) -> str:
    """A plain function: workers run it in a thread."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
