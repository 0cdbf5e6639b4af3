#!lua
-- flow_grow: make room for nodes that a running job adds to its workflow; they do not count before they begin (flow_spawn)
-- KEYS {q}:flow:<id> {q}:flow:<id>:states
-- ARGV node name count most     (node: of the job that adds them; name: of this addition, so that a repeated run finds it again)
-- Sent twice: the same room. Reply {first node, how many, 1 when they have begun}; {-1} the workflow has ended, or was
-- cancelled, {-2} that job does not run any more, {-3} it would have more than `most` nodes.
local flow, states, node, count = KEYS[1], KEYS[2], ARGV[1], tonumber(ARGV[3])
local state, stop, known = unpack(redis.call('HMGET', flow, 'state', 'stop', 'x' .. node .. '.' .. ARGV[2]))
if state ~= 'running' or stop then return {-1} end
if redis.call('GETRANGE', states, node, node) ~= 'a' then return {-2} end
if known then
  local first, size, begun = string.match(known, '^(%d+) (%d+) (%d)$')
  if begun == '1' or tonumber(size) == count then return {tonumber(first), tonumber(size), tonumber(begun)} end
end
local first = redis.call('STRLEN', states)
if first + count > tonumber(ARGV[4]) then return {-3} end
redis.call('SETRANGE', states, first, string.rep('-', count))
redis.call('HSET', flow, 'x' .. node .. '.' .. ARGV[2], first .. ' ' .. count .. ' 0', 'nodes', first + count)
return {first, count, 0}
