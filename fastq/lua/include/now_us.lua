-- Redis's clock in microseconds: a fast limit grants many units in a millisecond
local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end
