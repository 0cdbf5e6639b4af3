#!lua flags=allow-oom
-- unpause: a task, or some calls of it, may run again: the first jobs that were put aside for it go to their ready lists
-- KEYS {q}:paused:tasks {q}:parked {q}:parked:of {q}:jobs {q}:wake {q}:ready:10 ... {q}:ready:0 {q}:parked:by:<limit>
-- ARGV limit want     (the name of the pause; most jobs of one call, 1,000 at most)
-- Sent twice: the next ones go. If nobody calls again, unpark_due.lua does the rest. Reply {was it paused, moved, left}.
--- @include "now"
--- @include "wake"
--- @include "ready"
--- @include "first_parked"
local pauses, parked, parked_of, jobs, wake_list, by = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[17]
local was = redis.call('HDEL', pauses, ARGV[1])
local ids = first_parked(parked, parked_of, by, ARGV[1], math.min(tonumber(ARGV[2]), 1000), now_ms())
for i = #ids, 1, -1 do -- each to the head of its list: the first one stays the first
  local envelope = redis.call('HGET', jobs, ids[i])
  if envelope then redis.call('LPUSH', ready_list(envelope, KEYS, 6), ids[i]) end
end
if #ids > 0 then wake(wake_list) end
return {was, #ids, redis.call('ZCARD', by)}
