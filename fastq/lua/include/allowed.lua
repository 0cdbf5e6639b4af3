-- the instant from which so many of a window's units are allowed
local function allowed(p, now, units, limit)
  if units > limit then return math.huge end
  if units <= 1 or units <= limit * pace_at(p, now) then return now end
  return p.since + (units / limit - p.pace) * p.recovery
end
