#!lua flags=allow-oom
-- flow_cancel: no further job of a workflow begins; those under way are cancelled one by one (cancel.lua) by who asked
-- KEYS {q}:flow:<id> {q}:flow:<id>:states
-- ARGV none
-- Sent twice: the same. Reply the letters of its nodes; nothing when it has ended or is unknown.
if redis.call('HGET', KEYS[1], 'state') ~= 'running' then return false end
redis.call('HSET', KEYS[1], 'stop', 1)
return redis.call('GET', KEYS[2])
