#!lua
-- batch_open: a batch begins, without any job
-- KEYS {q}:groups {q}:batch:<id>
-- ARGV id, then field value ...     (ttl, callbacks and what describes it; see include/batches.lua)
-- Sent twice: it begins once. Reply 1 begun, 0 begun before.
--- @include "now"
local groups, batch = KEYS[1], KEYS[2]
if redis.call('HEXISTS', batch, 'state') == 1 then return 0 end
redis.call('HSET', batch, 'state', 'filling', 'total', 0, 'started', now_ms(), unpack(ARGV, 2))
redis.call('ZADD', groups, now_ms(), ARGV[1])
return 1
