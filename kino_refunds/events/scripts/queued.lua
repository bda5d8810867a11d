-- Read in small pieces, so that the caps are exceeded by little.
local limit, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local complete, unreadable, lists, count, bytes = 1, {}, {}, 0, 0

local function read(key, into)
  local held = type_of(key)
  if held == 'none' then return end
  if held ~= 'list' then
    complete = 0
    table.insert(unreadable, key)
    return
  end
  local length, at = redis.call('LLEN', key), 0
  while at < length do
    if count >= limit or bytes >= max_bytes then
      complete = 0
      return
    end
    local step = math.min(16, limit - count, length - at)
    local piece = redis.call('LRANGE', key, -at - step, -at - 1)
    for i = step, 1, -1 do
      table.insert(into, piece[i])
      bytes = bytes + #piece[i]
    end
    at, count = at + step, count + step
  end
end

local workers = {}
local held = type_of(registry)
if held == 'set' then
  workers = redis.call('SMEMBERS', registry)
elseif held ~= 'none' then
  complete = 0
  table.insert(unreadable, registry)
end

for i, queue in ipairs(queues) do
  lists[i] = {}
  for j = 4 * i - 3, 4 * i do read(KEYS[j], lists[i]) end
  read(recovered(queue), lists[i])
  for _, worker in ipairs(workers) do read(inflight(worker, queue), lists[i]) end
end
return {complete, unreadable, lists}
