#!lua flags=allow-oom
-- flow_unfold: of a workflow with more ripe nodes than one call may begin, the next ones begin; without this call, workers do it
-- KEYS {q}:groups {q}:flow:<id>
-- ARGV id
-- Sent twice: the next two parts. Reply 1 when there is more, else 0.
--- @include "now"
--- @include "number"
--- @include "add"
--- @include "wake"
--- @include "tell"
--- @include "flows"
--- @include "begin"
--- @include "unfold"
--- @include "unfold_more"
if redis.call('HEXISTS', KEYS[2], 'later') == 0 then return 0 end
return unfold_more(KEYS[1], now_ms(), ARGV[1])
