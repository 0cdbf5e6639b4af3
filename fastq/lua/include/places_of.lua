-- places[1] is the one that stays when there are several: who runs it, then the ready lists, the due set, the parking
local function places_of(id, hint, there)
  local places, holders = {}, 0
  for _, worker in ipairs(holders_of_jobs) do
    local key = base .. 'running:' .. worker
    if redis.call('SISMEMBER', key, id) == 1 then
      holders = holders + 1
      places[#places + 1] = {'running:' .. worker, function() redis.call('SREM', key, id) end}
    end
  end
  if how ~= 'look' then
    local lists, entries, skipped = {}, 0, number(redis.call('HGET', ghosts, id))
    for i = LEVELS, #KEYS do
      local count = #redis.call('LPOS', KEYS[i], id, 'COUNT', 0)
      for _ = 1, count do lists[#lists + 1] = KEYS[i] end
      entries = entries + count
    end
    if skipped > entries then
      fault('ghost', skipped .. ' for ' .. entries, function()
        redis.call('HDEL', ghosts, id)
        if entries > 0 then redis.call('HSET', ghosts, id, entries) end
      end)
    end
    for i = skipped + 1, entries do -- reserve.lua skips the first ones
      places[#places + 1] = {string.sub(lists[i], #base + 1), function() redis.call('LREM', lists[i], -1, id) end}
    end
  end
  if redis.call('ZSCORE', due, id) then places[#places + 1] = {'due', function() redis.call('ZREM', due, id) end} end
  local limit, other = redis.call('HGET', parked_of, id), string.match(hint, '^by:(.+)$')
  if limit and redis.call('ZSCORE', parked .. ':by:' .. limit, id) then
    places[#places + 1] = {'parked:by:' .. limit, function() unpark_one(parked, parked_of, id) end}
  elseif limit then
    fault('stray', 'parked:of', function() redis.call('HDEL', parked_of, id) end)
  end
  if other and other ~= limit and redis.call('ZSCORE', parked .. ':by:' .. other, id) then
    local alone = there and #places == 0 -- it waits there, and only the note of it is missing
    fault('stray', 'parked:by:' .. other, function()
      if alone then
        redis.call('HSET', parked_of, id, other)
      else
        redis.call('ZREM', parked .. ':by:' .. other, id)
      end
    end)
    if alone and how ~= 'look' then places[1] = {'parked:by:' .. other} end
  end
  return places, holders
end
