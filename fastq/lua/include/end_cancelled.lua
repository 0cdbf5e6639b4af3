-- a job that was cancelled while a worker had it does not run again: end it; false when nobody cancelled it
local function end_cancelled(cancels, jobs, deliveries, done, now, id)
  local asked = redis.call('HGET', cancels, id)
  if not asked then return false end
  local ttl, record = string.match(asked, '^%a(%d+):(.*)$')
  redis.call('HDEL', cancels, id)
  redis.call('HDEL', jobs, id)
  redis.call('HDEL', deliveries, id)
  keep_record(done, now, math.min(number(ttl), 1e13), id, record or '')
  return true
end
