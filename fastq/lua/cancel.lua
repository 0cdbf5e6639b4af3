#!lua flags=allow-oom
-- cancel: take a scheduled, parked or pending job out, before a worker has it
-- KEYS {q}:jobs {q}:due {q}:ghosts {q}:workers {q}:unique {q}:unique:of {q}:deliveries {q}:done {q}:done:<ttl>:<n>
--      {q}:parked {q}:parked:of {q}:awaited {q}:events {q}:running:<worker> ...
-- ARGV id record bucket_name bucket_expires_ms     (record '': leave no trace)
-- Sent twice: 'unknown' the second time. The id stays in its ready list as a ghost that reserve.lua skips once.
-- Reply 'cancelled' | 'running' | 'unknown' | 'again' (the set of workers changed under way)
--- @include "now"
--- @include "release_unique"
--- @include "unpark_one"
--- @include "tell"
local jobs, due, ghosts, workers, id = KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1]
if redis.call('HEXISTS', jobs, id) == 0 then return 'unknown' end
if redis.call('ZREM', due, id) == 0 and not unpark_one(KEYS[10], KEYS[11], id) then
  if redis.call('ZCARD', workers) ~= #KEYS - 13 then return 'again' end
  for i = 14, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 0 then return 'again' end
    if redis.call('SISMEMBER', KEYS[i], id) == 1 then return 'running' end
  end
  redis.call('HINCRBY', ghosts, id, 1)
end
redis.call('HDEL', jobs, id)
redis.call('HDEL', KEYS[7], id)
release_unique(KEYS[5], KEYS[6], {id})
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[9], id, ARGV[2])
  redis.call('PEXPIREAT', KEYS[9], ARGV[4])
  redis.call('ZADD', KEYS[8], ARGV[4], ARGV[3])
end
if redis.call('HLEN', KEYS[12]) > 0 then tell(KEYS[12], KEYS[13], now_ms(), 'cancelled', {id}) end
return 'cancelled'
