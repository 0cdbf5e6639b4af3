#!lua flags=allow-oom
-- penalize: nobody is granted anything for a while; a bucket is empty after it
-- KEYS {l}:state:<key>
-- ARGV kind a b c duration_us   (duration 0: lift it; a bucket is empty after that, too)
-- Sent twice: it lasts a little longer; a penalty is never made shorter by another one.
-- Reply µs until it ends.
--- @include "now_us"
local state, kind, b, c = KEYS[1], ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4])
local now, duration = now_us(), tonumber(ARGV[5])
local before = tonumber(redis.call('HGET', state, 'until') or 0)
if duration < 1 then
  if before > now and kind == 'bucket' then redis.call('HSET', state, 'at', now, 'debt', b + c) end
  redis.call('HDEL', state, 'until')
  return 0
end
local stop = math.max(now + duration, before)
redis.call('HSET', state, 'until', stop)
local ends = stop
if kind == 'bucket' then
  redis.call('HSET', state, 'at', stop, 'debt', b + c)
  ends = stop + b + c
end
redis.call('PEXPIREAT', state, math.max(math.ceil(ends / 1000), redis.call('PEXPIRETIME', state)))
return stop - now
