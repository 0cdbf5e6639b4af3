-- give the unique keys of finished jobs free; costs one command when no job has one
local function release_unique(unique, unique_of, ids)
  if #ids == 0 or redis.call('HLEN', unique_of) == 0 then return end
  for _, id in ipairs(ids) do
    local key = redis.call('HGET', unique_of, id)
    if key then
      redis.call('HDEL', unique_of, id)
      redis.call('HDEL', unique .. ':start', id)
      if redis.call('HGET', unique, key) == id then redis.call('HDEL', unique, key) end
    end
  end
end
