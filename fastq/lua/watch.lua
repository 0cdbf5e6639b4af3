#!lua flags=allow-oom
-- watch: let the events of jobs be written down, for a while
-- KEYS {q}:jobs {q}:awaited {q}:events
-- ARGV ttl_ms id ...     (an id, or '*' for all jobs of the queue)
-- What ends or moves a watched job adds `<kind> <id>` to the stream; a job that has ended is not watched.
-- Sent twice: the same, a little longer. Reply {id of the last event, 1 or 0 for each id: it is watched}.
--- @include "now"
local jobs, awaited, events = KEYS[1], KEYS[2], KEYS[3]
local last = redis.call('EXISTS', events) == 1 and redis.call('XREVRANGE', events, '+', '-', 'COUNT', 1)[1]
local reply = {last and last[1] or '0-0'}
for i = 2, #ARGV do
  local id, watched = ARGV[i], 1
  if id == '*' then
    redis.call('HSET', awaited, '*', string.format('%d', now_ms() + ARGV[1]))
  elseif redis.call('HEXISTS', jobs, id) == 0 then
    watched = 0
  else
    local names = redis.call('HGET', awaited, id) or ''
    if not string.find(names, '!', 1, true) then redis.call('HSET', awaited, id, names .. ' !') end
  end
  reply[i] = watched
end
if redis.call('EXISTS', awaited) == 1 then redis.call('PEXPIRE', awaited, ARGV[1]) end
return reply
