#!lua flags=allow-oom
-- revise: the schedules of a queue have changed; schedulers read them anew
-- KEYS schedules
-- ARGV queue
-- Sent twice: counted twice, which is one look more. Reply the count.
return redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
