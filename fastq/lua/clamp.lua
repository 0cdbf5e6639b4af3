#!lua flags=allow-oom
-- clamp: bring leases that end further ahead than they are long back to their length
-- KEYS {q}:workers
-- ARGV worker lease_ms ...
-- After Redis's clock was set back a dead worker would keep its jobs for as long as the clock was ahead; a live one extends.
-- Sent twice: the second call finds nothing. Reply the number of leases that were brought back.
--- @include "now"
local workers, now, clamped = KEYS[1], now_ms(), 0
for i = 1, #ARGV, 2 do
  local deadline = redis.call('ZSCORE', workers, ARGV[i])
  if deadline and tonumber(deadline) > now + ARGV[i + 1] then
    redis.call('ZADD', workers, 'XX', now + ARGV[i + 1], ARGV[i])
    clamped = clamped + 1
  end
end
return clamped
