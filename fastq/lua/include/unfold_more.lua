-- go on with what an earlier call has left of a workflow; 1 when there is still more
local function unfold_more(groups, now, id)
  local flow = base_of(groups) .. 'flow:' .. id
  local later = redis.call('HGET', flow, 'later')
  if not later then
    redis.call('SREM', base_of(groups) .. 'unfolding', id)
    return 0
  end
  local begun, rest = unfold(groups, flow, id, later)
  count_flow(groups, now, flow, id, begun, 0, later, rest)
  return rest ~= '' and 1 or 0
end
