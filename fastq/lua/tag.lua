#!lua
-- tag: write down that jobs which are about to be enqueued carry a tag
-- KEYS {q}:jobs {q}:tag:<tag>
-- ARGV ttl_ms id ...     (ttl_ms: how long the tag is remembered, at least)
-- It comes before enqueue.lua, so no accepted job is without its tag; an id whose job was never stored does no harm. Each call looks
-- at twice as many random older entries as it adds and drops those whose job is gone, so the set stays within a small multiple of
-- the jobs that live. Sent twice: the same. Reply the number of entries.
--- @include "now"
local jobs, tagged, now = KEYS[1], KEYS[2], now_ms()
local UNDER_WAY = 60000 -- ms for which a tagged job may still be on its way
local MOST = 1000
local words, gone = {}, {}
local sample = redis.call('ZRANDMEMBER', tagged, math.min(2 * (#ARGV - 1), MOST), 'WITHSCORES')
for i = 1, #sample, 2 do
  if tonumber(sample[i + 1]) + UNDER_WAY < now and redis.call('HEXISTS', jobs, sample[i]) == 0 then
    gone[#gone + 1] = sample[i]
  end
end
if #gone > 0 then redis.call('ZREM', tagged, unpack(gone)) end
for i = 2, #ARGV do
  words[#words + 1] = now
  words[#words + 1] = ARGV[i]
end
redis.call('ZADD', tagged, 'NX', unpack(words))
if redis.call('PTTL', tagged) < tonumber(ARGV[1]) then redis.call('PEXPIRE', tagged, ARGV[1]) end
return redis.call('ZCARD', tagged)
