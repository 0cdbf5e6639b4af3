#!lua flags=allow-oom
-- report: keep how far a running job is, and what it logs
-- KEYS {q}:running:<worker> {q}:progress:<id> {q}:logs:<id> {q}:awaited {q}:events
-- ARGV id progress ttl_ms most [line ...]     (progress '': only lines; most: lines that are kept)
-- Progress is taken from the worker that holds the job; lines may come after its end.
-- Sent twice: the same progress, lines twice: nobody repeats it, a lost report is lost. Reply 1 when the worker holds the job.
--- @include "now"
--- @include "number"
--- @include "tell"
local running, progress, logs, awaited, events = unpack(KEYS)
local id, ttl = ARGV[1], ARGV[3]
local held = redis.call('SISMEMBER', running, id)
if ARGV[2] ~= '' and held == 1 then
  redis.call('SET', progress, ARGV[2], 'PX', ttl)
  if redis.call('HLEN', awaited) > 0 then tell(awaited, events, now_ms(), 'progress', {id}) end
end
if #ARGV > 4 then
  redis.call('RPUSH', logs, unpack(ARGV, 5))
  redis.call('LTRIM', logs, -ARGV[4], -1)
  redis.call('PEXPIRE', logs, ttl)
end
return held
