-- the answers to check.lua and mend.lua, a function for each kind of row
local function check_places(id, hint, there)
  local places, holders = places_of(id, hint, there)
  if there and #places == 0 then
    if how == 'look' then
      found[#found + 1] = {'ready', '', 0}
    else
      fault('lost', '', function()
        redis.call('LPUSH', ready_list(redis.call('HGET', jobs, id), KEYS, LEVELS), id)
        wake(wake_list)
      end)
    end
  elseif #places > (there and 1 or 0) then
    local names = {}
    for i, place in ipairs(places) do names[i] = place[1] end
    fault(there and 'twice' or 'empty', table.concat(names, ' '), holders < 2 and function()
      for i = #places, there and 2 or 1, -1 do places[i][2]() end
    end or nil)
  end
  if there and holders == 0 and redis.call('HEXISTS', cancels, id) == 1 then fault('stray', 'cancels') end
end

local checks = {}

function checks.job(id, hint)
  local there = redis.call('HEXISTS', jobs, id) == 1
  check_places(id, hint, there)
  check_unique(id, hint, there)
  if not there then check_strays(id) end
  check_letter(id, there)
end

function checks.limit(name)
  local jobs_wait = redis.call('EXISTS', parked .. ':by:' .. name) == 1
  local watched = redis.call('ZSCORE', parked, name)
  if jobs_wait and not watched then
    fault('limit', 'nobody looks after it', function() redis.call('ZADD', parked, now_ms(), name) end)
  elseif watched and not jobs_wait then
    fault('stray', 'parked', function() redis.call('ZREM', parked, name) end)
  end
end

-- a set without a lease gets one that has run out: the scheduler hands its jobs back as those of any dead worker
function checks.worker(name)
  local key = base .. 'running:' .. name
  local leased, holds = redis.call('ZSCORE', workers, name), redis.call('EXISTS', key) == 1
  if holds and not leased then
    fault('orphan', redis.call('SCARD', key) - redis.call('SISMEMBER', key, pad) .. ' jobs', function()
      redis.call('ZADD', workers, 1, name)
      redis.call('SADD', key, pad)
    end)
  elseif leased and redis.call('SISMEMBER', key, pad) == 0 then
    fault('pad', 'running', function() redis.call('SADD', key, pad) end)
  end
  if not leased and not holds and redis.call('HEXISTS', info, name) == 1 then
    fault('stray', 'info', function() redis.call('HDEL', info, name) end)
  end
end

function checks.pad()
  local wanted, there = redis.call('ZCARD', workers) > 0, redis.call('HEXISTS', jobs, pad) == 1
  if wanted and not there then
    fault('pad', 'jobs', function() redis.call('HSET', jobs, pad, '') end)
  elseif there and not wanted then
    fault('stray', 'jobs', function() redis.call('HDEL', jobs, pad) end)
  end
end

local function check_rows()
  local reply = {}
  for i = ROWS, #ARGV, 3 do
    found = {}
    checks[ARGV[i]](ARGV[i + 1], ARGV[i + 2])
    reply[#reply + 1] = found
  end
  return reply
end
