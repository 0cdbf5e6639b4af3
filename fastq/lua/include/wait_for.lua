-- the same for a window while an adaptive limiter is slowed down: parts leave it, and more units are allowed
local function wait_at_pace(r, n, spent)
  local needed = r.total + spent + n
  local best = allowed(r.pace, r.now, needed, r.a)
  for _, part in ipairs(r.parts) do
    needed = needed - part[2]
    best = math.min(best, math.max(part[1] + r.c, allowed(r.pace, r.now, needed, r.a)))
  end
  -- what is granted now must leave, too: then n alone has to be allowed
  local all_gone = (math.floor(r.now / r.b) + 1) * r.b + r.c
  return math.max(1, math.ceil(math.min(best, math.max(all_gone, allowed(r.pace, r.now, n, r.a))) - r.now))
end

-- µs until n units of a rate (include/rate.lua) are there once `spent` more are spent; 0 when they are
local function wait_for(r, n, spent)
  if n < 1 or r.kind == 'none' then return 0 end
  if r.kind == 'bucket' then
    local debt = spent < 1 and n * r.a > r.b and r.raw or r.debt -- the whole burst needs a bucket that idled
    local missing = debt + (spent + n) * r.a - r.b
    return missing > 0 and math.ceil(lasts(r.pace, r.now, missing)) or 0
  end
  if spent + n <= r.left then return 0 end
  if r.kind == 'fixed' then
    if not r.pace then return r.c - r.now end
    return math.ceil(math.min(r.c, allowed(r.pace, r.now, r.count + spent + n, r.a)) - r.now)
  end
  if not r.parts then parts_of(r) end
  if r.pace then return wait_at_pace(r, n, spent) end
  local excess = r.total + spent + n - r.a
  for _, part in ipairs(r.parts) do
    excess = excess - part[2]
    if excess <= 0 then return part[1] + r.c - r.now end
  end
  return (math.floor(r.now / r.b) + 1) * r.b + r.c - r.now -- what is granted now must leave first
end
