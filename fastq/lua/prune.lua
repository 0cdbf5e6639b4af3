#!lua flags=allow-oom
-- prune: forget producers that have sent nothing for long, and the names of expired buckets of finished jobs
-- KEYS {q}:producers {q}:done
-- ARGV idle_ms cursor count     (cursor of HSCAN: '0' begins a round; count: about how many producers to look at)
-- Sent twice: what is gone stays gone. Reply {producers, buckets, cursor of the next call ('0': the round is over)}.
--- @include "now"
local now, forgotten = now_ms(), 0
local scanned = redis.call('HSCAN', KEYS[1], ARGV[2], 'COUNT', ARGV[3])
for i = 1, #scanned[2], 2 do
  local sequence = tonumber(scanned[2][i + 1]) -- µs of Redis's clock at the last call
  if sequence and sequence / 1000 < now - ARGV[1] then forgotten = forgotten + redis.call('HDEL', KEYS[1], scanned[2][i]) end
end
return {forgotten, redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now), scanned[1]}
