#!lua
-- enqueue: accept jobs of one queue and one priority; pending at once, or scheduled
-- KEYS {q}:jobs {q}:ready:<priority> {q}:due {q}:due:wake {q}:wake {q}:producers {q}:dead {q}:done {q}:batch:<id>
-- ARGV producer sequence kind, then per job: id envelope                (kind 'plain': as enqueue_plain.lua, of a batch)
--                                         id envelope delay_ms          (kind 'full': the caller may have chosen the id)
--   the last key is there for jobs of a batch only
-- Sent twice: the producer's sequence number (µs) makes the second call a no-op, even if the jobs have run meanwhile. One that lies
-- more than a day ahead of Redis's clock is garbage: taken for a number, it would have all that its producer sends pass for stored.
-- Reply {repeated, {index, why, detail} ...} with one entry for each job that was not created; 'closed', and none was, when their
-- batch takes no more.
--- @include "now"
--- @include "number"
--- @include "add"
--- @include "wake"
--- @include "found"
--- @include "enqueue_one"
--- @include "fill_batch"
local jobs, ready, due, due_wake, wake_list, producers, dead, done, batch = unpack(KEYS)
local last = redis.call('HGET', producers, ARGV[1])
if last and (tonumber(last) or 0) >= tonumber(ARGV[2]) and tonumber(last) < redis.call('TIME')[1] * 1e6 + 864e8 then return {1} end
if batch and redis.call('HGET', batch, 'state') ~= 'filling' then return {0, {0, 'closed', ''}} end
redis.call('HSET', producers, ARGV[1], ARGV[2])

if ARGV[3] == 'plain' then
  local ids = {}
  for i = 4, #ARGV, 2 do ids[#ids + 1] = ARGV[i] end
  redis.call('HSET', jobs, unpack(ARGV, 4))
  redis.call('RPUSH', ready, unpack(ids))
  wake(wake_list)
  fill_batch(batch, #ids, ids[#ids])
  return {0}
end

local reply, pushed, earliest, now = {0}, false, false, now_ms()
for i = 4, #ARGV, 3 do
  local id, delay = ARGV[i], tonumber(ARGV[i + 2])
  local why, detail = refusal(jobs, dead, done, id)
  if why then
    reply[#reply + 1] = {(i - 4) / 3, why, detail}
  else
    local due_at = delay > 0 and now + delay
    enqueue_one(jobs, ready, due, id, ARGV[i + 1], due_at)
    if due_at then earliest = math.min(earliest or due_at, due_at) else pushed = true end
  end
end
if batch then fill_batch(batch, (#ARGV - 3) / 3 - #reply + 1, ARGV[#ARGV - 2]) end
if pushed then wake(wake_list) end
if earliest and tonumber(redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')[2]) >= earliest then wake(due_wake) end
return reply
