-- take one job out of the parking, wherever it is in there; whether it was
local function unpark_one(parked, parked_of, id)
  local limit = redis.call('HGET', parked_of, id)
  if not limit then return false end
  local by = parked .. ':by:' .. limit
  redis.call('HDEL', parked_of, id)
  redis.call('ZREM', by, id)
  if redis.call('EXISTS', by) == 0 then redis.call('ZREM', parked, limit) end
  return true
end
