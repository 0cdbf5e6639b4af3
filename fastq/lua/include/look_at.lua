-- when somebody should look at a limit with parked jobs: at `at`, not before those of another worker; a pause ('~paused/…') is
-- looked at when it is over: now, if that is so already
local FAR = 1e15 -- ms; a finite number, as keys are read by people, too

local function look_at(parked, pauses, limit, now, at)
  if string.sub(limit, 1, 1) ~= '~' then
    redis.call('ZADD', parked, 'GT', at, limit)
  else
    redis.call('ZADD', parked, redis.call('HEXISTS', pauses, limit) == 1 and FAR or now, limit)
  end
end
