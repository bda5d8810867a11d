-- Whether a worker is dead is read in the script that moves its messages, so that it cannot change in between. A worker
-- that runs on after this has no token any more: its drop does nothing, and its events are duplicates when they are
-- settled again.
local workers, count, skipped = {}, 0, {}
for _, worker in ipairs(redis.call('SMEMBERS', registry)) do
  if worker ~= me and redis.call('EXISTS', alive(worker)) == 0 then
    local key = foreign(owned_by(worker))
    if key then
      table.insert(skipped, key)
    else
      local held, in_work = read_token(worker)
      local held_before = count
      redis.call('DEL', token_of(worker))
      for _, queue in ipairs(queues) do
        if is_alone(held) and redis.call('EXISTS', inflight(worker, queue)) == 1 then
          local counter = crashes(redis.call('LINDEX', inflight(worker, queue), -1), in_work)
          local before = tonumber(redis.call('GET', counter) or 0) or 0
          redis.call('SET', counter, before + 1, 'EX', ARGV[2])
        end
        while redis.call('LMOVE', inflight(worker, queue), recovered(queue), 'RIGHT', 'LEFT') do
          count = count + 1
        end
      end
      redis.call('SREM', registry, worker)
      if count > held_before then table.insert(workers, worker) end
    end
  end
end
return {workers, count, skipped}
