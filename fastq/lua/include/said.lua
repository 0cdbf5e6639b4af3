-- what a call refused, as text that outlives a lost reply: `position why detail` each; many in a row for want of room are one,
-- with their number as detail. ARGV has 8 words per job from `first`
local function say_again(text, done, first)
  local reply = {1}
  for position, why, detail in string.gmatch(text, '(%d+) (%S+) (%S+)') do
    if why == 'full' then
      for n = position, position + math.min(number(detail), (#ARGV - first + 1) / 8) - 1 do reply[#reply + 1] = {n, why, ''} end
    else
      if detail == '-' then detail = why == 'finished' and find_record(done, ARGV[first + 8 * position] or '') or '' end
      reply[#reply + 1] = {number(position), why, detail}
    end
  end
  return reply
end

local function note_refusal(words, position, why, holder)
  local last = words[#words]
  if why == 'full' and last and last[2] == 'full' and last[1] + last[3] == position then
    last[3] = last[3] + 1
  else
    words[#words + 1] = {position, why, why == 'full' and 1 or holder or '-'}
  end
end

local function said_text(words)
  local lines = {}
  for i, word in ipairs(words) do lines[i] = string.format('%d %s %s', word[1], word[2], word[3]) end
  return table.concat(lines, ' ')
end
