#!lua
-- batch_call: a job that is enqueued once at the end of a batch; at once when that has come
-- KEYS {q}:groups {q}:batch:<id>
-- ARGV id which envelope     (which: 'complete' | 'success' | 'failure')
-- Sent twice: the same envelope is written down, and enqueued, once.
-- Reply 1 it will be called, 2 it was enqueued, 0 there is another one, -1 the batch is unknown, -2 it ended the other way.
--- @include "wake"
--- @include "enqueue_callback"
local batch, id, which, envelope = KEYS[2], ARGV[1], ARGV[2], ARGV[3]
local state = redis.call('HGET', batch, 'state')
if not state then return -1 end
local known = redis.call('HGET', batch, 'on:' .. which)
if known and known ~= envelope then return 0 end
local open = state == 'filling' or state == 'running'
local due = which == 'complete' or state == (which == 'failure' and 'failed' or 'success')
if not open and not due then return -2 end
if not known then
  redis.call('HSET', batch, 'on:' .. which, envelope)
  if not open then enqueue_callback(string.sub(KEYS[1], 1, -7), id, which, envelope) end
end
return open and 1 or 2
