-- commands with any number of members: Lua unpacks fewer than 8,000, and a script that fails half-way is not undone
local function many(command, key, members)
  for from = 1, #members, 5000 do
    redis.call(command, key, unpack(members, from, math.min(from + 4999, #members)))
  end
end
