#!lua
-- replay: send jobs of the dead-letter queue back, with the envelopes given (a fresh budget of attempts)
-- KEYS {q}:dead {q}:dead:jobs {q}:dead:errors {q}:jobs {q}:wake {q}:ready:10 ... {q}:ready:0
-- ARGV id envelope ...
-- Sent twice: a job leaves the dead letters once. Reply the number of jobs sent back.
--- @include "wake"
--- @include "ready"
local dead, dead_jobs, dead_errors, jobs, moved = KEYS[1], KEYS[2], KEYS[3], KEYS[4], 0
for i = 1, #ARGV, 2 do
  local id, envelope = ARGV[i], ARGV[i + 1]
  if redis.call('ZREM', dead, id) == 1 then
    redis.call('HDEL', dead_jobs, id)
    redis.call('HDEL', dead_errors, id)
    redis.call('HSET', jobs, id, envelope)
    redis.call('RPUSH', ready_list(envelope, KEYS, 6), id)
    moved = moved + 1
  end
end
if moved > 0 then wake(KEYS[5]) end
return moved
