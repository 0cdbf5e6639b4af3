#!lua flags=allow-oom
-- park: put jobs that wait for a limit aside, under that limit; nothing is charged
-- KEYS {q}:running:<worker> {q}:parked {q}:parked:of {q}:parked:by:<limit> ...
-- ARGV per limit: its name, ms until somebody else should look; then per job: id number_of_its_limit score
-- The score orders the jobs of a limit: highest priority first, then the oldest.
-- Sent twice, or by a worker whose lease was lost: what the running set no longer holds is left alone (the fence).
-- Reply {held, stale ids}; held -1: the lease is gone.
--- @include "now"
--- @include "many"
local running, parked, parked_of = KEYS[1], KEYS[2], KEYS[3]
local limits, now, ids = #KEYS - 3, now_ms(), {}
local first = 2 * limits + 1
for i = first, #ARGV, 3 do ids[#ids + 1] = ARGV[i] end
local owned, mine, stale, of, by = held_of(running, ids), {}, {}, {}, {}
for i, id in ipairs(ids) do
  local row = first + 3 * (i - 1)
  local number = tonumber(ARGV[row + 1])
  if owned[i] == 1 then
    by[number] = by[number] or {}
    table.insert(by[number], ARGV[row + 2])
    table.insert(by[number], id)
    of[#of + 1], of[#of + 2] = id, ARGV[2 * number - 1]
    mine[#mine + 1] = id
  else
    stale[#stale + 1] = id
  end
end
for number, members in pairs(by) do
  many('ZADD', KEYS[3 + number], members)
  redis.call('ZADD', parked, 'GT', now + ARGV[2 * number], ARGV[2 * number - 1])
end
if #mine > 0 then
  many('HSET', parked_of, of)
  many('SREM', running, mine)
end
return {redis.call('SCARD', running) - 1, stale}
