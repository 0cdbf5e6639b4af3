-- µs until n units of a rate (include/rate.lua) are there once `spent` more are spent; 0 when they are
local function wait_for(r, n, spent)
  if n < 1 or r.kind == 'none' then return 0 end
  if r.kind == 'bucket' then
    local debt = spent < 1 and n * r.a > r.b and r.raw or r.debt -- the whole burst needs a bucket that idled
    return math.max(0, math.ceil(debt + (spent + n) * r.a - r.b))
  end
  if spent + n <= r.left then return 0 end
  if r.kind == 'fixed' then return r.c - r.now end
  if not r.parts then parts_of(r) end
  local excess = r.total + spent + n - r.a
  for _, part in ipairs(r.parts) do
    excess = excess - part[2]
    if excess <= 0 then return part[1] + r.c - r.now end
  end
  return (math.floor(r.now / r.b) + 1) * r.b + r.c - r.now -- what is granted now must leave first
end
