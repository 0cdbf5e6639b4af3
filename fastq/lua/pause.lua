#!lua flags=allow-oom
-- pause: a queue, or a task of it, is paused; a full Redis is a reason to do that
-- KEYS {q}:paused {q}:paused:tasks
-- ARGV name pause     (of a task; '' '' the whole queue)
-- Sent twice: as once, with another reply. Reply 1 paused, 0 it was already.
--- @include "now"
if ARGV[1] ~= '' then return redis.call('HSET', KEYS[2], ARGV[1], ARGV[2]) end
return redis.call('SET', KEYS[1], now_ms(), 'NX') and 1 or 0
