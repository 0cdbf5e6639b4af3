-- jobs of one workflow have ended: `jobs` has the id and the node of each, as text
local function flow_goes_on(groups, now, id, jobs, kinds, outputs)
  local flow, ended = base_of(groups) .. 'flow:' .. id, 0
  local states, by, results, freeing = flow .. ':states', {s = {}, f = {}, c = {}}, {}, {}
  local letters, counted = #jobs > 40 and redis.call('GET', states), {} -- one command instead of many
  local policy, stop, later = unpack(redis.call('HMGET', flow, 'policy', 'stop', 'later'))
  for i = 1, #jobs, 2 do
    local job, text, node = jobs[i], jobs[i + 1], tonumber(jobs[i + 1])
    local letter = letters and string.byte(letters, node + 1) or string.byte(redis.call('GETRANGE', states, node, node))
    if letter == 97 and not counted[node] then -- 'a': it counts once
      local output = not kinds[job] and outputs[job] ~= '' and outputs[job]
      local those = by[output and 's' or kinds[job] == 'failed' and 'f' or 'c']
      those[#those + 1], counted[node], ended = node, true, ended + 1
      if output then results[#results + 1], results[#results + 2] = 'r' .. text, output end
      if output or policy ~= 'fail' then freeing[#freeing + 1] = 'c' .. text end
    end
  end
  if ended == 0 then return end
  for letter, those in pairs(by) do
    if #those > 0 then letters_of(states, those, letter) end
  end
  many('HSET', flow, results)
  if ended > #by.s then add(flow, 'bad', ended - #by.s) end
  local begun, list = 0, stop and '' or freed_by(flow, freeing, later)
  if list ~= '' then begun, list = unfold(groups, flow, id, list) end
  count_flow(groups, now, flow, id, begun, ended, later, list)
end

-- these jobs have ended: kinds[id] is 'failed' or 'cancelled', from position `from` on, `said`
-- has id, result of jobs of workflows that have succeeded, and an empty result of a job that ended before it ran, without a
-- record; an empty `said`: none of them has run
local function flows_go_on(groups, now, ids, kinds, said, from)
  local outputs, flows, batches = {}, {}, nil
  for i = from, #said, 2 do outputs[said[i]] = said[i + 1] end
  for _, job in ipairs(ids) do
    local mark, id, n = string.byte(job, 25) -- behind 24 digits: a dot, or a dash
    if mark == 46 then
      id, n = string.match(job, '^(%x+)%.(%d+)$')
      if id and #n < 8 then
        local jobs = flows[id] or {}
        flows[id], jobs[#jobs + 1], jobs[#jobs + 2] = jobs, job, n
      end
    elseif mark == 45 then
      id = string.sub(job, 1, 24)
      batches = batches or {}
      local members = batches[id] or {}
      batches[id], members[#members + 1] = members, job
    end
  end
  for id, jobs in pairs(flows) do flow_goes_on(groups, now, id, jobs, kinds, outputs) end
  for id, jobs in pairs(batches or {}) do batch_goes_on(groups, now, id, jobs, kinds, #said > 0 and outputs) end
end
