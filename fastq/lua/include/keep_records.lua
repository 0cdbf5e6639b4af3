-- keep records of jobs that the running set holds in a bucket; `rows` has id record id record ... from `first` to `last`
-- The ids of these jobs, and those that it does not hold. All are held, nearly always: then no table is made of the rows.
local function keep_records(running, jobs, done, bucket, name, expires, rows, first, last)
  local ids, lost = {}, {}
  for i = first, last, 2 do ids[#ids + 1] = rows[i] end
  local owned = held_of(running, ids)
  for i = 1, #ids do
    if owned[i] ~= 1 then lost[#lost + 1] = ids[i] end
  end
  if #lost > 0 then
    local held, mine = {}, {}
    for i, id in ipairs(ids) do
      if owned[i] == 1 then
        mine[#mine + 1] = id
        held[#held + 1], held[#held + 2] = id, rows[first + 2 * i - 1]
      end
    end
    ids, rows, first, last = mine, held, 1, #held
  end
  if #ids == 0 then return ids, lost end
  for i = first, last, 5000 do redis.call('HSET', bucket, unpack(rows, i, math.min(i + 4999, last))) end
  redis.call('PEXPIREAT', bucket, expires)
  redis.call('ZADD', done, expires, name)
  many('SREM', running, ids)
  many('HDEL', jobs, ids)
  return ids, lost
end
