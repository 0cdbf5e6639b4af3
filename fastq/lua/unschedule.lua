#!lua flags=allow-oom
-- unschedule: remove a schedule and all that is known of it; its jobs stay
-- KEYS {q}:schedules {q}:ticks {q}:suspended {q}:runs
-- ARGV name seen     (seen '': whatever is stored)
-- Sent twice: gone the second time. Reply 1 removed, 0 not there, or something else is.
local current = redis.call('HGET', KEYS[1], ARGV[1])
if not current or (ARGV[2] ~= '' and current ~= ARGV[2]) then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('SREM', KEYS[3], ARGV[1])
redis.call('HDEL', KEYS[4], ARGV[1])
return 1
