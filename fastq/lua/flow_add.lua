#!lua
-- flow_add: write down a part of a workflow that has not begun; without flow_start within an hour it goes by itself
-- KEYS {q}:flow:<id> {q}:flow:<id>:states
-- ARGV offset letters, then field value ...     (letters: the states of the nodes from number `offset` on)
-- Sent twice: the same is written again, but nothing once it has begun. Reply 1, or 0 when it has.
local flow, states = KEYS[1], KEYS[2]
if redis.call('HEXISTS', flow, 'state') == 1 then return 0 end
redis.call('SETRANGE', states, ARGV[1], ARGV[2])
if #ARGV > 2 then redis.call('HSET', flow, unpack(ARGV, 3)) end
redis.call('PEXPIRE', flow, 3600000)
redis.call('PEXPIRE', states, 3600000)
return 1
