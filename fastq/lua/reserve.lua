#!lua flags=allow-oom
-- reserve: hand up to `want` pending jobs to a worker, highest priority first
-- KEYS {q}:workers {q}:running:<worker> {q}:jobs {q}:wake {q}:unique {q}:unique:of {q}:events {q}:groups {q}:ready:5
--      {q}:paused {q}:ghosts {q}:deliveries {q}:unique:start {q}:awaited
--      {q}:ready:10 ... {q}:ready:6 {q}:ready:4 ... {q}:ready:0
-- ARGV worker want
-- Sent twice: the jobs of a lost reply are in the running set; the worker sees that it holds more than it knows (held)
-- and asks for them with resume.lua.
-- It hands out fewer than wanted (2,000 at most) when many were cancelled; the wake token says that there are more.
-- Reply {held, ids, envelopes, deliveries}; held -1: the lease is gone; deliveries is empty when no job has any. The short
-- way answers a single job with 'held size_of_id id..envelope': tables cost a cold server 20 µs.
local worker, want = ARGV[1], math.min(tonumber(ARGV[2]), 2000) -- Lua cannot unpack 8,000, and what is popped must be held
local running, jobs, wake_list, normal = KEYS[2], KEYS[3], KEYS[4], KEYS[9]
local PAUSED, GHOSTS, DELIVERIES, UNIQUE_START, AWAITED, LEVELS = 10, 11, 12, 13, 14, 15
if not redis.call('ZSCORE', KEYS[1], worker) then return {-1, {}, {}, {}} end
local function nothing() return {redis.call('SCARD', running) - 1, {}, {}, {}} end
if want < 1 then return nothing() end

-- most queues, most of the time: nothing is pending but at NORMAL; not paused, no ghosts, deliveries, unique:start, awaited, and
-- no workflow that unfolds. What the rest needs is not even defined yet, and each call costs a cold server up to 15 µs.
local unfolding = string.sub(KEYS[8], 1, -7) .. 'unfolding'
if redis.call('EXISTS', unfolding, unpack(KEYS, PAUSED)) == 0 then
  local taken = redis.call('LPOP', normal, want)
  if not taken then return nothing() end
  redis.call('SADD', running, unpack(taken))
  if #taken == want and redis.call('LLEN', normal) > 0 and redis.call('LLEN', wake_list) == 0 then
    redis.call('RPUSH', wake_list, '1')
  end
  local held, envelope = redis.call('SCARD', running) - 1, #taken == 1 and redis.call('HGET', jobs, taken[1])
  if envelope then return held .. ' ' .. #taken[1] .. ' ' .. taken[1] .. envelope end
  return {held, taken, redis.call('HMGET', jobs, unpack(taken)), {}}
end

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
if redis.call('EXISTS', KEYS[PAUSED]) == 1 then return nothing() end
local MOST_GHOSTS = 500 -- a call stays near 4 ms: skipping 100,000 at once would stop Redis for 0.4 to 0.8 s
local clock, taken, remain, skipped = now_ms(), {}, false, 0
local haunted = redis.call('HLEN', KEYS[GHOSTS]) > 0
local levels = {unpack(KEYS, LEVELS, LEVELS + 4)}
levels[6] = normal
for i = 7, 11 do levels[i] = KEYS[LEVELS + i - 2] end
local pop = {11, unpack(levels)} -- of LMPOP: one command for all levels
pop[13], pop[14] = 'LEFT', 'COUNT'
local function take()
  repeat
    pop[15] = want - #taken
    local popped = redis.call('LMPOP', unpack(pop))
    for _, id in ipairs(popped and popped[2] or {}) do
      if haunted and is_ghost(KEYS[GHOSTS], id) then skipped = skipped + 1 else taken[#taken + 1] = id end
    end
    remain = redis.call('EXISTS', unpack(levels)) > 0
  until not remain or #taken == want or skipped >= MOST_GHOSTS
end
take()
if #taken < want and not remain then -- nothing else is to be done: workflows of which more is ripe than one call may begin go on
  local flow = redis.call('SRANDMEMBER', unfolding)
  if flow then
    unfold_more(KEYS[8], clock, flow)
    take()
  end
end
if remain then wake(wake_list) end
if #taken == 0 then return nothing() end

redis.call('SADD', running, unpack(taken))
if redis.call('HLEN', KEYS[UNIQUE_START]) > 0 then -- unique until they are started, that is: until now
  local begun = {}
  for i, key in ipairs(redis.call('HMGET', KEYS[UNIQUE_START], unpack(taken))) do
    if key then begun[#begun + 1] = taken[i] end
  end
  release_unique(KEYS[5], KEYS[6], begun)
end
if redis.call('HLEN', KEYS[AWAITED]) > 0 then tell(KEYS[AWAITED], KEYS[7], clock, 'started', taken) end
local envelopes = redis.call('HMGET', jobs, unpack(taken))
local suspects = {}
if redis.call('HLEN', KEYS[DELIVERIES]) > 0 then
  suspects = redis.call('HMGET', KEYS[DELIVERIES], unpack(taken))
  for i = 1, #taken do suspects[i] = number(suspects[i]) end
end
return {redis.call('SCARD', running) - 1, taken, envelopes, suspects}
