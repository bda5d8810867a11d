-- A worker with messages in flight stays registered, or nobody would find them. Without its token it no longer
-- says that one was alone: to leave is not to crash.
redis.call('DEL', alive(me), token_of(me))
for _, queue in ipairs(queues) do
  if redis.call('EXISTS', inflight(me, queue)) == 1 then return end
end
redis.call('SREM', registry, me)
