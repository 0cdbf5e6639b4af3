-- the room in a bounded queue; KEYS from `first`: {q}:ghosts {q}:deliveries {q}:ready:10 ... {q}:ready:0
local MOST_SKIPPED = 500 -- ghosts in the way of one call

local function pending_from(first)
  local count = -redis.call('HLEN', KEYS[first])
  for i = first + 2, first + 12 do count = count + redis.call('LLEN', KEYS[i]) end
  return count
end

-- take the oldest pending job of the lowest priority out, none of a higher one than that of the list `own`; nothing when
-- there is none
local function take_oldest(first, jobs, own)
  local ghosts, skipped = KEYS[first], 0
  for i = first + 12, first + 2, -1 do
    local id = redis.call('LPOP', KEYS[i])
    while id and is_ghost(ghosts, id) do
      skipped = skipped + 1
      if skipped >= MOST_SKIPPED then return end
      id = redis.call('LPOP', KEYS[i])
    end
    if id then
      redis.call('HDEL', jobs, id)
      redis.call('HDEL', KEYS[first + 1], id)
      return id
    end
    if KEYS[i] == own then return end
  end
end
