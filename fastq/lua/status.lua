#!lua flags=no-writes
-- status: where one job is
-- KEYS {q}:jobs {q}:due {q}:dead {q}:dead:jobs {q}:dead:errors {q}:done {q}:parked:of {q}:groups {q}:running:<worker> ...
-- ARGV id worker ...     (the workers of the running sets, in order)
-- Read only. Reply {'unknown'} | {'finished', record} | {'failed', envelope, error, failed_at_ms}
--   | {'scheduled', envelope, due_at_ms} | {'parked', envelope, limit} | {'running', envelope, worker} | {'pending', envelope}
--   | {'waiting', envelope}: for other jobs of its workflow
--- @include "found"
local id = ARGV[1]
local envelope = redis.call('HGET', KEYS[1], id)
if not envelope then
  local failed_at = redis.call('ZSCORE', KEYS[3], id)
  if failed_at then
    return {'failed', redis.call('HGET', KEYS[4], id) or '', redis.call('HGET', KEYS[5], id) or '', failed_at}
  end
  local record = find_record(KEYS[6], id)
  if record then return {'finished', record} end
  local flow, node = string.match(id, '^(%x+)%.(%d+)$')
  if flow and redis.call('ZSCORE', KEYS[8], flow) then
    envelope = redis.call('HGET', string.sub(KEYS[8], 1, -7) .. 'flow:' .. flow, 'e' .. node)
    if envelope then return {'waiting', envelope} end
  end
  return {'unknown'}
end
local due_at = redis.call('ZSCORE', KEYS[2], id)
if due_at then return {'scheduled', envelope, due_at} end
local limit = redis.call('HGET', KEYS[7], id)
if limit then return {'parked', envelope, limit} end
for i = 9, #KEYS do
  if redis.call('SISMEMBER', KEYS[i], id) == 1 then return {'running', envelope, ARGV[i - 7]} end
end
return {'pending', envelope}
