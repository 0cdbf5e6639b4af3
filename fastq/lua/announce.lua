#!lua flags=allow-oom
-- announce: let everybody know of queues; jobs that are there have to be drained, so a full Redis refuses it to nobody
-- KEYS queues
-- ARGV queue ...
-- Sent twice: the same state. Reply how many were new.
return redis.call('SADD', KEYS[1], unpack(ARGV))
