-- whether this entry of a ready list is that of a job which was cancelled while it lay there; each one is met once. A count that is
-- none says nothing: then the entry counts, and a worker finds out whether there is a job
local function is_ghost(ghosts, id)
  if redis.call('HEXISTS', ghosts, id) == 0 then return false end
  local left = redis.pcall('HINCRBY', ghosts, id, -1)
  local was = type(left) == 'number' and left >= 0
  if not was or left < 1 then redis.call('HDEL', ghosts, id) end
  return was
end
