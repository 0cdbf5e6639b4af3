-- n values of a list from position `from`
local function slice(list, from, n)
  local part = {}
  for i = 1, n do part[i] = list[from + i - 1] end
  return part
end
