-- the slots of a limiter (holder -> end of its lease in ms) go when the last lease has ended
local function expire_slots(slots)
  local last = redis.call('ZRANGE', slots, -1, -1, 'WITHSCORES')
  if last[2] then redis.call('PEXPIREAT', slots, last[2]) end
end
