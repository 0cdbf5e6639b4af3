-- workflows go on: what happens when jobs of theirs have ended. The id of such a job is `<workflow>.<node>`, so jobs of no
-- workflow cost one pattern match each, and nothing at all while `groups` is empty. Everything lies in the queue's own slot.
-- `{q}:flow:<id>`: policy, ttl, open (jobs under way), bad, stop, state; later: nodes that a parent has freed and no call has
-- looked at yet; of node n: c<n> its children (`3,7-9,20-40/2`), e<n> the envelope until it begins, p<n> how many parents a
-- gather still waits for, r<n> what it returned
-- `{q}:flow:<id>:states`: a letter per node, w g a s f c G (broker/keys.py); a job counts once because its letter is set once
local function base_of(groups) return string.sub(groups, 1, -7) end -- without its last word

-- nothing of it is under way, so nothing more will be: its end is written down, once, and told to whom it concerns
local function close_flow(groups, now, flow, id)
  local base, state = base_of(groups), 'success'
  local f = redis.call('HMGET', flow, 'stop', 'bad', 'policy', 'ttl', 'failure')
  if f[1] then
    state = 'cancelled'
  elseif number(f[2]) > 0 and f[3] ~= 'ignore' then
    state = 'failed'
  end
  redis.call('HSET', flow, 'state', state, 'finished', now)
  redis.call('ZREM', groups, id)
  local ttl = math.min(math.max(1000, math.floor(number(f[4], 3600000))), 1e13)
  redis.call('PEXPIRE', flow, ttl)
  redis.call('PEXPIRE', flow .. ':states', ttl)
  if state == 'failed' and f[5] and redis.call('HSETNX', base .. 'jobs', id .. '.failure', f[5]) == 1 then
    redis.call('RPUSH', base .. 'ready:' .. math.min(string.byte(f[5], 2) or 5, 10), id .. '.failure')
    wake(base .. 'wake')
  end
  if redis.call('HLEN', base .. 'awaited') > 0 then
    tell(base .. 'awaited', base .. 'events', now, state == 'success' and 'succeeded' or state, {id})
  end
end

-- `ended` jobs of a flow are no longer under way, `begun` more are, and the nodes `later` are left for another call: the end of
-- any job of it, a worker that finds nothing else to do (reserve.lua), or whoever has started it (flow_unfold.lua);
-- `before`: what was left until now
local function count_flow(groups, now, flow, id, begun, ended, before, later)
  local base, open = base_of(groups), 1
  if begun ~= ended or begun == 0 then open = add(flow, 'open', begun - ended) end
  if later ~= '' then
    redis.call('HSET', flow, 'later', later)
    redis.call('SADD', base .. 'unfolding', id)
    wake(base .. 'wake')
  elseif before then
    redis.call('HDEL', flow, 'later')
    redis.call('SREM', base .. 'unfolding', id)
  end
  if later == '' and open == 0 then close_flow(groups, now, flow, id) end
end
