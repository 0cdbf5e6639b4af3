#!lua flags=allow-oom
-- hold: renew the leases of slots
-- KEYS {l}:slots:<key>
-- ARGV lease_ms holder ...
-- Sent twice: the same state. A lease that has run out is renewed as long as nobody took the slot; one that is gone stays
-- gone. Reply per holder: 1 renewed, 0 gone.
--- @include "now_us"
--- @include "number"
--- @include "expire_slots"
local ends, reply = math.floor(now_us() / 1000) + ARGV[1], {}
for i = 2, #ARGV do
  if redis.call('ZSCORE', KEYS[1], ARGV[i]) then
    redis.call('ZADD', KEYS[1], ends, ARGV[i])
    reply[i - 1] = 1
  else
    reply[i - 1] = 0
  end
end
expire_slots(KEYS[1])
return reply
