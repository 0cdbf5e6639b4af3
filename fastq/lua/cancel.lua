#!lua flags=allow-oom
-- cancel: take a scheduled, parked, pending or waiting job out; ask the worker that has it to stop it
-- KEYS {q}:jobs {q}:due {q}:ghosts {q}:workers {q}:unique {q}:unique:of {q}:deliveries {q}:done {q}:cancels
--      {q}:parked {q}:parked:of {q}:awaited {q}:events {q}:groups {q}:running:<worker> ...
-- ARGV id mode ttl_ms record     (mode 'c': tell the handler, 't': interrupt it; ttl_ms 0: leave no trace)
-- Sent twice: 'unknown' the second time, or the same request. The id stays in its ready list as a ghost that reserve.lua
-- skips once. A request goes with its job: settle.lua and recover.lua end the job instead of letting it run again.
-- Reply 'cancelled' | 'requested' | 'unknown' | 'again' (the set of workers changed under way)
--- @include "now"
--- @include "number"
--- @include "add"
--- @include "release_unique"
--- @include "keep_record"
--- @include "unpark_one"
--- @include "tell"
--- @include "wake"
--- @include "wake_holder"
--- @include "many"
--- @include "flows"
--- @include "begin"
--- @include "unfold"
--- @include "enqueue_callback"
--- @include "batches"
--- @include "batches_go_on"
--- @include "flows_go_on"
local jobs, due, ghosts, workers, id = KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1]
local cancels, mode = KEYS[9], ARGV[2]

-- a job that waits for others of its workflow: from here on it counts as one under way, and ends as such a one does
local function waited()
  local flow, node = string.match(id, '^(%x+)%.(%d+)$')
  if not flow or #node > 7 or not redis.call('ZSCORE', KEYS[14], flow) then return false end
  flow = base_of(KEYS[14]) .. 'flow:' .. flow
  if redis.call('GETRANGE', flow .. ':states', node, node) ~= 'w' then return false end
  redis.call('HDEL', flow, 'e' .. node)
  redis.call('SETRANGE', flow .. ':states', node, 'a')
  add(flow, 'open', 1)
  return true
end

if redis.call('HEXISTS', jobs, id) == 0 then
  if not waited() then return 'unknown' end
elseif redis.call('ZREM', due, id) == 0 and not unpark_one(KEYS[10], KEYS[11], id) then
  if redis.call('ZCARD', workers) ~= #KEYS - 14 then return 'again' end
  for i = 15, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 0 then return 'again' end
    if redis.call('SISMEMBER', KEYS[i], id) == 1 then
      local before = redis.call('HGET', cancels, id)
      if before and string.sub(before, 1, 1) == 't' then mode = 't' end
      redis.call('HSET', cancels, id, mode .. ARGV[3] .. ':' .. ARGV[4])
      local base = string.sub(jobs, 1, -5)
      wake_holder(base .. 'wake:' .. string.sub(KEYS[i], #base + 9)) -- its worker looks now, if it rests
      return 'requested'
    end
  end
  add(ghosts, id, 1)
end
redis.call('HDEL', jobs, id)
redis.call('HDEL', KEYS[7], id)
release_unique(KEYS[5], KEYS[6], {id})
keep_record(KEYS[8], now_ms(), tonumber(ARGV[3]), id, ARGV[4])
if redis.call('HLEN', KEYS[12]) > 0 then tell(KEYS[12], KEYS[13], now_ms(), 'cancelled', {id}) end
if redis.call('EXISTS', KEYS[14]) == 1 then flows_go_on(KEYS[14], now_ms(), {id}, {[id] = 'cancelled'}, {}, 1) end
return 'cancelled'
