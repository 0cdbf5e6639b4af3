-- what goes with a job: its unique key, notes under its id, and its dead letter
local function check_unique(id, hint, there)
  local key, other = redis.call('HGET', unique_of, id), string.match(hint, '^key:(.*)$')
  if there and key then
    local holder = redis.call('HGET', unique, key)
    if holder ~= id then
      fault('unique', key, function()
        if holder then release_unique(unique, unique_of, {id}) else redis.call('HSET', unique, key, id) end
      end)
    end
  end
  if other and other ~= key and redis.call('HGET', unique, other) == id then
    fault('stray', 'unique', function()
      if there and not key then
        redis.call('HSET', unique_of, id, other)
      else
        redis.call('HDEL', unique, other)
      end
    end)
  end
  if not key and redis.call('HEXISTS', unique_start, id) == 1 then
    fault('stray', 'unique:start', function() redis.call('HDEL', unique_start, id) end)
  end
end

local function check_strays(id)
  if redis.call('HEXISTS', unique_of, id) == 1 then
    fault('stray', 'unique:of', function() release_unique(unique, unique_of, {id}) end)
  end
  for _, key in ipairs({deliveries, cancels, awaited}) do
    if redis.call('HEXISTS', key, id) == 1 then
      fault('stray', string.sub(key, #base + 1), function() redis.call('HDEL', key, id) end)
    end
  end
end

local function check_letter(id, there)
  local died = redis.call('ZSCORE', dead, id)
  local envelope, failure = redis.call('HEXISTS', dead_jobs, id) == 1, redis.call('HEXISTS', dead_errors, id) == 1
  if died and there then fault('twice', 'jobs dead') end
  if died and not envelope then fault('letter', 'dead:jobs') end
  if died and not failure then
    fault('letter', 'dead:errors', function() redis.call('HSET', dead_errors, id, '') end)
  end
  if not died and envelope then
    fault('letter', 'dead', function() redis.call('ZADD', dead, now_ms(), id) end)
  elseif not died and failure then
    fault('stray', 'dead:errors', function() redis.call('HDEL', dead_errors, id) end)
  end
end
