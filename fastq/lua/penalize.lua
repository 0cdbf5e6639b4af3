#!lua flags=allow-oom
-- penalize: nobody is granted anything for a while; a bucket is empty after it; an adaptive limiter goes at half its pace
-- KEYS {l}:state:<key>
-- ARGV kind a b c duration_us recovery_us   (duration 0: lift it; a bucket is empty after that, too | recovery 0: not adaptive)
-- Sent twice: it lasts a little longer; a penalty is never made shorter by another one. The pace is halved once for all that
-- comes while a penalty lasts, and for a second after the halving: many hear of one overload, and a call may be repeated.
-- Reply µs until it ends.
--- @include "now_us"
--- @include "number"
--- @include "pace"
--- @include "lasts"
local state, kind, b, c = KEYS[1], ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4])
local now, duration, recovery = now_us(), tonumber(ARGV[5]), tonumber(ARGV[6])
local before = number(redis.call('HGET', state, 'until'))
if duration < 1 then
  if before > now and kind == 'bucket' then redis.call('HSET', state, 'at', now, 'debt', b + c) end
  redis.call('HDEL', state, 'until', 'pace', 'since', 'recovery', 'halved')
  return 0
end
local stop = math.max(now + duration, before)
redis.call('HSET', state, 'until', stop)
local saved = redis.call('HMGET', state, 'pace', 'since', 'recovery', 'halved')
local pace = pace_of(saved[1], saved[2], saved[3])
if recovery > 0 or pace then
  local slower = pace_at(pace, now)
  if recovery < 1 then
    recovery = pace.recovery
  elseif before <= now and now >= number(saved[4]) + 1000000 then
    slower = math.max(1 / 32, slower / 2)
    redis.call('HSET', state, 'halved', now)
  end
  redis.call('HSET', state, 'pace', string.format('%.17g', slower), 'since', stop, 'recovery', recovery)
  pace = pace_of(slower, stop, recovery)
end
local ends = stop
if kind == 'bucket' then
  redis.call('HSET', state, 'at', stop, 'debt', b + c)
  ends = stop + lasts(pace, stop, b + c)
end
if pace then ends = math.max(ends, stop + pace.span) end
redis.call('PEXPIREAT', state, math.max(math.min(math.ceil(ends / 1000), 1e15), redis.call('PEXPIRETIME', state)))
return stop - now
