"""The yardstick: a loop that only reserves, runs a Task per job and settles. No lease, no fence, no retry, no limits.

redis-py on uvloop, the same kind of commands in batches of 200, settle and reserve in one script call.
"""

from __future__ import annotations

import asyncio
import sys

import msgspec
import redis.asyncio
import uvloop
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from fastq.broker.keys import QueueKeys
from fastq.job import Envelope

BATCH = 200
TURN = """
if #ARGV > 1 then
  local done = {}
  for i = 2, #ARGV do done[i - 1] = ARGV[i] end
  redis.call('SREM', KEYS[2], unpack(done))
  redis.call('HDEL', KEYS[3], unpack(done))
end
local ids = redis.call('LPOP', KEYS[1], ARGV[1])
if not ids then return {{}, {}} end
redis.call('SADD', KEYS[2], unpack(ids))
return {ids, redis.call('HMGET', KEYS[3], unpack(ids))}
"""


async def noop(number: int) -> None:
    """The handler."""


async def main(url: str) -> None:
    keys = QueueKeys("fastq", "default")
    client = redis.asyncio.from_url(url, socket_timeout=None, retry=Retry(NoBackoff(), 0), protocol=2)
    sha = await client.script_load(TURN)
    envelopes, bodies = msgspec.msgpack.Decoder(Envelope), msgspec.msgpack.Decoder(tuple[int])
    done: list[bytes] = []

    async def run(job_id: bytes, data: bytes) -> None:
        await noop(*bodies.decode(envelopes.decode(data).body))
        done.append(job_id)

    while True:
        finished, done[:] = list(done), []
        ids, datas = await client.evalsha(sha, 3, keys.ready[5], keys.running("bare"), keys.jobs, BATCH, *finished)
        if not ids and not finished:
            await asyncio.sleep(0.001)
        tasks = [asyncio.create_task(run(i, d)) for i, d in zip(ids, datas, strict=True)]
        if tasks:
            await asyncio.wait(tasks)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
