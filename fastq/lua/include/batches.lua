-- batches: jobs that were enqueued together, counted as they end. The id of the n-th is `<batch>-<n>`.
-- `{q}:batch:<id>`: state (filling, running, then success, failed or cancelled), total, next, success, failed, cancelled (counts),
-- torn (its producer gave up), stop (it was cancelled), on:complete, on:success, on:failure (envelopes), ttl, is:<state> (records)
-- `{q}:batch:<id>:ends`: two bits per job: 0 has not ended, 1 success, 2 failed, 3 cancelled. A job counts once: a replay, or a
-- second job of its id, finds them set

-- if no more jobs are coming and all have ended: its end is written down, once, and told to whom it concerns
local function end_batch(groups, now, batch, id)
  local f = redis.call('HMGET', batch, 'state', 'total', 'success', 'failed', 'cancelled', 'stop', 'torn', 'ttl')
  local total, good, ttl = number(f[2]), number(f[3]), math.min(math.max(1000, math.floor(number(f[8], 3600000))), 1e13)
  if f[1] ~= 'running' or good + number(f[4]) + number(f[5]) < total then return f[1] end
  local state = f[6] and 'cancelled' or (f[7] or good < total) and 'failed' or 'success'
  redis.call('HSET', batch, 'state', state, 'finished', now)
  redis.call('ZREM', groups, id)
  redis.call('PEXPIRE', batch, ttl)
  redis.call('PEXPIRE', batch .. ':ends', ttl)
  local base, ends = string.sub(groups, 1, -7), {'complete', state == 'success' and 'success' or state == 'failed' and 'failure'}
  for _, which in ipairs(ends) do
    local envelope = which and redis.call('HGET', batch, 'on:' .. which)
    if envelope then enqueue_callback(base, id, which, envelope) end
  end
  if redis.call('HLEN', base .. 'awaited') > 0 then
    tell(base .. 'awaited', base .. 'events', now, state == 'success' and 'succeeded' or state, {id})
  end
  return state
end
