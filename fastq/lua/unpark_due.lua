#!lua flags=allow-oom
-- unpark_due: send one job of each limit that no worker looks after back to its ready list; who gets it fetches the others
-- KEYS {q}:parked {q}:parked:of {q}:jobs {q}:wake {q}:ready:10 ... {q}:ready:0
-- ARGV limits look_ms     (most limits of one call; ms until the next job of a limit, if no worker looks meanwhile)
-- Sent twice: the limits of the first call are not due again. Reply {moved, now_ms, when the next is due or -1}.
--- @include "now"
--- @include "wake"
--- @include "ready"
--- @include "first_parked"
local parked, parked_of, jobs, wake_list, now, moved = KEYS[1], KEYS[2], KEYS[3], KEYS[4], now_ms(), 0
for _, limit in ipairs(redis.call('ZRANGE', parked, '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[1])) do
  for _, id in ipairs(first_parked(parked, parked_of, parked .. ':by:' .. limit, limit, 1, now + ARGV[2])) do
    local envelope = redis.call('HGET', jobs, id)
    if envelope then
      redis.call('LPUSH', ready_list(envelope, KEYS, 5), id)
      moved = moved + 1
    end
  end
end
if moved > 0 then wake(wake_list) end
local head = redis.call('ZRANGE', parked, 0, 0, 'WITHSCORES')
return {moved, now, tonumber(head[2] or -1)}
