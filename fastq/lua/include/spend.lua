-- write down that n units of a rate (include/rate.lua) were granted; the state expires when it says no more than none
local function spend(r, n)
  if n < 1 or r.kind == 'none' then return end
  local ends
  if r.kind == 'bucket' then
    local debt = r.debt + n * r.a
    redis.call('HSET', r.state, 'at', r.now, 'debt', debt)
    ends = r.now + lasts(r.pace, r.now, debt + r.c)
  elseif r.kind == 'fixed' then
    redis.call('HSET', r.state, 'start', r.b, 'count', r.count + n)
    ends = r.c
  else
    if #r.gone > 0 then redis.call('HDEL', r.state, unpack(r.gone)) end
    local part = (math.floor(r.now / r.b) + 1) * r.b
    local oldest = r.total > 0 and r.oldest or part
    add(r.state, part, n)
    redis.call('HSET', r.state, 'total', r.total + n, 'oldest', oldest)
    ends = part + r.c
  end
  if r.pace then ends = math.max(ends, r.pace.since + r.pace.span) end
  redis.call('PEXPIREAT', r.state, math.min(math.ceil(ends / 1000), 1e15))
end
