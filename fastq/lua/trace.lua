#!lua flags=allow-oom
-- trace: write down how the last runs of schedules ended, before their records expire
-- KEYS {q}:runs {q}:jobs {q}:dead {q}:done
-- ARGV name ...
-- Sent twice: a run that has ended is not looked at again. Reply per schedule: how many of its jobs live.
--- @include "found"
--- @include "runs"
local runs, jobs, dead, done, alive = KEYS[1], KEYS[2], KEYS[3], KEYS[4], {}

-- 'success' or 'cancelled' is the first word of a record (job.JobRecord); 'finished': it left none
local function ended(id)
  if redis.call('ZSCORE', dead, id) then return 'failed' end
  local record = find_record(done, id)
  return record and string.match(record, '^.[\160-\191](%l+)') or 'finished'
end

for i, name in ipairs(ARGV) do
  local lines, news = runs_of(runs, name), false
  alive[i] = 0
  for _, run in ipairs(lines) do
    if run.state == 'open' and redis.call('HEXISTS', jobs, run.id) == 1 then
      alive[i] = alive[i] + 1
    elseif run.state == 'open' then
      run.state, news = ended(run.id), true
    end
  end
  if news then keep_runs(runs, name, lines) end
end
return alive
