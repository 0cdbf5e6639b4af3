"""Pattern 4, an import: users from a CSV file into a database, no faster than it may be written to.

A faulty row is passed over. If the limiter's timeout says that the database has no room, the import stops where it is.
"""

from __future__ import annotations

import asyncio
import csv
import logging
import sqlite3
import sys
import tempfile
from pathlib import Path

from stage import redis, show, until

from fastq import get_or_clone_limiter

logger = logging.getLogger(__name__)


async def import_users_from_csv(csv_path: Path, database: sqlite3.Connection, *, timeout: float = 10.0) -> int:
    """Import users from CSV with rate limiting; how many there are now."""
    with csv_path.open(newline="") as file:
        users = list(csv.DictReader(file))
    limiter = await get_or_clone_limiter("db_writes", "import-worker")
    imported = 0
    for user in users:
        try:
            async with limiter.acquire_context(timeout=timeout):
                with database:
                    database.execute("INSERT INTO users VALUES (:email, :name)", user)
                imported += 1
                if imported % 100 == 0:
                    logger.info("Imported %d/%d users", imported, len(users))
        except TimeoutError:
            logger.error("Database write timeout - stopping import")
            break
        except sqlite3.Error as error:
            logger.warning("Failed to import user: %s", error)
    logger.info("Import complete: %d/%d users imported", imported, len(users))
    return imported


async def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, redis(DB_RATE=200):
        database = sqlite3.connect(":memory:")
        database.execute("CREATE TABLE users (email TEXT PRIMARY KEY, name TEXT NOT NULL)")
        path = Path(folder) / "users.csv"
        path.write_text("email,name\n" + "".join(f"{n % 390}@example.org,User {n}\n" for n in range(400)))
        loop = asyncio.get_running_loop()
        start = loop.time()
        first = await import_users_from_csv(path, database)
        seconds = loop.time() - start
        path.write_text("email,name\n" + "".join(f"{n}@example.com,User {n}\n" for n in range(400)))
        limiter = await get_or_clone_limiter("db_writes")
        # The operator wants the database for himself, once 100 of the second file are in.
        task = asyncio.create_task(import_users_from_csv(path, database))
        await until(lambda: rows(database) >= first + 100)
        await limiter.penalize(60)
        second = await task
        await limiter.aclose()
        show({"first": first, "seconds": seconds, "second": second, "rows": rows(database)})
        database.close()


def rows(database: sqlite3.Connection) -> int:
    return int(database.execute("SELECT count(*) FROM users").fetchone()[0])


if __name__ == "__main__":
    asyncio.run(main())
