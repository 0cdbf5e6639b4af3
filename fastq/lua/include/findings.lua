-- what check.lua and mend.lua look at, and how they say what they find
local jobs, due, ghosts, workers, unique, unique_of, unique_start = unpack(KEYS, 1, 7)
local deliveries, cancels, awaited, parked, parked_of, dead, dead_jobs, dead_errors = unpack(KEYS, 8, 15)
local wake_list, info, LEVELS = KEYS[16], KEYS[17], 18
local how, pad = ARGV[1], ARGV[2]
local base = string.sub(workers, 1, -8)
local holders_of_jobs, found, ROWS = redis.call('ZRANGE', workers, 0, -1), {}, 4 + tonumber(ARGV[3])
for i = 4, ROWS - 1 do
  if not redis.call('ZSCORE', workers, ARGV[i]) then table.insert(holders_of_jobs, ARGV[i]) end
end

local function fault(code, detail, mend)
  local state = mend and 1 or 0
  if how == 'mend' and mend then
    mend()
    state = 2
  end
  found[#found + 1] = {code, detail, state}
end
