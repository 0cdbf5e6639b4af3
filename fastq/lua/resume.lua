#!lua flags=allow-oom
-- resume: what a worker holds, after a reply was lost on the way to it
-- KEYS {q}:workers {q}:running:<worker> {q}:jobs
-- ARGV worker pad
-- Read only. Reply {held, ids, envelopes}; held -1: the lease is gone.
local workers, running, jobs = KEYS[1], KEYS[2], KEYS[3]
if not redis.call('ZSCORE', workers, ARGV[1]) then return {-1, {}, {}} end
local ids, envelopes = {}, {}
for _, id in ipairs(redis.call('SMEMBERS', running)) do
  if id ~= ARGV[2] then
    ids[#ids + 1] = id
    envelopes[#ids] = redis.call('HGET', jobs, id) or ''
  end
end
return {#ids, ids, envelopes}
