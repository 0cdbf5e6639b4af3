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
--- @include "wake"
--- @include "is_ghost"
local worker, want = ARGV[1], math.min(tonumber(ARGV[2]), 2000) -- Lua cannot unpack 8,000, and what is popped must be held
local MOST_GHOSTS = 500 -- a call stays near 4 ms: skipping 100,000 at once would stop Redis for 0.4 to 0.8 s
local clock, running, unfolding = now_ms(), KEYS[2], string.sub(KEYS[13], 1, -7) .. 'unfolding'
if not redis.call('ZSCORE', KEYS[1], worker) then return {clock, -1, {}, {}, {}} end
-- most queues, most of the time: not paused, no ghosts, deliveries, unique:start, awaited, and no workflow that unfolds
local plain = redis.call('EXISTS', KEYS[4], KEYS[6], KEYS[7], KEYS[10], KEYS[11], unfolding) == 0
if want < 1 or not plain and redis.call('EXISTS', KEYS[4]) == 1 then
  return {clock, redis.call('SCARD', running) - 1, {}, {}, {}}
end

local taken, remain, skipped = {}, false, 0
local haunted = not plain and redis.call('HLEN', KEYS[6]) > 0
local pop, LEVELS = {#KEYS - 13, unpack(KEYS, 14)}, #KEYS - 12 -- of LMPOP: one command for all levels
pop[LEVELS + 1], pop[LEVELS + 2] = 'LEFT', 'COUNT'
local function take()
  repeat
    pop[LEVELS + 3] = want - #taken
    local popped = redis.call('LMPOP', unpack(pop))
    for _, id in ipairs(popped and popped[2] or {}) do
      if haunted and is_ghost(KEYS[6], id) then skipped = skipped + 1 else taken[#taken + 1] = id end
    end
    remain = redis.call('EXISTS', unpack(KEYS, 14)) > 0
  until not remain or #taken == want or skipped >= MOST_GHOSTS
end
take()
if plain then -- what the rest needs is not even defined yet: that would be a third of a short call
  if remain then wake(KEYS[5]) end
  if #taken == 0 then return {clock, redis.call('SCARD', running) - 1, {}, {}, {}} end
  redis.call('SADD', running, unpack(taken))
  return {clock, redis.call('SCARD', running) - 1, taken, redis.call('HMGET', KEYS[3], unpack(taken)), {}}
end

--- @include "number"
--- @include "add"
--- @include "release_unique"
--- @include "tell"
--- @include "flows"
--- @include "begin"
--- @include "unfold"
--- @include "unfold_more"
if #taken < want and not remain then -- nothing else is to be done: workflows of which more is ripe than one call may begin go on
  local flow = redis.call('SRANDMEMBER', unfolding)
  if flow then
    unfold_more(KEYS[13], clock, flow)
    take()
  end
end
local jobs, wake_list, deliveries, unique, unique_of, unique_start = KEYS[3], KEYS[5], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
if remain then wake(wake_list) end
if #taken == 0 then return {clock, redis.call('SCARD', running) - 1, {}, {}, {}} end

redis.call('SADD', running, unpack(taken))
if redis.call('HLEN', unique_start) > 0 then -- unique until they are started, that is: until now
  local begun = {}
  for i, key in ipairs(redis.call('HMGET', unique_start, unpack(taken))) do
    if key then begun[#begun + 1] = taken[i] end
  end
  release_unique(unique, unique_of, begun)
end
if redis.call('HLEN', KEYS[11]) > 0 then tell(KEYS[11], KEYS[12], clock, 'started', taken) end
local envelopes = redis.call('HMGET', jobs, unpack(taken))
local suspects = {}
if redis.call('HLEN', deliveries) > 0 then
  suspects = redis.call('HMGET', deliveries, unpack(taken))
  for i = 1, #taken do suspects[i] = number(suspects[i]) end
end
return {clock, redis.call('SCARD', running) - 1, taken, envelopes, suspects}
