-- the last runs of a schedule, newest first: one line each, `tick_ms id at_ms state`
local MOST_RUNS = 20

local function runs_of(key, name)
  local lines = {}
  for tick, id, at, state in string.gmatch(redis.call('HGET', key, name) or '', '(%d+) (%S+) (%d+) (%S+)') do
    lines[#lines + 1] = {tick = tick, id = id, at = at, state = state}
  end
  return lines
end

-- write them back; the oldest one that has ended makes room first: a job that lives must stay known
local function keep_runs(key, name, lines)
  while #lines > MOST_RUNS do
    local gone = #lines
    for i = #lines, 2, -1 do
      if lines[i].state ~= 'open' then
        gone = i
        break
      end
    end
    table.remove(lines, gone)
  end
  local text = {}
  for i, run in ipairs(lines) do text[i] = table.concat({run.tick, run.id, run.at, run.state}, ' ') end
  redis.call('HSET', key, name, table.concat(text, '\n'))
end
