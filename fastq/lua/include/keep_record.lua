-- keep the record of a job that was cancelled, in the bucket of its lifetime (keys.bucket_of); ttl 0: leave no trace
local function keep_record(done, now, ttl, id, record)
  if ttl < 1 then return end
  local lives = math.max(1000, ttl)
  local width = math.max(250, math.floor(lives / 4))
  local nth = math.floor(now / width)
  local name, expires = string.format('%d:%d', lives, nth), (nth + 1) * width + lives
  redis.call('HSET', done .. ':' .. name, id, record)
  redis.call('PEXPIREAT', done .. ':' .. name, expires)
  redis.call('ZADD', done, expires, name)
end
