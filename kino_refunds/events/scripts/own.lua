-- For the scripts of one worker, ARGV[1]: if a key that it owns has the wrong type, nothing is written.

local me = ARGV[1]

-- The crash counter of a message, or of one of its elements.
local function crashes(message, element)
  return 'kino:crashes:' .. redis.sha1hex(message) .. (element and ':' .. element or '')
end
local function is_alone(token) return token and token:sub(-6) == ':alone' end

-- The token as its worker knows it, and the index of the element in work.
local function read_token(worker)
  local held = redis.call('GET', token_of(worker))
  if not held then return held end
  return held:gsub(':%d+:alone$', ':alone'), held:match(':(%d+):alone$')
end

-- A key of these that exists and has the wrong type, and the type that it has.
local function foreign(types)
  for key, wanted in pairs(types) do
    local found = type_of(key)
    if found ~= wanted and found ~= 'none' then return key, found end
  end
end

local function owned_by(worker)
  local types = {[alive(worker)] = 'string', [token_of(worker)] = 'string'}
  local element = type_of(token_of(worker)) == 'string' and select(2, read_token(worker))
  for _, queue in ipairs(queues) do
    types[inflight(worker, queue)] = 'list'
    -- A message that is alone in flight has a crash counter, and so has its element in work.
    if type_of(inflight(worker, queue)) == 'list' then
      local message = redis.call('LINDEX', inflight(worker, queue), -1)
      types[crashes(message)] = 'string'
      if element then types[crashes(message, element)] = 'string' end
    end
  end
  return types
end

local types = owned_by(me)
types[registry] = 'set'
for _, queue in ipairs(queues) do
  types[recovered(queue)] = 'list'
  if type_of(recovered(queue)) == 'list' then
    types[crashes(redis.call('LINDEX', recovered(queue), -1))] = 'string'
  end
end
local key, found = foreign(types)
if key then return redis.error_reply('WRONG TYPE ' .. key .. ' holds a ' .. found) end

local token, element = read_token(me)

local function say_alive(alive_ms)
  redis.call('DEL', alive(me))
  redis.call('SET', alive(me), '1', 'PX', alive_ms)
  redis.call('SADD', registry, me)
end
