#!lua flags=allow-oom
-- remember: keep the result of one step of a job, unless it is there already
-- KEYS {q}:steps:<id>
-- ARGV step result ttl_ms     (the steps of a job go together, so long after the last one)
-- Sent twice, or by two workers of which one has lost its lease: the first result stays. Reply the result that is kept.
redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return redis.call('HGET', KEYS[1], ARGV[1])
