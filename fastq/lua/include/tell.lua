-- tell those who wait for these jobs, and those who watch them; for scripts that found something in the hash `awaited`:
-- job id -> the channels of the processes that wait for its end, and '!' when its events are wanted;
-- '*' -> until when, in ms, the events of all jobs are wanted
local MOVES = {started = true, progress = true, retried = true} -- the other events are the last ones of a job

-- kind: the event of these jobs, but for those that `kinds` names
local function tell(awaited, events, now, kind, ids, kinds)
  local all, told, seen = number(redis.call('HGET', awaited, '*')) > now, {}, false
  for from = 1, #ids, 5000 do
    local over = {}
    for i, names in ipairs(redis.call('HMGET', awaited, unpack(ids, from, math.min(from + 4999, #ids)))) do
      local id = ids[from + i - 1]
      if all or (names and string.find(names, '!', 1, true)) then
        redis.pcall('XADD', events, 'MAXLEN', '~', 10000, '*', kinds and kinds[id] or kind, id)
        seen = true
      end
      if names and not MOVES[kind] then
        over[#over + 1] = id
        for channel in string.gmatch(names, '[^ !]+') do
          told[channel] = told[channel] or {awaited}
          table.insert(told[channel], id)
        end
      end
    end
    if #over > 0 then redis.call('HDEL', awaited, unpack(over)) end
  end
  if seen then redis.call('PEXPIRE', events, 600000) end
  for channel, words in pairs(told) do redis.pcall('PUBLISH', channel, table.concat(words, ' ')) end -- an ACL may forbid it
end
