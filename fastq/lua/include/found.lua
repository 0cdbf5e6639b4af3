-- the record of a finished job, looked up in the newest bucket first
local function find_record(done, id)
  for _, bucket in ipairs(redis.call('ZRANGE', done, 0, -1, 'REV')) do
    local record = redis.call('HGET', done .. ':' .. bucket, id)
    if record then return record end
  end
  return false
end
