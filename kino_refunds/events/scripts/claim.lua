local limit, max_bytes, alive_ms = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local recovered_next = ARGV[5] == '1'

local again, rescued = 0, nil
for _, queue in ipairs(queues) do
  if redis.call('EXISTS', inflight(me, queue)) == 1 then again = 1 end
  if not rescued and redis.call('EXISTS', recovered(queue)) == 1 then rescued = queue end
end

local sources, some, skipped = {}, false, {}
for i, key in ipairs(KEYS) do
  local queue = math.ceil(i / 4)
  sources[queue] = sources[queue] or {}
  local found = type_of(key)
  if found == 'list' then
    table.insert(sources[queue], key)
    some = true
  elseif found ~= 'none' then
    table.insert(skipped, key)
  end
end

if again == 0 and not some and not rescued then return {'', 0, 0, skipped, {{}, {}, {}, {}}} end

say_alive(alive_ms)

local function new_token(tail)
  local time = redis.call('TIME')
  token = time[1] .. string.format('%06d', time[2]) .. tail
  redis.call('SET', token_of(me), token)
end

-- Move at most so many messages and bytes from one base queue, within what is left for the batch. It reads a message
-- before it moves it: a message that does not fit stays on its queue.
local count, bytes = 0, 0
local function take(queue, most, most_bytes)
  local taken, taken_bytes = 0, 0
  for _, key in ipairs(sources[queue]) do
    while taken < most and count < limit do
      local message = redis.call('LINDEX', key, -1)
      if not message then break end
      if count > 0 and bytes + #message > max_bytes then return end
      if taken > 0 and taken_bytes + #message > most_bytes then return end
      redis.call('LMOVE', key, inflight(me, queues[queue]), 'RIGHT', 'LEFT')
      count, bytes = count + 1, bytes + #message
      taken, taken_bytes = taken + 1, taken_bytes + #message
    end
  end
end

if again == 1 then
  -- A batch whose token was deleted gets a new one, which no longer says that the message was alone.
  if not token or not token:match('^%d+:?%a*$') then new_token('') end
elseif rescued and (recovered_next or not some) then
  redis.call('LMOVE', recovered(rescued), inflight(me, rescued), 'RIGHT', 'LEFT')
  new_token(':alone')
else
  local share = math.max(1, math.floor(limit / 10))
  for queue in ipairs(queues) do take(queue, share, max_bytes / 10) end
  for queue in ipairs(queues) do take(queue, limit, max_bytes) end
  new_token('')
end

local crashed, lists = 0, {}
for i, queue in ipairs(queues) do
  lists[i] = redis.call('LRANGE', inflight(me, queue), 0, -1)
  if is_alone(token) and lists[i][1] then
    crashed = tonumber(redis.call('GET', crashes(lists[i][1])) or 0) or 0
  end
end
return {token, again, crashed, skipped, lists}
