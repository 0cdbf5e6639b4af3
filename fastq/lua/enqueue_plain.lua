#!lua
-- enqueue_plain: accept jobs of one queue and one priority that are pending at once and whose ids are ours: most jobs
-- KEYS {q}:jobs {q}:ready:<priority> {q}:wake {q}:producers
-- ARGV producer sequence, then per job: id envelope
-- Sent twice: as enqueue.lua. Few keys and few calls: what a caller waits for is cold, and each costs it as much as 15 µs.
-- Reply 0; 1: it was a repetition.
local jobs, ready, wake_list, producers = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local last = redis.call('HGET', producers, ARGV[1])
if last and (tonumber(last) or 0) >= tonumber(ARGV[2]) and tonumber(last) < redis.call('TIME')[1] * 1e6 + 864e8 then return 1 end
redis.call('HSET', producers, ARGV[1], ARGV[2])
local ids = {}
for i = 3, #ARGV, 2 do ids[#ids + 1] = ARGV[i] end
redis.call('HSET', jobs, unpack(ARGV, 3))
-- leave one token for an idle worker; behind other pending jobs there most often is one
if redis.call('RPUSH', ready, unpack(ids)) > #ids and redis.call('LLEN', wake_list) > 0 then return 0 end
if redis.call('RPUSH', wake_list, '1') > 1 then redis.call('RPOP', wake_list) end
return 0
