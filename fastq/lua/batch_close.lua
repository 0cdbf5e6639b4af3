#!lua flags=allow-oom
-- batch_close: no more jobs are coming; a batch whose jobs have all ended ends here
-- KEYS {q}:groups {q}:batch:<id>
-- ARGV id how     ('whole': it has all of its jobs; 'torn': its producer gave up; 'stop': it is cancelled, its jobs one by one
--                 by who asked (cancel.lua))
-- Sent twice: the same. Reply the state that it has now; nothing when it is unknown.
--- @include "now"
--- @include "number"
--- @include "wake"
--- @include "tell"
--- @include "enqueue_callback"
--- @include "batches"
local groups, batch, id, how = KEYS[1], KEYS[2], ARGV[1], ARGV[2]
local state = redis.call('HGET', batch, 'state')
if state ~= 'filling' and state ~= 'running' then return state end
if how == 'stop' then redis.call('HSET', batch, 'stop', 1) end
if state == 'filling' then
  redis.call('HSET', batch, 'state', 'running')
  if how ~= 'whole' then redis.call('HSET', batch, 'torn', 1) end
end
return end_batch(groups, now_ms(), batch, id)
