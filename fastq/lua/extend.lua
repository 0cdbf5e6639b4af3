#!lua flags=allow-oom
-- extend: renew the leases of live workers
-- KEYS {q}:workers
-- ARGV lease_ms worker ...
-- Sent twice: the same state. A lease that is gone stays gone. Reply per worker: 1 extended, 0 gone.
--- @include "now"
local now, reply = now_ms(), {}
for i = 2, #ARGV do
  if redis.call('ZSCORE', KEYS[1], ARGV[i]) then
    redis.call('ZADD', KEYS[1], 'XX', now + ARGV[1], ARGV[i])
    reply[i - 1] = 1
  else
    reply[i - 1] = 0
  end
end
return reply
