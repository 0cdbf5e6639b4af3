-- count in a hash, whose field a foreign writer may have spoilt: the count begins anew then, and the script goes on
local function add(key, field, n)
  local sum = redis.pcall('HINCRBY', key, field, n)
  if type(sum) == 'number' then return sum end
  redis.call('HSET', key, field, n)
  return n
end
