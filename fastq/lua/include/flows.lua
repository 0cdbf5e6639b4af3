-- workflows go on: what happens when jobs of theirs have ended. The id of such a job is `<workflow>.<node>`, so jobs of no
-- workflow cost one pattern match each, and nothing at all while `groups` is empty. Everything lies in the queue's own slot.
-- `{q}:flow:<id>`: policy, ttl, open (jobs under way), bad, stop, state; of node n: c<n> its children (`3,7-9`),
-- e<n> the envelope until it begins, p<n> how many parents a gather still waits for, r<n> what it returned
-- `{q}:flow:<id>:states`: a letter per node, w g a s f c G (broker/keys.py); a job counts once because its letter is set once
local function base_of(groups) return string.sub(groups, 1, -7) end -- without its last word

-- these nodes become pending jobs; how many
local function begin(groups, flow, id, nodes)
  local base, begun = base_of(groups), 0
  for from = 1, #nodes, 2000 do
    local fields, stored, lists, run, next_to = {}, {}, {}, 0, false
    for i = from, math.min(from + 1999, #nodes) do fields[#fields + 1] = 'e' .. nodes[i] end
    for i, envelope in ipairs(redis.call('HMGET', flow, unpack(fields))) do
      local node = nodes[from + i - 1]
      if envelope then
        local priority = math.min(string.byte(envelope, 2) or 5, 10)
        lists[priority] = lists[priority] or {}
        local job, list = id .. '.' .. node, lists[priority]
        list[#list + 1] = job
        stored[#stored + 1], stored[#stored + 2] = job, envelope
        if next_to and tonumber(node) == next_to then -- a run of neighbours is one write
          run = run + 1
        else
          if run > 0 then redis.call('SETRANGE', flow .. ':states', next_to - run, string.rep('a', run)) end
          run = 1
        end
        next_to, begun = node + 1, begun + 1
      end
    end
    if run > 0 then redis.call('SETRANGE', flow .. ':states', next_to - run, string.rep('a', run)) end
    if #stored > 0 then redis.call('HSET', base .. 'jobs', unpack(stored)) end
    redis.call('HDEL', flow, unpack(fields))
    for priority, ids in pairs(lists) do redis.call('RPUSH', base .. 'ready:' .. priority, unpack(ids)) end
  end
  if begun > 0 then wake(base .. 'wake') end
  return begun
end

-- nothing of it is under way, so nothing more will be: its end is written down, once, and told to whom it concerns
local function close_flow(groups, now, flow, id)
  local base, state = base_of(groups), 'success'
  local f = redis.call('HMGET', flow, 'stop', 'bad', 'policy', 'ttl', 'failure')
  if f[1] then
    state = 'cancelled'
  elseif tonumber(f[2] or 0) > 0 and f[3] ~= 'ignore' then
    state = 'failed'
  end
  redis.call('HSET', flow, 'state', state, 'finished', now)
  redis.call('ZREM', groups, id)
  redis.call('PEXPIRE', flow, f[4])
  redis.call('PEXPIRE', flow .. ':states', f[4])
  if state == 'failed' and f[5] and redis.call('HSETNX', base .. 'jobs', id .. '.failure', f[5]) == 1 then
    redis.call('RPUSH', base .. 'ready:' .. math.min(string.byte(f[5], 2) or 5, 10), id .. '.failure')
    wake(base .. 'wake')
  end
  if redis.call('HLEN', base .. 'awaited') > 0 then
    tell(base .. 'awaited', base .. 'events', now, state == 'success' and 'succeeded' or state, {id})
  end
end

-- `begun` more jobs of a flow are under way, and `ended` fewer
local function count_flow(groups, now, flow, id, begun, ended)
  if redis.call('HINCRBY', flow, 'open', begun - ended) == 0 then close_flow(groups, now, flow, id) end
end
