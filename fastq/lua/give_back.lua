#!lua flags=allow-oom
-- give_back: return units that nobody used, and slots
-- KEYS {l}:state:<key> {l}:slots:<key> {l}:wake:<key> {l}:given:<ticket>
-- ARGV kind a b c units granted_us holder ...   (granted_us: the grant's now_us, of several grants the oldest)
-- A bucket takes units back less those that flowed in since: they may have been granted to others meanwhile.
-- Sent twice: the ticket, kept for a minute, lets the units back once; a slot is free after the first time.
-- Reply {units, slots}: what went back.
--- @include "now_us"
--- @include "number"
--- @include "add"
--- @include "pace"
--- @include "rate"
--- @include "wake_holder"
local state, slots, wake_list, given = unpack(KEYS)
local kind, a, b, c = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local units, granted = tonumber(ARGV[5]), tonumber(ARGV[6])

local function refund(rate)
  if kind == 'bucket' then
    if number(redis.call('HGET', state, 'until')) > rate.now then return 0 end -- it is to be empty after the penalty
    local credit = math.min(rate.debt, math.max(0, units * a - math.max(0, rate.now - granted)))
    if credit > 0 then redis.call('HSET', state, 'at', rate.now, 'debt', rate.debt - credit) end
    return math.floor(credit / a)
  elseif kind == 'window' then
    local part = (math.floor(granted / b) + 1) * b
    local back = math.min(units, number(redis.call('HGET', state, part)))
    if back < 1 or part + c <= rate.now then return 0 end
    add(state, part, -back)
    add(state, 'total', -back)
    return back
  elseif granted < b or granted >= c or rate.now >= c then
    return 0
  end
  local back = math.min(units, rate.count)
  if back > 0 then redis.call('HSET', state, 'count', rate.count - back) end
  return back
end

local back, freed = 0, 0
if units > 0 and kind ~= 'none' and redis.call('EXISTS', state) == 1
    and redis.call('SET', given, '1', 'NX', 'PX', 60000) then
  back = refund(rate_at(state, now_us(), kind, a, b, c))
end
for i = 7, #ARGV do freed = freed + redis.call('ZREM', slots, ARGV[i]) end
if freed > 0 then wake_holder(wake_list) end
return {back, freed}
