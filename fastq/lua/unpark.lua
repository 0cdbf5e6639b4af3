#!lua flags=allow-oom
-- unpark: hand up to `want` jobs that wait for a limit to a worker that has room for them
-- KEYS {q}:workers {q}:running:<worker> {q}:jobs {q}:paused {q}:deliveries {q}:parked {q}:parked:of {q}:parked:by:<limit>
--      {q}:awaited {q}:events
-- ARGV worker limit want look_ms     (ms until somebody else should look, if jobs are left)
-- Sent twice: as reserve.lua; the jobs of a lost reply are in the running set, and resume.lua names them.
-- Reply {now_ms, held, ids, envelopes, deliveries, left}; held -1: the lease is gone; deliveries is empty when no job has any.
--- @include "now"
--- @include "number"
--- @include "first_parked"
--- @include "tell"
local workers, running, jobs, paused, deliveries, parked, parked_of, by = unpack(KEYS, 1, 8)
local now, want = now_ms(), math.min(tonumber(ARGV[3]), 2000)
if not redis.call('ZSCORE', workers, ARGV[1]) then return {now, -1, {}, {}, {}, 0} end
if redis.call('EXISTS', paused) == 1 then
  return {now, redis.call('SCARD', running) - 1, {}, {}, {}, redis.call('ZCARD', by)}
end
local ids = first_parked(parked, parked_of, by, ARGV[2], want, now + ARGV[4])
local left = redis.call('ZCARD', by)
if #ids == 0 then return {now, redis.call('SCARD', running) - 1, {}, {}, {}, left} end
redis.call('SADD', running, unpack(ids))
if redis.call('HLEN', KEYS[9]) > 0 then tell(KEYS[9], KEYS[10], now, 'started', ids) end
local envelopes = redis.call('HMGET', jobs, unpack(ids))
local suspects = {}
if redis.call('HLEN', deliveries) > 0 then
  suspects = redis.call('HMGET', deliveries, unpack(ids))
  for i = 1, #ids do suspects[i] = number(suspects[i]) end
end
return {now, redis.call('SCARD', running) - 1, ids, envelopes, suspects, left}
