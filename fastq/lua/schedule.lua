#!lua
-- schedule: store the definition of a schedule, if what is stored is still what the caller has seen
-- KEYS {q}:schedules {q}:ticks
-- ARGV name seen definition begin most     (seen '': nothing; begin '1': its ticks begin anew, now; most: schedules of a queue)
-- Sent twice: what is to be stored is there already. Reply 1 stored, 0 something else is there, -1 the queue has too many.
--- @include "now"
local schedules, ticks, name = KEYS[1], KEYS[2], ARGV[1]
local current = redis.call('HGET', schedules, name) or ''
if current == ARGV[3] then return 1 end
if current ~= ARGV[2] then return 0 end
if current == '' and redis.call('HLEN', schedules) >= tonumber(ARGV[5]) then return -1 end
redis.call('HSET', schedules, name, ARGV[3])
redis.call(ARGV[4] == '1' and 'HSET' or 'HSETNX', ticks, name, now_ms())
return 1
