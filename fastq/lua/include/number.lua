-- a number that lies in Redis, where a foreign writer may have left anything: `otherwise` (or 0) when it is none, negative or endless
local function number(text, otherwise)
  local n = tonumber(text)
  return n and n >= 0 and n < math.huge and n or otherwise or 0
end
