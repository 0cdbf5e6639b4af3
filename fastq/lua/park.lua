#!lua flags=allow-oom
-- park: put jobs that wait for a limit aside, under that limit; nothing is charged. One that was cancelled meanwhile ends here
-- KEYS {q}:running:<worker> {q}:parked {q}:parked:of {q}:cancels {q}:jobs {q}:deliveries {q}:done {q}:unique {q}:unique:of
--      {q}:awaited {q}:events {q}:groups {q}:paused:tasks {q}:parked:by:<limit> ...
-- ARGV per limit: its name, ms until somebody else should look; then per job: id number_of_its_limit score
-- The score orders the jobs of a limit: highest priority first, then the oldest.
-- Sent twice, or by a worker whose lease was lost: what the running set no longer holds is left alone (the fence).
-- Reply {held, stale ids}; held -1: the lease is gone.
--- @include "now"
--- @include "number"
--- @include "add"
--- @include "many"
--- @include "look_at"
--- @include "held"
--- @include "release_unique"
--- @include "keep_record"
--- @include "end_cancelled"
--- @include "tell"
--- @include "wake"
--- @include "flows"
--- @include "begin"
--- @include "unfold"
--- @include "enqueue_callback"
--- @include "batches"
--- @include "batches_go_on"
--- @include "flows_go_on"
local running, parked, parked_of = KEYS[1], KEYS[2], KEYS[3]
local cancels, jobs, deliveries, done = KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local limits, now, ids, asked, ended = #KEYS - 13, now_ms(), {}, redis.call('HLEN', cancels) > 0, {}
local first = 2 * limits + 1
for i = first, #ARGV, 3 do ids[#ids + 1] = ARGV[i] end
local owned, mine, stale, of, by = held_of(running, ids), {}, {}, {}, {}
for i, id in ipairs(ids) do
  local row = first + 3 * (i - 1)
  local place = tonumber(ARGV[row + 1])
  if owned[i] == 1 and asked and end_cancelled(cancels, jobs, deliveries, done, now, id) then
    ended[#ended + 1] = id
  elseif owned[i] == 1 then
    by[place] = by[place] or {}
    table.insert(by[place], ARGV[row + 2])
    table.insert(by[place], id)
    of[#of + 1], of[#of + 2] = id, ARGV[2 * place - 1]
    mine[#mine + 1] = id
  else
    stale[#stale + 1] = id
  end
end
for place, members in pairs(by) do
  many('ZADD', KEYS[13 + place], members)
  look_at(parked, KEYS[13], ARGV[2 * place - 1], now, now + ARGV[2 * place])
end
if #mine > 0 then
  many('HSET', parked_of, of)
  many('SREM', running, mine)
end
if #ended > 0 then
  many('SREM', running, ended)
  release_unique(KEYS[8], KEYS[9], ended)
  if redis.call('HLEN', KEYS[10]) > 0 then tell(KEYS[10], KEYS[11], now, 'cancelled', ended) end
  if redis.call('EXISTS', KEYS[12]) == 1 then flows_go_on(KEYS[12], now, ended, {}, {}, 1) end
end
return {redis.call('SCARD', running) - 1, stale}
