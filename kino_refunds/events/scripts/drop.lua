if token ~= ARGV[2] then return 0 end

redis.call('DEL', token_of(me))
for _, queue in ipairs(queues) do
  local message = is_alone(token) and redis.call('LINDEX', inflight(me, queue), -1)
  if message then
    redis.call('DEL', crashes(message))
    for index = 0, ARGV[3] - 1 do redis.call('DEL', crashes(message, index)) end
  end
  redis.call('DEL', inflight(me, queue))
end
return 1
