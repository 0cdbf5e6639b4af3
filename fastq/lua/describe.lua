#!lua flags=allow-oom
-- describe: what a worker says of itself has changed
-- KEYS {q}:workers {q}:info
-- ARGV worker info
-- Sent twice: the same state. Reply 1 done, 0 it has no lease here any more, and nobody would remove what it says.
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return 1
