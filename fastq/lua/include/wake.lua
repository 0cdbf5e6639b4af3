-- leave one token for an idle waiter; whoever takes it passes it on when more is left
local function wake(list)
  if redis.call('LLEN', list) == 0 then redis.call('RPUSH', list, '1') end
end
