-- an adaptive limiter after a penalty: from `since` on its time runs at `pace` (of 1), and by 1 / `recovery` µs faster until it
-- runs at 1 again; fastq/broker/memory.py holds the same in Python (class Pace)
local function pace_of(pace, since, recovery)
  if not pace then return false end
  local p = {pace = math.min(1, number(pace, 1)), since = number(since), recovery = number(recovery)}
  if p.recovery <= 0 then return false end
  p.span = (1 - p.pace) * p.recovery
  p.whole = p.span * (p.pace + p.span / (2 * p.recovery))
  return p
end

local function pace_at(p, now)
  return p and math.min(1, p.pace + math.max(0, now - p.since) / p.recovery) or 1
end

-- the limiter's own time at an instant
local function flow(p, now)
  local x = now - p.since
  if x <= 0 then return x end
  if x >= p.span then return p.whole + x - p.span end
  return x * (p.pace + x / (2 * p.recovery))
end
