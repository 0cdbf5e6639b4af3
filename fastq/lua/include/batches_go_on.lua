-- jobs of one batch have ended; outputs: as flows_go_on reads them, false: none of them has run
local NAMES_OF_ENDS = {'success', 'failed', 'cancelled'}

-- set two bits for each `n, code` that words has from `SET u2 #n code` on; counts those that had none
local function note_ends(key, words, counts)
  local mend = {}
  for i, before in ipairs(redis.call('BITFIELD', key, unpack(words))) do
    local code = words[4 * i]
    if before == 0 then
      counts[code] = counts[code] + 1
    else -- it was counted before: as what it was then
      for _, word in ipairs({'SET', 'u2', words[4 * i - 1], before}) do mend[#mend + 1] = word end
    end
  end
  if #mend > 0 then redis.call('BITFIELD', key, unpack(mend)) end
end

local function batch_goes_on(groups, now, id, jobs, kinds, outputs)
  local batch, counts = string.sub(groups, 1, -7) .. 'batch:' .. id, {0, 0, 0}
  if redis.call('HEXISTS', batch, 'state') == 0 then return end
  local words, at = {}, 0
  for _, job in ipairs(jobs) do
    if #job < 33 and string.find(job, '^%d+$', 26) then
      local kind = kinds[job]
      local code = kind == 'failed' and 2 or (kind or not outputs or outputs[job] == '') and 3 or 1
      words[at + 1], words[at + 2], words[at + 3], words[at + 4] = 'SET', 'u2', '#' .. string.sub(job, 26), code
      at = at + 4
      if at == 4000 then
        note_ends(batch .. ':ends', words, counts)
        words, at = {}, 0
      end
    end
  end
  if at > 0 then note_ends(batch .. ':ends', words, counts) end
  for code, count in ipairs(counts) do
    if count > 0 then add(batch, NAMES_OF_ENDS[code], count) end
  end
  end_batch(groups, now, batch, id)
end
