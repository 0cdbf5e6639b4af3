-- these nodes get a letter, in order: a run of neighbours is one write
local function letters_of(states, nodes, letter)
  local first, last = nodes[1], nodes[1]
  for i = 2, #nodes + 1 do
    if nodes[i] ~= last + 1 then
      redis.call('SETRANGE', states, first, string.rep(letter, last - first + 1))
      first = nodes[i]
    end
    last = nodes[i]
  end
end

-- these nodes become pending jobs, as far as 1 MiB of envelopes goes; how many do, and which do not
local function begin(groups, flow, id, nodes)
  local base, begun, size, lists, rest = base_of(groups), {}, 0, {}, {}
  for from = 1, #nodes, 50 do
    local fields, stored = {}, {}
    for i = from, math.min(from + 49, #nodes) do
      if size > 1048576 then rest[#rest + 1] = nodes[i] else fields[#fields + 1] = 'e' .. nodes[i] end
    end
    for i, envelope in ipairs(#fields > 0 and redis.call('HMGET', flow, unpack(fields)) or {}) do
      if envelope then
        local node, priority = nodes[from + i - 1], math.min(string.byte(envelope, 2) or 5, 10)
        local job = id .. '.' .. node
        lists[priority] = lists[priority] or {}
        table.insert(lists[priority], job)
        stored[#stored + 1], stored[#stored + 2] = job, envelope
        begun[#begun + 1], size = node, size + #envelope
      end
    end
    if #stored > 0 then
      redis.call('HSET', base .. 'jobs', unpack(stored))
      redis.call('HDEL', flow, unpack(fields))
    end
  end
  for priority, ids in pairs(lists) do redis.call('RPUSH', base .. 'ready:' .. priority, unpack(ids)) end
  if #begun > 0 then
    letters_of(flow .. ':states', begun, 'a')
    wake(base .. 'wake')
  end
  return #begun, rest
end
