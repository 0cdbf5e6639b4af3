#!lua
-- fire: enqueue the job of one tick of a schedule, unless this tick or a later one was enqueued before
-- KEYS {q}:ticks {q}:jobs {q}:ready:<priority> {q}:wake
-- ARGV schedule tick_ms id envelope
-- Sent twice, or by two schedulers: the compare-and-set on the last tick lets one of them through.
-- Reply 1 enqueued, 0 done before.
--- @include "wake"
local last = redis.call('HGET', KEYS[1], ARGV[1])
if last and tonumber(last) >= tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
if redis.call('HSETNX', KEYS[2], ARGV[3], ARGV[4]) == 1 then
  redis.call('RPUSH', KEYS[3], ARGV[3])
  wake(KEYS[4])
end
return 1
