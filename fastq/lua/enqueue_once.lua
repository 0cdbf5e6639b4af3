#!lua
-- enqueue_once: accept jobs of one queue and one priority, some of which have a unique key
-- KEYS {q}:jobs {q}:ready:<priority> {q}:due {q}:due:wake {q}:wake {q}:producers {q}:dead {q}:done {q}:unique {q}:unique:of
--      {q}:unique:start {q}:workers {q}:said:<producer>:<sequence>
-- ARGV producer sequence, then per job: id envelope delay_ms key hold ttl_ms on_duplicate most_ms      (key '': not unique)
--   hold: what keeps the key: 'executed' the unfinished job, 'started' the job until a worker takes it, 'ttl' time alone,
--   'both' the unfinished job and time; on_duplicate: 'keep' | 'replace' arguments and due time of the job that is there,
--   unless a worker has it; most_ms: replacements put a job off until at most so long after the first (0: for ever)
-- Sent twice: the producer's sequence number makes the second call a no-op; what the first refused is said again, from a
-- key that lives five minutes: the caller must not wait for an id that was never stored.
-- Reply {repeated, {index, why, detail} ...} with one entry for each job that was not created: 'unique' and 'replaced' with
-- the id of the job that is there, else as enqueue.lua.
--- @include "now"
--- @include "wake"
--- @include "found"
--- @include "enqueue_one"
local jobs, ready, due, due_wake, wake_list, producers, dead, done = unpack(KEYS, 1, 8)
local unique, unique_of, unique_start, workers, said = unpack(KEYS, 9)
local last, reply, words = redis.call('HGET', producers, ARGV[1]), {1}, {}
if last and tonumber(last) >= tonumber(ARGV[2]) then
  for word in string.gmatch(redis.call('GET', said) or '', '%S+') do words[#words + 1] = word end
  for i = 1, #words, 3 do
    local id, why, detail = ARGV[3 + 8 * words[i]], words[i + 1], words[i + 2]
    if detail == '-' then detail = why == 'finished' and find_record(done, id) or '' end
    reply[#reply + 1] = {tonumber(words[i]), why, detail}
  end
  return reply
end
redis.call('HSET', producers, ARGV[1], ARGV[2])
reply[1] = 0
local now, pushed, earliest = now_ms(), false, false

local function put_off(id, due_at)
  redis.call('ZADD', due, due_at, id)
  earliest = math.min(earliest or due_at, due_at)
end

local function is_running(id)
  for _, worker in ipairs(redis.call('ZRANGE', workers, 0, -1)) do
    if redis.call('SISMEMBER', string.gsub(workers, 'workers$', 'running:') .. worker, id) == 1 then return true end
  end
  return false
end

-- give the job that holds the key these arguments; a scheduled one is due anew
local function replaced(holder, envelope, delay)
  if redis.call('HEXISTS', jobs, holder) == 0 or is_running(holder) then return false end
  redis.call('HSET', jobs, holder, envelope)
  if redis.call('ZSCORE', due, holder) then
    local deadline = string.match(redis.call('HGET', unique_start, holder) or '', '|(%d+)$')
    put_off(holder, math.min(now + math.max(delay, 0), tonumber(deadline or math.huge)))
  end
  return true
end

local function hold(id, key, how, ttl, most)
  if how == 'ttl' or how == 'both' then redis.call('SET', unique .. ':ttl:' .. key, id, 'PX', ttl) end
  if how == 'ttl' then return end
  redis.call('HSET', unique, key, id)
  redis.call('HSET', unique_of, id, key)
  if how == 'started' then
    redis.call('HSET', unique_start, id, most > 0 and key .. '|' .. string.format('%d', now + most) or key)
  end
end

for i = 3, #ARGV, 8 do
  local id, envelope, delay, key, on = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3], ARGV[i + 6]
  local holder = key ~= '' and (redis.call('HGET', unique, key) or redis.call('GET', unique .. ':ttl:' .. key))
  local why, detail
  if holder then
    why, detail = on == 'replace' and replaced(holder, envelope, delay) and 'replaced' or 'unique', holder
  else
    why, detail = refusal(jobs, dead, done, id)
  end
  if why then
    reply[#reply + 1] = {(i - 3) / 8, why, detail}
    words[#words + 1] = string.format('%d %s %s', (i - 3) / 8, why, holder or '-')
  else
    if key ~= '' then hold(id, key, ARGV[i + 4], ARGV[i + 5], tonumber(ARGV[i + 7])) end
    enqueue_one(jobs, ready, due, id, envelope, delay > 0 and now + delay)
    if delay > 0 then earliest = math.min(earliest or now + delay, now + delay) else pushed = true end
  end
end
if #words > 0 then redis.call('SET', said, table.concat(words, ' '), 'PX', 300000) end
if pushed then wake(wake_list) end
if earliest and tonumber(redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')[2]) >= earliest then wake(due_wake) end
return reply
