-- As kombu writes them, for an exchange of the queue's name (kombu.transport.redis, `_queue_bind`): the second set holds
-- the bindings that the end of an expiring queue must not delete.
local separator = string.char(6, 22)
local missing, restored, skipped = {}, {}, {}
for _, queue in ipairs(queues) do
  local member = queue .. separator .. separator .. queue
  for _, prefix in ipairs({'_kombu.binding.', '_kombu.binding_permanent.'}) do
    local key = prefix .. queue
    local members = redis.pcall('SMEMBERS', key)
    if members.err then
      table.insert(skipped, key)
    else
      local found = false
      for _, each in ipairs(members) do found = found or each == member end
      if not found then
        table.insert(missing, {key, member})
        restored[queue] = true
      end
    end
  end
end

if #missing > 0 then
  redis.call('DEL', alive(me))
  redis.call('SET', alive(me), '1', 'PX', ARGV[2])
  redis.call('SADD', registry, me)
  for _, each in ipairs(missing) do redis.call('SADD', each[1], each[2]) end
end

local names = {}
for queue in pairs(restored) do table.insert(names, queue) end
return {names, skipped}
