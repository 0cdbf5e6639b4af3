#!lua flags=allow-oom
-- agree: which version of the keys is used under this prefix; who comes first writes it down
-- KEYS schema
-- ARGV version
-- Sent twice: the same. Reply the version in force.
redis.call('SETNX', KEYS[1], ARGV[1])
return redis.call('GET', KEYS[1])
