-- jobs of batches have ended; ends: batch id -> {n, 1 | 2 | 3, n, 1 | 2 | 3 ...}
local NAMES_OF_ENDS = {'success', 'failed', 'cancelled'}

local function batches_go_on(groups, now, ends)
  for id, list in pairs(ends) do
    local batch, counts = string.sub(groups, 1, -7) .. 'batch:' .. id, {0, 0, 0}
    if redis.call('HEXISTS', batch, 'state') == 1 then
      for from = 1, #list, 2000 do
        local words, mend = {}, {}
        for i = from, math.min(from + 1999, #list), 2 do
          local at = 2 * (i - from)
          words[at + 1], words[at + 2], words[at + 3], words[at + 4] = 'SET', 'u2', '#' .. list[i], list[i + 1]
        end
        for i, before in ipairs(redis.call('BITFIELD', batch .. ':ends', unpack(words))) do
          if before == 0 then
            counts[words[4 * i]] = counts[words[4 * i]] + 1
          else -- it was counted before: as what it was then
            for _, word in ipairs({'SET', 'u2', words[4 * i - 1], before}) do mend[#mend + 1] = word end
          end
        end
        if #mend > 0 then redis.call('BITFIELD', batch .. ':ends', unpack(mend)) end
      end
      for code, count in ipairs(counts) do
        if count > 0 then redis.call('HINCRBY', batch, NAMES_OF_ENDS[code], count) end
      end
      end_batch(groups, now, batch, id)
    end
  end
end
