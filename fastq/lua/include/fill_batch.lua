-- `created` more jobs belong to a batch; `last`: the latest id that was offered
local function fill_batch(batch, created, last)
  local before, after = redis.call('HGET', batch, 'next'), tonumber(string.sub(last, 26)) + 1
  if created > 0 then add(batch, 'total', created) end
  if after > number(before) then redis.call('HSET', batch, 'next', after, 'filled', now_ms()) end
end
