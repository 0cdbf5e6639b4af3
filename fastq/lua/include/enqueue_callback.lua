-- the callback of a batch becomes a pending job, whose id is `<batch>-complete`, `<batch>-success` or `<batch>-failure`
local function enqueue_callback(base, id, which, envelope)
  if redis.call('HSETNX', base .. 'jobs', id .. '-' .. which, envelope) == 0 then return end
  redis.call('RPUSH', base .. 'ready:' .. math.min(string.byte(envelope, 2) or 5, 10), id .. '-' .. which)
  wake(base .. 'wake')
end
