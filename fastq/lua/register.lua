#!lua flags=allow-oom
-- register: a worker incarnation begins; it holds nothing yet
-- KEYS {q}:workers {q}:running:<worker> {q}:jobs {q}:info
-- ARGV worker lease_ms pad info
-- Sent twice: the same state. The pad keeps the hot SET and HASH hash tables whatever the server's configuration.
-- Reply now_ms.
--- @include "now"
local now = now_ms()
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('SADD', KEYS[2], ARGV[3])
redis.call('HSETNX', KEYS[3], ARGV[3], '')
redis.call('HSET', KEYS[4], ARGV[1], ARGV[4])
return now
