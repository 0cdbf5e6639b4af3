-- take the first jobs of a limit out of the parking; somebody else looks at what is left at `look` (ms)
local function first_parked(parked, parked_of, by, limit, want, look)
  local popped, ids = redis.call('ZPOPMIN', by, want), {}
  for i = 1, #popped, 2 do ids[#ids + 1] = popped[i] end
  if #ids > 0 then redis.call('HDEL', parked_of, unpack(ids)) end
  if redis.call('EXISTS', by) == 1 then
    redis.call('ZADD', parked, look, limit)
  else
    redis.call('ZREM', parked, limit)
  end
  return ids
end
