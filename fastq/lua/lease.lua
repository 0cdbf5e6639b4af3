#!lua flags=allow-oom
-- lease: take, renew or give up what one holder at a time has
-- KEYS {n}:lease {n}:wake
-- ARGV owner what ttl_ms      (what: 'take' | 'renew' | 'release'; an owner is new for each holding)
-- The token of a holding is above those of all earlier ones: Redis's time in µs, or one more than the last. So it grows on
-- after the key has gone, and on a server that has lost it.
-- Sent twice: 'take' by the holder renews it, with the same token; 'renew' after the end is refused, even if nobody else has
-- taken it since; 'release' by somebody else does nothing.
-- Reply {token, left_ms}: token 0: this owner does not have it; left_ms: until it ends, 0: it is free.
--- @include "now_us"
--- @include "number"
local lease, wake_list, owner, what, ttl = KEYS[1], KEYS[2], ARGV[1], ARGV[2], tonumber(ARGV[3])
local clock = now_us()
local now = math.floor(clock / 1000)
local saved = redis.call('HMGET', lease, 'owner', 'until', 'token')
local left = saved[1] and math.max(0, number(saved[2]) - now) or 0
local mine = left > 0 and saved[1] == owner

if what == 'release' then
  if saved[1] ~= owner then return {0, left} end
  redis.call('HDEL', lease, 'owner', 'until')
  if redis.call('LLEN', wake_list) == 0 then redis.call('RPUSH', wake_list, '1') end
  redis.call('PEXPIRE', wake_list, 60000)
  return {0, 0}
end
if not mine and (what == 'renew' or left > 0) then return {0, left} end

local token = saved[3]
if not mine then token = math.max(clock, number(saved[3]) + 1) end
redis.call('HSET', lease, 'owner', owner, 'until', now + ttl, 'token', string.format('%.0f', token))
redis.call('PEXPIREAT', lease, now + ttl + 600000) -- ten minutes: a clock that was set back by less changes nothing
return {number(token), ttl}
