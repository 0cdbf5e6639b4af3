#!lua flags=allow-oom
-- recover: hand the jobs of a worker back to the front of their ready lists; those cancelled meanwhile end here
-- KEYS {q}:workers {q}:running:<worker> {q}:jobs {q}:deliveries {q}:wake {q}:info {q}:dead {q}:dead:jobs {q}:dead:errors
--      {q}:unique {q}:unique:of {q}:done {q}:cancels {q}:awaited {q}:events {q}:groups {q}:ready:10 ... {q}:ready:0
-- ARGV worker when charge max_deliveries limit pad dead_max error [started id ...]
--   when 'expired': only if its lease has run out; 'now': its death is known, or it says goodbye
--   charge 'all' | 'started' | 'none': whose delivery counts; at max_deliveries a job is poison and goes to the dead letters
-- Sent twice: a job leaves the running set once. Reply {ready, dead, remaining}; remaining -1: the lease is valid.
--- @include "now"
--- @include "number"
--- @include "add"
--- @include "wake"
--- @include "ready"
--- @include "release_unique"
--- @include "bury"
--- @include "tell"
--- @include "keep_record"
--- @include "end_cancelled"
--- @include "many"
--- @include "flows"
--- @include "begin"
--- @include "unfold"
--- @include "enqueue_callback"
--- @include "batches"
--- @include "batches_go_on"
--- @include "flows_go_on"
local workers, running, jobs, deliveries, wake_list, info, dead, dead_jobs, dead_errors = unpack(KEYS, 1, 9)
local worker, charge, most, limit, pad = ARGV[1], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local done, cancels = KEYS[12], KEYS[13]
local now, asked = now_ms(), redis.call('HLEN', cancels) > 0
if ARGV[2] == 'expired' then
  local deadline = redis.call('ZSCORE', workers, worker)
  if deadline and tonumber(deadline) > now then return {0, 0, -1} end
end
local started, ready, buried, ended, kinds = {}, 0, 0, {}, {}
for i = 9, #ARGV do started[ARGV[i]] = true end

for _, id in ipairs(redis.call('SRANDMEMBER', running, limit + 1)) do
  if id ~= pad then
    redis.call('SREM', running, id)
    local envelope = redis.call('HGET', jobs, id)
    local charged = charge == 'all' or (charge == 'started' and started[id])
    if envelope and asked and end_cancelled(cancels, jobs, deliveries, done, now, id) then
      ended[#ended + 1], kinds[id] = id, 'cancelled'
    elseif envelope and charged and add(deliveries, id, 1) >= most then
      redis.call('HDEL', jobs, id)
      redis.call('HDEL', deliveries, id)
      bury(dead, dead_jobs, dead_errors, now, id, envelope, ARGV[8], tonumber(ARGV[7]))
      ended[#ended + 1], kinds[id] = id, 'failed'
      buried = buried + 1
    elseif envelope then
      redis.call('LPUSH', ready_list(envelope, KEYS, 17), id)
      ready = ready + 1
    end
  end
end
release_unique(KEYS[10], KEYS[11], ended)
if #ended > 0 and redis.call('HLEN', KEYS[14]) > 0 then tell(KEYS[14], KEYS[15], now, 'failed', ended, kinds) end
if #ended > 0 and redis.call('EXISTS', KEYS[16]) == 1 then flows_go_on(KEYS[16], now, ended, kinds, {}, 1) end
if ready > 0 then wake(wake_list) end

local remaining = math.max(redis.call('SCARD', running) - 1, 0)
if remaining == 0 then
  redis.call('DEL', running)
  redis.call('ZREM', workers, worker)
  redis.call('HDEL', info, worker)
  if redis.call('ZCARD', workers) == 0 then redis.call('HDEL', jobs, pad) end
end
return {ready, buried, remaining}
