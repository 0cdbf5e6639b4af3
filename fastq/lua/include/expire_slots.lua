-- the slots of a limiter (holder -> end of its lease in ms) go a minute after the last lease has ended: up to then a
-- holder that comes late has its slot back, as long as nobody else took it
local function expire_slots(slots)
  local last = redis.call('ZRANGE', slots, -1, -1, 'WITHSCORES')
  if last[2] then redis.call('PEXPIREAT', slots, math.min(math.floor(number(last[2], 1e15)), 1e15) + 60000) end
end
