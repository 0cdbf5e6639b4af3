-- the rate of a limiter at one instant; times in µs; fastq/limits.py holds the same in Python (class _Rate)
-- bucket: a = µs per unit, b = room for debt, c = more room after idling as long. What is granted is debt, which time pays.
-- window: a = limit, b = width of a part, c = how long after its end a part counts | fixed: a = limit, b = start, c = end
local function parts_of(r)
  local parts, all = {}, redis.call('HGETALL', r.state)
  r.total, r.gone = 0, {}
  for i = 1, #all, 2 do
    local ends = string.find(all[i], '^%d+$') and number(all[i]) -- the other fields have names
    if ends and ends + r.c <= r.now then
      r.gone[#r.gone + 1] = all[i]
    elseif ends then
      parts[#parts + 1] = {ends, number(all[i + 1])}
      r.total = r.total + number(all[i + 1])
    end
  end
  table.sort(parts, function(x, y) return x[1] < y[1] end)
  r.parts, r.oldest = parts, parts[1] and parts[1][1]
end

local function rate_at(state, now, kind, a, b, c)
  local r = {state = state, now = now, kind = kind, a = a, b = b, c = c, left = -1, gone = {}}
  if kind == 'bucket' then
    local saved = redis.call('HMGET', state, 'at', 'debt', 'pace', 'since', 'recovery', 'until')
    local pace = pace_of(saved[3], saved[4], saved[5])
    r.raw, r.pace = -c, pace
    -- what another rule had lent counts as one empty bucket: a changed rule is in force from its change on
    if saved[1] then
      local passed = pace and flow(pace, now) - flow(pace, number(saved[1])) or now - number(saved[1])
      -- a clock that went back does not make debt; the end of a penalty, which lies ahead, does
      if passed < 0 and number(saved[6]) <= now then passed = 0 end
      r.raw = math.max(-c, math.min(b + c, number(saved[2])) - passed)
    end
    r.debt = math.max(0, r.raw)
    r.left = math.max(0, math.floor((b - r.debt) / a))
  elseif kind == 'window' then
    local saved = redis.call('HMGET', state, 'total', 'oldest', 'pace', 'since', 'recovery')
    r.pace = pace_of(saved[3], saved[4], saved[5])
    r.total, r.oldest = number(saved[1]), number(saved[2])
    if r.oldest + c <= now then parts_of(r) end
    r.left = math.max(0, math.max(1, math.floor(a * pace_at(r.pace, now))) - r.total)
  elseif kind == 'fixed' then
    local saved = redis.call('HMGET', state, 'start', 'count', 'pace', 'since', 'recovery')
    r.pace = pace_of(saved[3], saved[4], saved[5])
    r.count = number(saved[1], -1) == b and number(saved[2]) or 0
    r.left = math.max(0, math.max(1, math.floor(a * pace_at(r.pace, now))) - r.count)
  end
  return r
end
