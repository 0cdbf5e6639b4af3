#!lua flags=allow-oom
-- unpark_due: send one job of each limit that no worker looks after back to its ready list; who gets it fetches the others
-- KEYS {q}:parked {q}:parked:of {q}:jobs {q}:wake {q}:paused:tasks {q}:ready:10 ... {q}:ready:0
-- A pause is no limit: when it is over its jobs come back 500 at a time, as nobody else fetches them.
-- ARGV limits look_ms     (most limits of one call; ms until the next job of a limit, if no worker looks meanwhile)
-- Sent twice: the limits of the first call are not due again. Reply {moved, now_ms, when the next is due or -1}.
--- @include "now"
--- @include "wake"
--- @include "ready"
--- @include "first_parked"
--- @include "look_at"
local parked, parked_of, jobs, wake_list, now, moved = KEYS[1], KEYS[2], KEYS[3], KEYS[4], now_ms(), 0
for _, limit in ipairs(redis.call('ZRANGE', parked, '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[1])) do
  local pause = string.sub(limit, 1, 1) == '~'
  local held = pause and redis.call('HEXISTS', KEYS[5], limit) == 1
  if held then look_at(parked, KEYS[5], limit, now, now) end
  local by, look = parked .. ':by:' .. limit, pause and now or now + ARGV[2]
  local ids = held and {} or first_parked(parked, parked_of, by, limit, pause and 500 or 1, look)
  for i = #ids, 1, -1 do
    local id = ids[i]
    local envelope = redis.call('HGET', jobs, id)
    if envelope then
      redis.call('LPUSH', ready_list(envelope, KEYS, 6), id)
      moved = moved + 1
    end
  end
end
if moved > 0 then wake(wake_list) end
local head = redis.call('ZRANGE', parked, 0, 0, 'WITHSCORES')
return {moved, now, tonumber(head[2] or -1)}
