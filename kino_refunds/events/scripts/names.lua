-- In every script KEYS are QUEUE_KEYS, so every fourth key is a base queue.

local queues = {}
for i = 1, #KEYS, 4 do queues[#queues + 1] = KEYS[i] end

local registry = 'kino:workers'
local function alive(worker) return 'kino:alive:' .. worker end
local function token_of(worker) return 'kino:token:' .. worker end
local function inflight(worker, queue) return 'kino:inflight:' .. worker .. ':' .. queue end
local function recovered(queue) return 'kino:recovered:' .. queue end

local function type_of(key) return redis.call('TYPE', key).ok end

-- Also in scripts that only read: a primary that was demoted while a connection was open may never catch up with the new
-- one. An idle worker would poll it forever, and the overdue sweep would see empty queues and presume timeouts. At this
-- answer redis-py looks the address up again.
local role = redis.pcall('INFO', 'replication')
if type(role) == 'string' and role:find('role:slave', 1, true) then
  return redis.error_reply('READONLY this server is a replica')
end
