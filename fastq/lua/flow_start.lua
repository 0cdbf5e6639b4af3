#!lua
-- flow_start: a workflow that was written down begins: its roots become pending, a bounded number at once
-- KEYS {q}:groups {q}:flow:<id> {q}:flow:<id>:states
-- ARGV id nodes roots, then field value ...     (roots: a list as in include/flows.lua; the fields: policy, ttl and what describes it)
-- Sent twice: it has begun once. Reply 1 begun, 2 begun and there is more (flow_unfold), 0 begun before, -1 a part of it is missing.
--- @include "now"
--- @include "number"
--- @include "add"
--- @include "wake"
--- @include "tell"
--- @include "flows"
--- @include "begin"
--- @include "unfold"
local groups, flow, states, id, now = KEYS[1], KEYS[2], KEYS[3], ARGV[1], now_ms()
if redis.call('HEXISTS', flow, 'state') == 1 then return 0 end
if redis.call('STRLEN', states) ~= tonumber(ARGV[2]) or redis.call('HEXISTS', flow, 'whole') == 0 then return -1 end
redis.call('HSET', flow, 'state', 'running', 'started', now, 'nodes', ARGV[2], unpack(ARGV, 4))
redis.call('PERSIST', flow)
redis.call('PERSIST', states)
redis.call('ZADD', groups, now, id)
local begun, rest = unfold(groups, flow, id, ARGV[3])
count_flow(groups, now, flow, id, begun, 0, nil, rest)
return rest == '' and 1 or 2
