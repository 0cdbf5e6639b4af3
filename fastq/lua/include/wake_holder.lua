-- leave one token for a process that waits for a slot; it passes it on when more are free
local function wake_holder(list)
  if redis.call('LLEN', list) == 0 then redis.call('RPUSH', list, '1') end
  redis.call('PEXPIRE', list, 60000)
end
