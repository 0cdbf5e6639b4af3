#!lua
-- flow_spawn: what a running job adds to its workflow begins
-- KEYS {q}:groups {q}:flow:<id> {q}:flow:<id>:states
-- ARGV id node name first letters roots tasks exit     (node, name: as for flow_grow; exit: the node whose result joins the lists
--   of those that wait for the job, or -1)
-- Sent twice: it has begun once. Reply 1 begun, 2 begun and there is more (flow_unfold), 0 begun before; -1 the workflow has
-- ended, or was cancelled, -2 the job does not run any more, -3 it is not lists alone that wait for it.
--- @include "now"
--- @include "number"
--- @include "add"
--- @include "wake"
--- @include "tell"
--- @include "flows"
--- @include "begin"
--- @include "unfold"
local groups, flow, states, id, node, name, first, exit = KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[8]
local field = 'x' .. node .. '.' .. name
local state, stop, known, later, behind = unpack(redis.call('HMGET', flow, 'state', 'stop', field, 'later', 'c' .. node))
if state ~= 'running' or stop then return -1 end
if redis.call('GETRANGE', states, node, node) ~= 'a' then return -2 end
if known == first .. ' ' .. #ARGV[5] .. ' 1' then return 0 end
if exit ~= '-1' then
  local gathers = first_of(behind or '', 1000)
  if #gathers == 0 then return -3 end
  for _, gather in ipairs(gathers) do
    if redis.call('GETRANGE', states, gather, gather) ~= 'g' then return -3 end
  end
  for _, gather in ipairs(gathers) do
    add(flow, 'p' .. gather, 1)
    local items = redis.call('HGET', flow, 'g' .. gather) or ''
    redis.call('HSET', flow, 'g' .. gather, items == '' and exit or items .. ',' .. exit)
  end
  redis.call('HSET', flow, 'c' .. exit, behind)
end
local spawned = redis.call('HGET', flow, 'spawned')
redis.call('SETRANGE', states, first, ARGV[5])
redis.call('HSET', flow, field, first .. ' ' .. #ARGV[5] .. ' 1', 'spawned', (spawned and spawned .. ';' or '') .. ARGV[7])
local begun, rest = unfold(groups, flow, id, (later and later .. ',' or '') .. ARGV[6])
count_flow(groups, now_ms(), flow, id, begun, 0, later, rest)
return rest == '' and 1 or 2
