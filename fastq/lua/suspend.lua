#!lua flags=allow-oom
-- suspend: pause or resume a schedule; ticks that pass while it is paused are dropped
-- KEYS {q}:schedules {q}:ticks {q}:suspended
-- ARGV name pause     (pause '1', resume '0')
-- Sent twice: as once; its ticks begin anew when it was paused. Reply 1 done, 0 no such schedule.
--- @include "now"
--- @include "number"
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
if ARGV[2] == '1' then
  redis.call('SADD', KEYS[3], ARGV[1])
elseif redis.call('SREM', KEYS[3], ARGV[1]) == 1 then
  local last, now = redis.call('HGET', KEYS[2], ARGV[1]), now_ms()
  redis.call('HSET', KEYS[2], ARGV[1], math.max(number(last), now))
end
return 1
