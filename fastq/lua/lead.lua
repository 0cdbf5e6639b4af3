#!lua flags=allow-oom
-- lead: take, keep or give up the leadership of the schedulers
-- KEYS leader
-- ARGV scheduler ttl_ms     (ttl 0: give it up)
-- Sent twice: the same state. Reply 1: this scheduler leads, 0: it does not.
local leader = redis.call('GET', KEYS[1])
if leader and leader ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then
  redis.call('DEL', KEYS[1])
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
