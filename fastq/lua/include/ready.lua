-- the ready list of an envelope; levels[1] is priority 10, levels[11] is priority 0; unreadable: NORMAL
local function ready_list(envelope, levels, first)
  local priority = string.byte(envelope, 2) or 5
  if priority > 10 then priority = 5 end
  return levels[first + 10 - priority]
end
