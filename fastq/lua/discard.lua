#!lua flags=allow-oom
-- discard: purge dead letters, by id or those older than a time
-- KEYS {q}:dead {q}:dead:jobs {q}:dead:errors
-- ARGV before_ms limit [id ...]     (with ids, before_ms and limit are not used)
-- Sent twice: a job is gone once. Reply the number of jobs purged.
local dead, ids = KEYS[1], {}
if #ARGV > 2 then
  for i = 3, #ARGV do ids[#ids + 1] = ARGV[i] end
else
  ids = redis.call('ZRANGE', dead, '-inf', ARGV[1], 'BYSCORE', 'LIMIT', 0, ARGV[2])
end
if #ids == 0 then return 0 end
redis.call('HDEL', KEYS[2], unpack(ids))
redis.call('HDEL', KEYS[3], unpack(ids))
return redis.call('ZREM', dead, unpack(ids))
