#!lua flags=allow-oom
-- reserve: hand up to `want` pending jobs to a worker, highest priority first
-- KEYS {q}:workers {q}:running:<worker> {q}:jobs {q}:paused {q}:wake {q}:ghosts {q}:deliveries {q}:unique {q}:unique:of
--      {q}:unique:start {q}:awaited {q}:events {q}:groups {q}:ready:10 ... {q}:ready:0
-- ARGV worker want
-- Sent twice: the jobs of a lost reply are in the running set; the worker sees that it holds more than it knows (held)
-- and asks for them with resume.lua.
-- It hands out fewer than wanted (2,000 at most) when many were cancelled; the wake token says that there are more.
-- Reply {now_ms, held, ids, envelopes, deliveries}; held -1: the lease is gone; deliveries is empty when no job has any.
--- @include "now"
--- @include "number"
--- @include "add"
--- @include "wake"
--- @include "is_ghost"
--- @include "release_unique"
--- @include "tell"
--- @include "flows"
--- @include "begin"
--- @include "unfold"
--- @include "unfold_more"
local workers, running, jobs, paused, wake_list, ghosts, deliveries, unique, unique_of, unique_start = unpack(KEYS, 1, 10)
local worker, want = ARGV[1], math.min(tonumber(ARGV[2]), 2000) -- Lua cannot unpack 8,000, and what is popped must be held
local MOST_GHOSTS = 500 -- a call stays near 4 ms: skipping 100,000 at once would stop Redis for 0.4 to 0.8 s
local now = now_ms()
if not redis.call('ZSCORE', workers, worker) then return {now, -1, {}, {}, {}} end
if want < 1 or redis.call('EXISTS', paused) == 1 then
  return {now, redis.call('SCARD', running) - 1, {}, {}, {}}
end

local ids, more, skipped = {}, false, 0
local haunted = redis.call('HLEN', ghosts) > 0
local words, LEVELS = {#KEYS - 13, unpack(KEYS, 14)}, #KEYS - 12 -- of LMPOP: one command for all levels
words[LEVELS + 1], words[LEVELS + 2] = 'LEFT', 'COUNT'
local function take()
  while #ids < want and skipped < MOST_GHOSTS do
    words[LEVELS + 3] = want - #ids
    local popped = redis.call('LMPOP', unpack(words))
    if not popped then return end
    for _, id in ipairs(popped[2]) do
      if haunted and is_ghost(ghosts, id) then skipped = skipped + 1 else ids[#ids + 1] = id end
    end
  end
  more = redis.call('EXISTS', unpack(KEYS, 14)) > 0
end
take()
if #ids < want and not more then -- nothing else is to be done: workflows of which more is ripe than one call may begin go on
  local flow = redis.call('SRANDMEMBER', base_of(KEYS[13]) .. 'unfolding')
  if flow then
    unfold_more(KEYS[13], now, flow)
    take()
  end
end
if more then wake(wake_list) end
if #ids == 0 then return {now, redis.call('SCARD', running) - 1, {}, {}, {}} end

redis.call('SADD', running, unpack(ids))
if redis.call('HLEN', unique_start) > 0 then -- unique until they are started, that is: until now
  local begun = {}
  for i, key in ipairs(redis.call('HMGET', unique_start, unpack(ids))) do
    if key then begun[#begun + 1] = ids[i] end
  end
  release_unique(unique, unique_of, begun)
end
if redis.call('HLEN', KEYS[11]) > 0 then tell(KEYS[11], KEYS[12], now, 'started', ids) end
local envelopes = redis.call('HMGET', jobs, unpack(ids))
local suspects = {}
if redis.call('HLEN', deliveries) > 0 then
  suspects = redis.call('HMGET', deliveries, unpack(ids))
  for i = 1, #ids do suspects[i] = number(suspects[i]) end
end
return {now, redis.call('SCARD', running) - 1, ids, envelopes, suspects}
