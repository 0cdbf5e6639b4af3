#!lua
-- fire: enqueue the job of one tick of a schedule, unless this tick or a later one was dealt with before
-- KEYS {q}:ticks {q}:jobs {q}:ready:<priority> {q}:wake {q}:schedules {q}:suspended {q}:runs {q}:due {q}:due:wake
-- ARGV schedule tick_ms id envelope definition delay_ms overlap most
--   tick_ms 0: by hand, whatever was fired before, suspended or not
--   overlap 'allow', else at most `most` of its jobs live at a time: 'skip' drops the tick, any other word holds it back
-- Sent twice, or by two schedulers: the compare-and-set on the last tick lets one of them through; by hand: the id is among
-- the runs. Only the definition that is stored now is fired: one that was changed or removed meanwhile is not.
-- Reply 1 enqueued, 0 done before, 2 skipped, -1 held back, -2 the definition is another or gone, or it is suspended.
--- @include "now"
--- @include "number"
--- @include "wake"
--- @include "runs"
local ticks, jobs, schedules, suspended, runs = KEYS[1], KEYS[2], KEYS[5], KEYS[6], KEYS[7]
local name, tick, id, delay = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[6])
local last = redis.call('HGET', ticks, name)
if tick > 0 and last and number(last) >= tick then return 0 end
if redis.call('HGET', schedules, name) ~= ARGV[5] then return -2 end
if tick > 0 and redis.call('SISMEMBER', suspended, name) == 1 then return -2 end
local lines, now, state, alive = runs_of(runs, name), now_ms(), 'open', 0
for _, run in ipairs(lines) do
  if run.id == id and tick == 0 then return 0 end
  if ARGV[7] ~= 'allow' and run.state == 'open' and redis.call('HEXISTS', jobs, run.id) == 1 then alive = alive + 1 end
end
if ARGV[7] ~= 'allow' and alive >= tonumber(ARGV[8]) then
  if ARGV[7] ~= 'skip' then return -1 end
  state = 'skipped'
end
if tick > 0 then redis.call('HSET', ticks, name, ARGV[2]) end
table.insert(lines, 1, {tick = ARGV[2], id = id, at = now, state = state})
keep_runs(runs, name, lines)
if state == 'skipped' then return 2 end
if redis.call('HSETNX', jobs, id, ARGV[4]) == 1 then
  if delay > 0 then
    redis.call('ZADD', KEYS[8], now + delay, id)
    if tonumber(redis.call('ZRANGE', KEYS[8], 0, 0, 'WITHSCORES')[2]) >= now + delay then wake(KEYS[9]) end
  else
    redis.call('RPUSH', KEYS[3], id)
    wake(KEYS[4])
  end
end
return 1
