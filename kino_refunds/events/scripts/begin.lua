-- Elements that were settled keep their counts until the drop: after a crash with another element, the worker must still
-- know which one ends workers.
if token ~= ARGV[2] or not is_alone(token) then return -1 end
local counter
for _, queue in ipairs(queues) do
  local message = redis.call('LINDEX', inflight(me, queue), -1)
  if message and ARGV[4] ~= '' then counter = crashes(message, ARGV[4]) end
end
local key, found = foreign(counter and {[counter] = 'string'} or {})
if key then return redis.error_reply('WRONG TYPE ' .. key .. ' holds a ' .. found) end

say_alive(ARGV[3])
redis.call('SET', token_of(me), counter and token:gsub(':alone$', ':' .. ARGV[4] .. ':alone') or token)
return counter and tonumber(redis.call('GET', counter) or 0) or 0
