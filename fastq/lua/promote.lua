#!lua flags=allow-oom
-- promote: move due jobs to their ready lists, in the order in which they are due
-- KEYS {q}:due {q}:jobs {q}:wake {q}:ready:10 ... {q}:ready:0
-- ARGV limit
-- Sent twice: a job leaves the due set once. Reply {moved, now_ms, due time of the next one or -1}.
--- @include "now"
--- @include "wake"
--- @include "ready"
local due, jobs, now = KEYS[1], KEYS[2], now_ms()
local ids = redis.call('ZRANGE', due, '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[1])
if #ids > 0 then
  local envelopes, lists = redis.call('HMGET', jobs, unpack(ids)), {}
  for i, id in ipairs(ids) do
    if envelopes[i] then
      local list = ready_list(envelopes[i], KEYS, 4)
      lists[list] = lists[list] or {}
      table.insert(lists[list], id)
    end
  end
  for list, members in pairs(lists) do redis.call('RPUSH', list, unpack(members)) end
  redis.call('ZREMRANGEBYRANK', due, 0, #ids - 1) -- they are the first ones: a quarter cheaper than ZREM by name
  wake(KEYS[3])
end
local head = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')
return {#ids, now, tonumber(head[2] or -1)}
