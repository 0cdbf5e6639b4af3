-- which of these ids a running set holds: 1 or 0 for each
local function held_of(running, ids)
  if #ids <= 5000 then return redis.call('SMISMEMBER', running, unpack(ids)) end
  local owned = {}
  for i, id in ipairs(ids) do owned[i] = redis.call('SISMEMBER', running, id) end
  return owned
end
