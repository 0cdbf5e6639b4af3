#!lua flags=allow-oom
-- settle: write a batch of outcomes of jobs that this worker holds
-- KEYS {q}:running:<worker> {q}:jobs {q}:due {q}:due:wake {q}:wake {q}:dead {q}:dead:jobs {q}:dead:errors {q}:deliveries
--      {q}:unique {q}:unique:of {q}:done {q}:cancels {q}:awaited {q}:events {q}:groups {q}:ready:10 ... {q}:ready:0 {q}:done:<ttl>:<n> ...
-- ARGV dead_max, then five sections (job.Outcome), each a count and its rows:
--   succeeded: id | recorded: bucket expires_ms n, then n times: id record | later: id delay_ms envelope | failed: id envelope error
--   | released: id
--   and last, of jobs of workflows that have succeeded: id result; of jobs that were cancelled without a record: id ''
-- Sent twice, or by a worker whose lease was lost: what the running set no longer holds is left alone (the fence).
-- Reply {held, stale ids}, or held alone; -1: the lease is gone.
local stale, finished, heard, cancelling = {}, {}, false, false
do -- succeeded: the hot path; what the rest needs is not even defined yet, which would be half of a short call
  local count = tonumber(ARGV[2])
  -- no other outcomes; no deliveries, unique:of, cancels, awaited, groups: nobody else is to hear of these
  local plain = #ARGV == count + 6 and redis.call('EXISTS', KEYS[9], KEYS[11], KEYS[13], KEYS[14], KEYS[16]) == 0
  if plain and count == 1 then -- each command that a cold server meets for the first time costs it 8 µs, a table 20
    if redis.call('SREM', KEYS[1], ARGV[3]) == 0 then return {redis.call('SCARD', KEYS[1]) - 1, {ARGV[3]}} end
    redis.call('HDEL', KEYS[2], ARGV[3])
    return redis.call('SCARD', KEYS[1]) - 1
  end
  if not plain then heard, cancelling = redis.call('HLEN', KEYS[14]) > 0, redis.call('HLEN', KEYS[13]) > 0 end
  for from = 3, count + 2, 5000 do -- Lua unpacks fewer than 8,000
    local first = #finished + 1
    for i, owned in ipairs(redis.call('SMISMEMBER', KEYS[1], unpack(ARGV, from, math.min(from + 4999, count + 2)))) do
      local into = owned == 1 and finished or stale
      into[#into + 1] = ARGV[from + i - 1]
    end
    if #finished >= first then
      redis.call('SREM', KEYS[1], unpack(finished, first))
      redis.call('HDEL', KEYS[2], unpack(finished, first))
    end
  end
  if plain then return {redis.call('SCARD', KEYS[1]) - 1, stale} end
end
--- @include "now"
--- @include "number"
--- @include "add"
--- @include "wake"
--- @include "ready"
--- @include "slice"
--- @include "many"
--- @include "held"
--- @include "keep_records"
--- @include "release_unique"
--- @include "bury"
--- @include "tell"
--- @include "keep_record"
--- @include "end_cancelled"
--- @include "flows"
--- @include "begin"
--- @include "unfold"
--- @include "enqueue_callback"
--- @include "batches"
--- @include "batches_go_on"
--- @include "flows_go_on"
local running, jobs, due, due_wake, wake_list, dead, dead_jobs, dead_errors, deliveries = unpack(KEYS, 1, 9)
local unique, unique_of, done, cancels, awaited, events, groups = unpack(KEYS, 10, 16)
local LEVELS, BUCKETS = 17, 27
local position, kinds = tonumber(ARGV[2]) + 4, {} -- kinds: job id -> its event, when that is not `succeeded`
local now, asked = now_ms(), cancelling -- asked: there are requests to cancel
local grouped = redis.call('EXISTS', groups) == 1 -- workflows are under way

-- whether this job, which would run again, was cancelled while it ran; then it has ended here
local function stopped(id)
  if not (asked and end_cancelled(cancels, jobs, deliveries, done, now, id)) then return false end
  finished[#finished + 1], kinds[id] = id, 'cancelled'
  return true
end

-- the rows of the next section whose jobs this worker still holds, the id at `field` of each row
local function section(width, field)
  local count, rows, ids = tonumber(ARGV[position]), {}, {}
  for i = 1, count do
    rows[i] = slice(ARGV, position + 1 + (i - 1) * width, width)
    ids[i] = rows[i][field]
  end
  position = position + 1 + count * width
  if count == 0 then return rows end
  local owned, kept, mine = held_of(running, ids), {}, {}
  for i = 1, count do
    if owned[i] == 1 then kept[#kept + 1], mine[#mine + 1] = rows[i], ids[i] else stale[#stale + 1] = ids[i] end
  end
  many('SREM', running, mine)
  return kept, mine
end

for n = 1, tonumber(ARGV[position - 1]) do -- recorded
  local name, expires, first = ARGV[position], ARGV[position + 1], position + 3
  position = first + 2 * ARGV[position + 2]
  local mine, lost = keep_records(running, jobs, done, KEYS[BUCKETS + n], name, expires, ARGV, first, position - 1)
  for i = 1, #mine do finished[#finished + 1] = mine[i] end
  for i = 1, #lost do stale[#stale + 1] = lost[i] end
  if heard or grouped then
    for i = first, position - 1, 2 do
      if string.sub(ARGV[i + 1], 3, 11) == 'cancelled' then kinds[ARGV[i]] = 'cancelled' end -- or it had expired
    end
  end
end

local later, again, earliest = section(3, 1), {}, false
for _, row in ipairs(later) do
  if not stopped(row[1]) then
    again[#again + 1] = row[1]
    redis.call('HSET', jobs, row[1], row[3])
    if tonumber(row[2]) > 0 then
      redis.call('ZADD', due, now + row[2], row[1])
      earliest = math.min(earliest or now + row[2], now + row[2])
    else
      redis.call('RPUSH', ready_list(row[3], KEYS, LEVELS), row[1])
      wake(wake_list)
    end
  end
end
if earliest and tonumber(redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')[2]) >= earliest then wake(due_wake) end

for _, row in ipairs((section(3, 1))) do
  redis.call('HDEL', jobs, row[1])
  bury(dead, dead_jobs, dead_errors, now, row[1], row[2], row[3], tonumber(ARGV[1]))
  finished[#finished + 1], kinds[row[1]] = row[1], 'failed'
end

local released = section(1, 1)
for i = #released, 1, -1 do
  local id = released[i][1]
  local envelope = redis.call('HGET', jobs, id)
  if envelope and not stopped(id) then -- no envelope: a foreign id, it ends here
    redis.call('LPUSH', ready_list(envelope, KEYS, LEVELS), id)
  end
end
if #released > 0 then wake(wake_list) end

if #finished > 0 then
  if grouped then flows_go_on(groups, now, finished, kinds, ARGV, position) end
  release_unique(unique, unique_of, finished)
  if redis.call('HLEN', deliveries) > 0 then many('HDEL', deliveries, finished) end
  if asked then many('HDEL', cancels, finished) end
  if heard then tell(awaited, events, now, 'succeeded', finished, kinds) end
end
if heard and #again > 0 then tell(awaited, events, now, 'retried', again) end
return {redis.call('SCARD', running) - 1, stale}
