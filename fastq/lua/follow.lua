#!lua flags=allow-oom
-- follow: how jobs have ended; of those that have not, be told by a message
-- KEYS {q}:jobs {q}:dead {q}:dead:jobs {q}:dead:errors {q}:done {q}:awaited {q}:groups
-- ARGV channel ttl_ms id ...
-- An id may be that of a workflow or a batch; or of a job of a workflow that has not begun (open, unless that has ended).
-- Look and registration are one step, so no end is missed: a job has ended before it, or its end finds the channel.
-- The message is `<name of the awaited key> <id> ...`. A registration goes with its job, or after ttl_ms without another.
-- Sent twice: a channel is written down once. Reply for each id {'open'} | {'finished', record}
--   | {'failed', envelope, error, failed_at_ms} | {'unknown'}
--- @include "found"
local jobs, dead, dead_jobs, dead_errors, done, awaited, groups = unpack(KEYS)
local channel, reply, open = ARGV[1], {}, false
local MOST = 16000 -- bytes of channel names of one job, some 300 processes: the first one is forgotten, and asks again itself

local function register(id)
  local names = redis.call('HGET', awaited, id)
  if not names then
    redis.call('HSET', awaited, id, channel)
  elseif not string.find(names, channel, 1, true) then
    if #names > MOST then names = string.gsub(names, '^[^ ]+ ', '') end
    redis.call('HSET', awaited, id, names .. ' ' .. channel)
  end
end

-- what an id is that no job has
local function ask_groups(id)
  local flow = string.sub(groups, 1, -7) .. 'flow:'
  local state = redis.call('HGET', flow .. id, 'state')
  if state and state ~= 'running' then return {'finished', redis.call('HGET', flow .. id, state)} end
  local batch = string.sub(groups, 1, -7) .. 'batch:' .. id
  local of_batch = redis.call('HGET', batch, 'state')
  if of_batch and of_batch ~= 'filling' and of_batch ~= 'running' then
    return {'finished', redis.call('HGET', batch, 'is:' .. of_batch)}
  end
  local of, node = string.match(id, '^(%x+)%.(%d+)$')
  local waits = of and #node < 8 and redis.call('GETRANGE', flow .. of .. ':states', node, node) == 'w'
  if state or of_batch or (waits and redis.call('ZSCORE', groups, of)) then
    register(id)
    return {'open'}
  end
  return {'unknown'}
end

for i = 3, #ARGV do
  local id, answer = ARGV[i], {'unknown'}
  if redis.call('HEXISTS', jobs, id) == 1 then
    register(id)
    answer, open = {'open'}, true
  else
    local failed_at = redis.call('ZSCORE', dead, id)
    local record = not failed_at and find_record(done, id)
    if failed_at then
      answer = {'failed', redis.call('HGET', dead_jobs, id) or '', redis.call('HGET', dead_errors, id) or '', failed_at}
    elseif record then
      answer = {'finished', record}
    else
      answer = ask_groups(id)
      open = open or answer[1] == 'open'
    end
  end
  reply[#reply + 1] = answer
end
if open then redis.call('PEXPIRE', awaited, ARGV[2]) end
return reply
