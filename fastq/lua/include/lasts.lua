-- the instant of a limiter's own time (include/pace.lua)
local function instant(p, own)
  if own <= 0 then return p.since + own end
  if own >= p.whole then return p.since + p.span + own - p.whole end
  return p.since + p.recovery * (math.sqrt(p.pace * p.pace + 2 * own / p.recovery) - p.pace)
end

-- µs from `now` until so much of the limiter's own time has passed
local function lasts(p, now, own)
  return p and instant(p, flow(p, now) + own) - now or own
end
