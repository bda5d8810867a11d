local function depth(key) return type_of(key) == 'list' and redis.call('LLEN', key) or 0 end

local counts, in_flight, rescued = {}, 0, 0
local workers = type_of(registry) == 'set' and redis.call('SMEMBERS', registry) or {}
for i, queue in ipairs(queues) do
  counts[i] = 0
  for j = 4 * i - 3, 4 * i do counts[i] = counts[i] + depth(KEYS[j]) end
  rescued = rescued + depth(recovered(queue))
  for _, worker in ipairs(workers) do in_flight = in_flight + depth(inflight(worker, queue)) end
end
table.insert(counts, in_flight)
table.insert(counts, rescued)
return counts
