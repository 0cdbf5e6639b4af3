local MOST_NODES = 10000000 -- of a workflow, as an id has seven digits for them

-- the first nodes of a list like `3*2,7-9,20-40/2`, in order, how often each is named in that part, and the rest of the list
local function first_of(list, most)
  local nodes, times, from, looks = {}, {}, 1, 0
  while from <= #list and #nodes < most and looks < 2000 do
    local first, last, step, count, after = string.match(list, '^,*(%d+)%-?(%d*)/?(%d*)%*?(%d*)()', from)
    if not first then return nodes, times, '' end
    first, step, count = math.min(number(first), MOST_NODES), math.max(number(step, 1), 1), math.min(number(count, 1), MOST_NODES)
    last = math.min(number(last, first), MOST_NODES)
    local stop = math.min(last, first + (most - #nodes - 1) * step)
    for n = first, stop, step do
      if not times[n] then nodes[#nodes + 1] = n end
      times[n] = (times[n] or 0) + count
    end
    from, looks = after + 1, looks + 1
    if stop < last - step + 1 then
      list, from = stop + step .. '-' .. last .. '/' .. step .. '*' .. count .. ',' .. string.sub(list, from), 1
      break
    end
  end
  table.sort(nodes)
  return nodes, times, string.sub(list, from)
end

-- the nodes that lists of children (`c3`, `c7` …) name, behind those of `later`
local function freed_by(flow, fields, later)
  local lists, times = {later or nil}, {}
  for first = 1, #fields, 2000 do
    local children = redis.call('HMGET', flow, unpack(fields, first, math.min(first + 1999, #fields)))
    for _, list in ipairs(children) do
      if list and list ~= '' then
        if not times[list] then lists[#lists + 1] = list end
        times[list] = (times[list] or 0) + 1
      end
    end
  end
  for i = later and 2 or 1, #lists do -- those of a gather have all the same
    local count = times[lists[i]]
    if count > 1 then lists[i] = string.gsub(lists[i], '[^,]+', '%0*' .. count) end
  end
  return table.concat(lists, ',')
end

-- a parent of each node on this list is done: the jobs among them begin, and a gather that waits for nothing more frees its own
-- children. At most so many in one call, about 5 µs each: how many jobs have begun, and the rest of the list
local MOST_UNFOLDED = 250

local function unfold(groups, flow, id, list)
  local states, begun, left = flow .. ':states', 0, MOST_UNFOLDED
  while left > 0 and list ~= '' do
    local nodes, times, rest = first_of(list, left)
    local letters = #nodes > 20 and redis.call('GET', states) -- one command instead of many
    local ripe, done = {}, {}
    for _, node in ipairs(nodes) do
      local letter = letters and string.sub(letters, node + 1, node + 1) or redis.call('GETRANGE', states, node, node)
      if letter == 'w' then
        ripe[#ripe + 1] = node
      elseif letter == 'g' and add(flow, 'p' .. node, -times[node]) == 0 then
        done[#done + 1] = 'c' .. node
        redis.call('SETRANGE', states, node, 'G')
      end
    end
    local more, over = 0, {}
    if #ripe > 0 then more, over = begin(groups, flow, id, ripe) end
    begun, left = begun + more, #over > 0 and 0 or left - math.max(#nodes, 1)
    local lists = {}
    if #over > 0 then lists[1] = table.concat(over, ',') end
    if rest ~= '' then lists[#lists + 1] = rest end
    list = #done > 0 and freed_by(flow, done, #lists > 0 and table.concat(lists, ',')) or table.concat(lists, ',')
  end
  return begun, list
end
