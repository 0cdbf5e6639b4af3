#!lua
-- flow_add: write down a part of a workflow that has not begun; without flow_start within an hour it goes by itself.
-- Or a part of what a running one is to have more (flow_grow has made room for it, flow_spawn lets it begin)
-- KEYS {q}:flow:<id> {q}:flow:<id>:states
-- ARGV offset letters, then field value ...     (letters: the states of the nodes from number `offset` on)
-- Sent twice: the same is written again, but nothing once it has begun. Reply 1, or 0 when it has.
local flow, states, offset = KEYS[1], KEYS[2], tonumber(ARGV[1])
if redis.call('HEXISTS', flow, 'state') == 0 then
  redis.call('SETRANGE', states, offset, ARGV[2])
  if #ARGV > 2 then redis.call('HSET', flow, unpack(ARGV, 3)) end
  redis.call('PEXPIRE', flow, 3600000)
  redis.call('PEXPIRE', states, 3600000)
  return 1
end
if redis.call('GETRANGE', states, offset, offset) ~= '-' then return 0 end
local before = {} -- of an earlier attempt that wanted something else
for node = offset, offset + #ARGV[2] - 1 do
  for _, letter in ipairs({'c', 'e', 'g', 'p'}) do before[#before + 1] = letter .. node end
end
redis.call('HDEL', flow, unpack(before))
redis.call('HSET', flow, unpack(ARGV, 3))
return 1
