-- why a job of this id cannot be stored, and what the caller needs to know of it; nothing when it can
local function refusal(jobs, dead, done, id)
  if redis.call('HEXISTS', jobs, id) == 1 then return 'exists', '' end
  if redis.call('ZSCORE', dead, id) then return 'dead', '' end
  local record = find_record(done, id)
  if record then return 'finished', record end
end

-- store one job, pending or scheduled; the time at which it is due, or nothing
local function enqueue_one(jobs, ready, due, id, envelope, due_at)
  redis.call('HSET', jobs, id, envelope)
  if not due_at then
    redis.call('RPUSH', ready, id)
  else
    redis.call('ZADD', due, due_at, id)
  end
end
