-- The newest first, each onto the tail: the oldest is then the next to be claimed. What was recovered goes
-- back to be claimed alone again, and so does what came by a queue whose key can no longer hold it.
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
