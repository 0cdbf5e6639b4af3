-- the slots of a limiter (holder -> end of its lease in ms) go a minute after the last lease has ended: up to then a
-- holder that comes late has its slot back, as long as nobody else took it
local function expire_slots(slots)
  local last = redis.call('ZRANGE', slots, -1, -1, 'WITHSCORES')
  if last[2] then redis.call('PEXPIREAT', slots, last[2] + 60000) end
end
