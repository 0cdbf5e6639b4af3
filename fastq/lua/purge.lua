#!lua flags=allow-oom
-- purge: drop pending, scheduled and parked jobs of a queue; running ones are left alone
-- KEYS {q}:jobs {q}:due {q}:ghosts {q}:deliveries {q}:unique {q}:unique:of {q}:parked {q}:parked:of {q}:awaited {q}:events
--      {q}:groups {q}:ready:10 ... {q}:ready:0
-- ARGV limit     (2,000 at most: Lua cannot unpack 8,000)
-- Sent twice: a job is gone once. Reply {purged, more}; more 0: nothing was found, not even a ghost.
--- @include "now"
--- @include "number"
--- @include "add"
--- @include "is_ghost"
--- @include "release_unique"
--- @include "first_parked"
--- @include "tell"
--- @include "wake"
--- @include "many"
--- @include "flows"
--- @include "begin"
--- @include "unfold"
--- @include "enqueue_callback"
--- @include "batches"
--- @include "batches_go_on"
--- @include "flows_go_on"
local jobs, due, ghosts, limit = KEYS[1], KEYS[2], KEYS[3], math.min(tonumber(ARGV[1]), 2000)
local ids, found, haunted = {}, 0, redis.call('HLEN', ghosts) > 0
for level = 12, #KEYS do
  local popped = #ids < limit and redis.call('LPOP', KEYS[level], limit - #ids) or {}
  found = found + #popped
  for _, id in ipairs(popped) do
    if not (haunted and is_ghost(ghosts, id)) then ids[#ids + 1] = id end
  end
end
local scheduled = #ids < limit and redis.call('ZRANGE', due, 0, limit - #ids - 1) or {}
if #scheduled > 0 then redis.call('ZREM', due, unpack(scheduled)) end
for _, id in ipairs(scheduled) do ids[#ids + 1] = id end
for _, name in ipairs(#ids < limit and redis.call('ZRANGE', KEYS[7], 0, limit - #ids - 1) or {}) do
  if #ids >= limit then break end
  local look = redis.call('ZSCORE', KEYS[7], name) -- when somebody looks after those that are left: as before
  for _, id in ipairs(first_parked(KEYS[7], KEYS[8], KEYS[7] .. ':by:' .. name, name, limit - #ids, look)) do
    ids[#ids + 1] = id
  end
end
if #ids == 0 then return {0, found > 0 and 1 or 0} end
redis.call('HDEL', jobs, unpack(ids))
redis.call('HDEL', KEYS[4], unpack(ids))
release_unique(KEYS[5], KEYS[6], ids)
if redis.call('HLEN', KEYS[9]) > 0 then tell(KEYS[9], KEYS[10], now_ms(), 'cancelled', ids) end
if redis.call('EXISTS', KEYS[11]) == 1 then flows_go_on(KEYS[11], now_ms(), ids, {}, {}, 1) end
return {#ids, 1}
