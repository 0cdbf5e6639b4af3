#!lua flags=allow-oom
-- mend: as check.lua, and what needs no guess is mended
-- KEYS {q}:jobs {q}:due {q}:ghosts {q}:workers {q}:unique {q}:unique:of {q}:unique:start {q}:deliveries {q}:cancels
--      {q}:awaited {q}:parked {q}:parked:of {q}:dead {q}:dead:jobs {q}:dead:errors {q}:wake {q}:info {q}:ready:10 ... {q}:ready:0
-- ARGV as check.lua; how is 'mend': the ready lists are searched
-- Sent twice: what is mended is no fault any more.
-- Reply as check.lua, and 2 for what was mended.
--- @include "now"
--- @include "number"
--- @include "wake"
--- @include "ready"
--- @include "unpark_one"
--- @include "release_unique"
--- @include "findings"
--- @include "places_of"
--- @include "belongings"
--- @include "checks"
return check_rows()
