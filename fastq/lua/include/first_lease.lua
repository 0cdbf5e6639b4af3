-- µs until the first lease of a slot ends; 0 without a holder
local function first_lease(slots, now)
  local first = redis.call('ZRANGE', slots, 0, 0, 'WITHSCORES')
  return first[2] and math.max(1, number(first[2], 1e12) * 1000 - now) or 0
end
