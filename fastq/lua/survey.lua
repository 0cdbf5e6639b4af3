#!lua flags=no-writes
-- survey: the next names in a hash, set, sorted set or list, without their values (an envelope may be large)
-- KEYS {q}:jobs
-- ARGV type cursor count     (or any other key that holds names. cursor '0' begins. A list is read from its end, where jobs are added: what is taken from its
--   front meanwhile is not missed, and what is added is seen twice at most)
-- Read only. Reply {cursor of the next call ('0': the end), {name, ...}}.
local kind, cursor, count = ARGV[1], ARGV[2], tonumber(ARGV[3])
if kind == 'list' then
  local last = tonumber(cursor)
  local names = redis.call('LRANGE', KEYS[1], -last - count, -last - 1)
  return {#names < count and '0' or string.format('%d', last + count), names}
end
local command = kind == 'hash' and 'HSCAN' or kind == 'set' and 'SSCAN' or 'ZSCAN'
local scanned = redis.call(command, KEYS[1], cursor, 'COUNT', count)
if kind == 'set' then return scanned end
local names = {}
for i = 1, #scanned[2], 2 do names[#names + 1] = scanned[2][i] end
return {scanned[1], names}
