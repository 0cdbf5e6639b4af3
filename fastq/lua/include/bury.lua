-- put one job into the dead-letter queue and drop the oldest ones above `most`
local function bury(dead, dead_jobs, dead_errors, now, id, envelope, failure, most)
  redis.call('ZADD', dead, now, id)
  redis.call('HSET', dead_jobs, id, envelope)
  redis.call('HSET', dead_errors, id, failure)
  local excess = redis.call('ZCARD', dead) - most
  if excess > 0 then
    local oldest = redis.call('ZRANGE', dead, 0, math.min(excess, 1000) - 1)
    redis.call('ZREM', dead, unpack(oldest))
    redis.call('HDEL', dead_jobs, unpack(oldest))
    redis.call('HDEL', dead_errors, unpack(oldest))
  end
end
