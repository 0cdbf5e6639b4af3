#!lua
-- enqueue: accept jobs of one queue and one priority; pending at once, or scheduled
-- KEYS {q}:jobs {q}:ready:<priority> {q}:due {q}:due:wake {q}:wake {q}:producers {q}:unique {q}:unique:of {q}:dead {q}:done
-- ARGV producer sequence kind, then per job: id envelope                      (kind 'plain': ready, our own ids)
--                                         id envelope delay_ms unique_key     (kind 'full': the caller may have chosen the id)
-- Sent twice: the producer's sequence number makes the second call a no-op, even if the jobs have run meanwhile. It still
-- names the holder of a unique key that is another job: the caller must not wait for an id that was never stored.
-- Reply {repeated, {index, why, detail} ...} with one entry for each job that was not created.
--- @include "now"
--- @include "wake"
--- @include "found"
local jobs, ready, due, due_wake, wake_list = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local producers, unique, unique_of, dead, done = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local last = redis.call('HGET', producers, ARGV[1])
if last and tonumber(last) >= tonumber(ARGV[2]) then
  local reply = {1}
  for i = 4, ARGV[3] == 'full' and #ARGV or 0, 4 do
    local holder = ARGV[i + 3] ~= '' and redis.call('HGET', unique, ARGV[i + 3])
    if holder and holder ~= ARGV[i] then reply[#reply + 1] = {(i - 4) / 4, 'unique', holder} end
  end
  return reply
end
redis.call('HSET', producers, ARGV[1], ARGV[2])

if ARGV[3] == 'plain' then
  local ids = {}
  for i = 4, #ARGV, 2 do ids[#ids + 1] = ARGV[i] end
  redis.call('HSET', jobs, unpack(ARGV, 4))
  redis.call('RPUSH', ready, unpack(ids))
  wake(wake_list)
  return {0}
end

local reply, pushed, earliest, now = {0}, false, false, now_ms()
for i = 4, #ARGV, 4 do
  local id, envelope, delay, key = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3]
  local holder = key ~= '' and redis.call('HGET', unique, key)
  local why, detail = false, ''
  if holder then
    why, detail = 'unique', holder
  elseif redis.call('HEXISTS', jobs, id) == 1 then
    why = 'exists'
  elseif redis.call('ZSCORE', dead, id) then
    why = 'dead'
  else
    local record = find_record(done, id)
    if record then why, detail = 'finished', record end
  end
  if why then
    reply[#reply + 1] = {(i - 4) / 4, why, detail}
  else
    redis.call('HSET', jobs, id, envelope)
    if key ~= '' then
      redis.call('HSET', unique, key, id)
      redis.call('HSET', unique_of, id, key)
    end
    if delay > 0 then
      redis.call('ZADD', due, now + delay, id)
      earliest = math.min(earliest or now + delay, now + delay)
    else
      redis.call('RPUSH', ready, id)
      pushed = true
    end
  end
end
if pushed then wake(wake_list) end
if earliest and tonumber(redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')[2]) >= earliest then wake(due_wake) end
return reply
