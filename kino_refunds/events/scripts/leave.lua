-- A worker with messages in flight stays registered: without its registry entry no worker would recover them. Its token
-- is deleted, so that no crash is counted for a message that was alone: a worker that leaves has not crashed.
redis.call('DEL', alive(me), token_of(me))
for _, queue in ipairs(queues) do
  if redis.call('EXISTS', inflight(me, queue)) == 1 then return end
end
redis.call('SREM', registry, me)
