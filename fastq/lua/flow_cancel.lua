#!lua flags=allow-oom
-- flow_cancel: no further job of a workflow begins; those under way are cancelled one by one (cancel.lua) by who asked
-- KEYS {q}:groups {q}:flow:<id> {q}:flow:<id>:states
-- ARGV id
-- Sent twice: the same. Reply the letters of its nodes; nothing when it has ended or is unknown.
--- @include "now"
--- @include "number"
--- @include "add"
--- @include "wake"
--- @include "tell"
--- @include "flows"
local groups, flow = KEYS[1], KEYS[2]
if redis.call('HGET', flow, 'state') ~= 'running' then return false end
redis.call('HSET', flow, 'stop', 1)
count_flow(groups, now_ms(), flow, ARGV[1], 0, 0, true, '')
return redis.call('GET', KEYS[3])
