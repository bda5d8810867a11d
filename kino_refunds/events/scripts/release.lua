-- The newest first, each onto the tail: the oldest is then claimed next. A recovered message goes back to the recovered
-- list, to be claimed alone again; so does a message whose queue key has another type by now.
if token ~= ARGV[2] then return 0 end

redis.call('DEL', token_of(me))
local count = 0
for _, queue in ipairs(queues) do
  local held = type_of(queue)
  local back = queue
  if is_alone(token) or (held ~= 'list' and held ~= 'none') then back = recovered(queue) end
  while redis.call('LMOVE', inflight(me, queue), back, 'LEFT', 'RIGHT') do count = count + 1 end
end
return count
