-- these jobs have ended: kinds[id] is 'failed' or 'cancelled', from position `from` on, `said`
-- has id, result of those that have succeeded (a success without is a job that ended before it ran)
local function flows_go_on(groups, now, ids, kinds, said, from)
  local flows, outputs = {}, {}
  for i = from, #said, 2 do outputs[said[i]] = said[i + 1] end
  for _, job in ipairs(ids) do
    local id, node
    if string.byte(job, 25) == 46 then id, node = string.match(job, '^(%x+)%.(%d+)$') end -- a dot behind 24 digits
    local flow = id and #node < 8 and base_of(groups) .. 'flow:' .. id
    if flow and redis.call('GETRANGE', flow .. ':states', node, node) == 'a' then
      flows[id] = flows[id] or {flow = flow, ended = 0, good = {}, bad = {}, results = {}}
      local f, good = flows[id], outputs[job] and not kinds[job]
      redis.call('SETRANGE', flow .. ':states', node, good and 's' or kinds[job] == 'failed' and 'f' or 'c')
      f.ended = f.ended + 1
      table.insert(good and f.good or f.bad, node)
      if good then
        table.insert(f.results, 'r' .. node)
        table.insert(f.results, outputs[job])
      end
    end
  end
  for id, f in pairs(flows) do
    many('HSET', f.flow, f.results)
    local known = redis.call('HMGET', f.flow, 'policy', 'stop')
    if #f.bad > 0 then redis.call('HINCRBY', f.flow, 'bad', #f.bad) end
    if known[1] ~= 'fail' then
      for _, node in ipairs(f.bad) do table.insert(f.good, node) end
    end
    local begun = known[2] and 0 or begin(groups, f.flow, id, ripe_after(f.flow, f.good))
    count_flow(groups, now, f.flow, id, begun, f.ended)
  end
end
