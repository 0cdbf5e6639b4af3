-- commands with any number of members: Lua unpacks fewer than 8,000, and a script that fails half-way is not undone
local function many(command, key, members)
  for from = 1, #members, 5000 do
    redis.call(command, key, unpack(members, from, math.min(from + 4999, #members)))
  end
end

-- which of these ids a running set holds: 1 or 0 for each
local function held_of(running, ids)
  if #ids <= 5000 then return redis.call('SMISMEMBER', running, unpack(ids)) end
  local owned = {}
  for i, id in ipairs(ids) do owned[i] = redis.call('SISMEMBER', running, id) end
  return owned
end
