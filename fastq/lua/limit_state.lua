#!lua flags=no-writes
-- limit_state: what is left of a limiter and who holds it
-- KEYS {l}:rule {l}:state:<key> {l}:slots:<key> {l}:state:<key>
-- ARGV kind a b c     (the fourth key is of a partition: the state of the whole limiter, whose penalty holds for it, too)
-- Read only. Reply {now_us, left, reset_us, penalty_us, holders, lease_us, rule, pace in millionths}: see fastq.limits.LimitState.
--- @include "now_us"
--- @include "number"
--- @include "pace"
--- @include "lasts"
--- @include "rate"
--- @include "first_lease"
local state, slots = KEYS[2], KEYS[3]
local kind, a, b, c = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local now = now_us()
local rate = rate_at(state, now, kind, a, b, c)
local reset = 0
if kind == 'bucket' then
  reset = math.ceil(lasts(rate.pace, now, rate.debt))
elseif kind == 'fixed' then
  if rate.count > 0 then reset = math.max(0, c - now) end
elseif kind == 'window' then
  parts_of(rate)
  if #rate.parts > 0 then reset = rate.parts[#rate.parts][1] + c - now end
end
local penalty = math.max(0, number(redis.call('HGET', state, 'until')) - now)
if KEYS[4] then penalty = math.max(penalty, number(redis.call('HGET', KEYS[4], 'until')) - now) end
local holders = redis.call('ZCOUNT', slots, '(' .. math.floor(now / 1000), '+inf')
return {now, rate.left, reset, penalty, holders, first_lease(slots, now), redis.call('GET', KEYS[1]) or '',
  math.floor(1000000 * pace_at(rate.pace, now))}
