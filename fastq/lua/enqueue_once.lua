#!lua
-- enqueue_once: accept jobs of one queue and one priority, some of which have a unique key, or whose queue is bounded
-- KEYS {q}:jobs {q}:ready:<priority> {q}:due {q}:due:wake {q}:wake {q}:producers {q}:dead {q}:done {q}:unique {q}:unique:of
--      {q}:unique:start {q}:workers {q}:said:<producer>:<sequence>
--      {q}:awaited {q}:events {q}:groups {q}:ghosts {q}:deliveries {q}:ready:10 ... {q}:ready:0 {q}:batch:<id>
-- ARGV producer sequence bound drop ttl_ms record, then per job: id envelope delay_ms key hold ttl_ms on_duplicate most_ms
--   The last 16 keys are there for a bounded queue only, or a batch (the last one); key '': the job is not unique
--   hold: what keeps the key: 'executed' the unfinished job, 'started' the job until a worker takes it, 'ttl' time alone,
--   'both' the unfinished job and time; on_duplicate: 'keep' | 'replace' arguments and due time of the job that is there,
--   unless a worker has it; bound: pending jobs that the queue may have, 0: any number; drop '1': the oldest job makes room, its
--   record is kept for ttl_ms; most_ms: replacements put a job off until at most so long after the first (0: for ever)
-- Sent twice: the producer's sequence number makes the second call a no-op; what the first refused is said again, from a
-- key that lives five minutes: the caller must not wait for an id that was never stored.
-- Reply {repeated, {index, why, detail} ...} with one entry for each job that was not created: 'unique' and 'replaced' with
-- the id of the job that is there, 'full' (there is no room), else as enqueue.lua.
--- @include "now"
--- @include "number"
--- @include "add"
--- @include "wake"
--- @include "found"
--- @include "enqueue_one"
--- @include "fill_batch"
--- @include "release_unique"
--- @include "keep_record"
--- @include "tell"
--- @include "is_ghost"
--- @include "room"
--- @include "said"
--- @include "many"
--- @include "flows"
--- @include "begin"
--- @include "unfold"
--- @include "enqueue_callback"
--- @include "batches"
--- @include "batches_go_on"
--- @include "flows_go_on"
local jobs, ready, due, due_wake, wake_list, producers, dead, done = unpack(KEYS, 1, 8)
local unique, unique_of, unique_start, workers, said = unpack(KEYS, 9, 13)
local bound, drops, ROWS, ROOM, batch = tonumber(ARGV[3]), ARGV[4] == '1', 7, 17, KEYS[30]
local last, reply, words = redis.call('HGET', producers, ARGV[1]), {0}, {}
local repeated = last and (tonumber(last) or 0) >= tonumber(ARGV[2])
if repeated and tonumber(last) < redis.call('TIME')[1] * 1e6 + 864e8 then -- a larger one is garbage, see enqueue.lua
  return say_again(redis.call('GET', said) or '', done, ROWS)
end
if batch and redis.call('HGET', batch, 'state') ~= 'filling' then return {0, {0, 'closed', ''}} end
redis.call('HSET', producers, ARGV[1], ARGV[2])
local now, pushed, earliest = now_ms(), false, false
local pending, dropped = bound > 0 and pending_from(ROOM), {}

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

-- whether a pending job may come in; the oldest one goes for it if it must
local function has_room()
  if bound < 1 or pending < bound then return true end
  local oldest = drops and take_oldest(ROOM, jobs, ready)
  if not oldest then return false end
  release_unique(unique, unique_of, {oldest})
  keep_record(done, now, tonumber(ARGV[5]), oldest, ARGV[6])
  pending, dropped[#dropped + 1] = pending - 1, oldest
  return true
end

for i = ROWS, #ARGV, 8 do
  local id, envelope, delay, key, on = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3], ARGV[i + 6]
  local holder = key ~= '' and (redis.call('HGET', unique, key) or redis.call('GET', unique .. ':ttl:' .. key))
  local why, detail
  if holder then
    why, detail = on == 'replace' and replaced(holder, envelope, delay) and 'replaced' or 'unique', holder
  else
    why, detail = refusal(jobs, dead, done, id)
    if not why and delay <= 0 and not has_room() then why, detail = 'full', '' end
  end
  if why then
    reply[#reply + 1] = {(i - ROWS) / 8, why, detail}
    note_refusal(words, (i - ROWS) / 8, why, holder)
  else
    if key ~= '' then hold(id, key, ARGV[i + 4], ARGV[i + 5], tonumber(ARGV[i + 7])) end
    enqueue_one(jobs, ready, due, id, envelope, delay > 0 and now + delay)
    if delay > 0 then
      earliest = math.min(earliest or now + delay, now + delay)
    else
      pushed, pending = true, pending and pending + 1
    end
  end
end
if batch then fill_batch(batch, (#ARGV - ROWS + 1) / 8 - #reply + 1, ARGV[#ARGV - 7]) end
if #words > 0 then redis.call('SET', said, said_text(words), 'PX', 300000) end
if #dropped > 0 then
  if redis.call('HLEN', KEYS[14]) > 0 then tell(KEYS[14], KEYS[15], now, 'cancelled', dropped) end
  if redis.call('EXISTS', KEYS[16]) == 1 then flows_go_on(KEYS[16], now, dropped, {}, {}, 1) end
end
if pushed then wake(wake_list) end
if earliest and tonumber(redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')[2]) >= earliest then wake(due_wake) end
return reply
