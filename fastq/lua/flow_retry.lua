#!lua
-- flow_retry: a workflow that has failed goes on: its failed jobs leave the dead letters and run again
-- KEYS {q}:groups {q}:flow:<id> {q}:flow:<id>:states {q}:dead {q}:dead:jobs {q}:dead:errors
-- ARGV id, then node envelope ...     (the envelopes with a fresh budget)
-- Sent twice: a job leaves the dead letters once. It may be running again, because of an earlier part of the same retry.
-- Reply how many run again.
--- @include "now"
--- @include "number"
--- @include "add"
--- @include "wake"
--- @include "tell"
--- @include "flows"
--- @include "begin"
local groups, flow, states, id, dead = KEYS[1], KEYS[2], KEYS[3], ARGV[1], KEYS[4]
local again, now, state = {}, now_ms(), redis.call('HGET', flow, 'state')
if state ~= 'failed' and state ~= 'running' then return 0 end
for i = 2, #ARGV, 2 do
  local node = ARGV[i]
  local job = id .. '.' .. node
  if redis.call('GETRANGE', states, node, node) == 'f' and redis.call('ZREM', dead, job) == 1 then
    redis.call('HDEL', KEYS[5], job)
    redis.call('HDEL', KEYS[6], job)
    redis.call('HSET', flow, 'e' .. node, ARGV[i + 1])
    again[#again + 1] = tonumber(node)
  end
end
if #again == 0 then return 0 end
redis.call('HSET', flow, 'state', 'running')
redis.call('HDEL', flow, 'finished')
add(flow, 'bad', -#again)
redis.call('PERSIST', flow)
redis.call('PERSIST', states)
redis.call('ZADD', groups, now, id)
letters_of(states, again, 'w')
local begun, rest = begin(groups, flow, id, again)
local before = redis.call('HGET', flow, 'later')
local lists = {before or nil}
if #rest > 0 then lists[#lists + 1] = table.concat(rest, ',') end
count_flow(groups, now, flow, id, begun, 0, before, table.concat(lists, ','))
return #again
