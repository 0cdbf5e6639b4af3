#!lua flags=allow-oom
-- acquire: take units of a limiter's rate, and slots of its concurrency, for as many of a request as can have both
-- KEYS {l}:rule {l}:state:<key> {l}:slots:<key> {l}:wake:<key> {l}:state:<key>
-- ARGV rule kind a b c need want most lease_ms [holder cost] ...   (rule: the override that the caller applies, or '')
-- The fifth key is of a partition: the state of the whole limiter, whose penalty holds for it, too.
-- Without holders: `need` to `want` units. With them: a slot and its cost each, in their order; `most` slots in all.
-- Sent twice: units of a lost reply are lost (used by nobody, counted); a holder that has its slot keeps that one.
-- Reply {status, units, slots, wait_us, now_us, left, rule}; the statuses stand in fastq.limits.Acquired.
--- @include "now_us"
--- @include "number"
--- @include "add"
--- @include "pace"
--- @include "lasts"
--- @include "allowed"
--- @include "rate"
--- @include "wait_for"
--- @include "spend"
--- @include "first_lease"
--- @include "expire_slots"
--- @include "wake_holder"
local rule, state, slots, wake_list = unpack(KEYS, 1, 4)
local kind, a, b, c = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local need, want, most, lease_ms = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local now = now_us()
local function refuse(status, wait) return {status, 0, 0, wait, now, -1, ''} end

local current = redis.call('GET', rule) or ''
if current ~= ARGV[1] then return {'rule', 0, 0, 0, now, -1, current} end
local penalty = number(redis.call('HGET', state, 'until'))
if KEYS[5] then penalty = math.max(penalty, number(redis.call('HGET', KEYS[5], 'until'))) end
if penalty > now then return refuse('penalized', penalty - now) end
if kind == 'fixed' and (now < b or now >= c) then return refuse('window', 0) end

local rate = rate_at(state, now, kind, a, b, c)
if most < 1 then
  local wait = wait_for(rate, need, 0)
  if wait > 0 then return refuse('short', wait) end
  local units = math.max(need, math.min(want, rate.left))
  if kind == 'none' then units = want end
  if units < want or rate.left - units < 1 then wait = wait_for(rate, 1, units) end
  spend(rate, units)
  return {'granted', units, 0, wait, now, math.max(-1, rate.left - units), ''}
end

redis.call('ZREMRANGEBYSCORE', slots, '-inf', math.floor(now / 1000))
local free, units, taken, wait, granted = most - redis.call('ZCARD', slots), 0, 0, 0, {}
for i = 10, #ARGV, 2 do
  local cost, mine = tonumber(ARGV[i + 1]), redis.call('ZSCORE', slots, ARGV[i])
  if not mine and free < 1 then break end
  wait = wait_for(rate, cost, units)
  if wait > 0 then break end
  units, taken = units + cost, taken + 1
  if not mine then free = free - 1 end
  granted[#granted + 1] = lease_ms + math.floor(now / 1000)
  granted[#granted + 1] = ARGV[i]
end
if taken == 0 and wait > 0 then return refuse('short', wait) end
if taken == 0 then return refuse('full', first_lease(slots, now)) end
spend(rate, units)
redis.call('ZADD', slots, unpack(granted))
expire_slots(slots)
if free > 0 then wake_holder(wake_list) end
return {'granted', units, taken, wait, now, math.max(-1, rate.left - units), ''}
