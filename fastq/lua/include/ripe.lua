-- the numbers of a list like `3,7-9`
local function numbers_of(list)
  local numbers = {}
  for first, last in string.gmatch(list or '', '(%d+)%-?(%d*)') do
    for n = tonumber(first), tonumber(last) or tonumber(first) do numbers[#numbers + 1] = n end
  end
  return numbers
end

-- the jobs that may begin now that the nodes of this wave are done; gathers on the way pass it on at once
local function ripe_after(flow, wave)
  local states, ripe = flow .. ':states', {}
  while #wave > 0 do
    local fields, order, times = {}, {}, {}
    for i, node in ipairs(wave) do fields[i] = 'c' .. node end
    for from = 1, #fields, 5000 do
      for _, list in ipairs(redis.call('HMGET', flow, unpack(fields, from, math.min(from + 4999, #fields)))) do
        for _, child in ipairs(numbers_of(list)) do
          if not times[child] then order[#order + 1] = child end
          times[child] = (times[child] or 0) + 1
        end
      end
    end
    wave = {}
    local letters = #order > 20 and redis.call('GET', states) -- one command instead of many
    for _, child in ipairs(order) do
      local state = letters and string.sub(letters, child + 1, child + 1) or redis.call('GETRANGE', states, child, child)
      if state == 'w' then
        ripe[#ripe + 1] = child
      elseif state == 'g' and redis.call('HINCRBY', flow, 'p' .. child, -times[child]) == 0 then
        redis.call('SETRANGE', states, child, 'G')
        wave[#wave + 1] = child
      end
    end
  end
  return ripe
end
