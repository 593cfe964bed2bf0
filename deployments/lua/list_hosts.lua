-- All live hosts; forgets the dead ones on the way.
--
-- KEYS[1]  hash    <namespace>:{hosts}:records   host id -> record (JSON)
-- KEYS[2]  zset    <namespace>:{hosts}:expiry    host id -> server time in ms at which it counts as dead
-- KEYS[3]  string  <namespace>:{hosts}:epoch     server time in ms of the first listing
-- Returns  epoch, then host id and record of each host
--
-- The epoch never expires: when it is missing, the store has lost its data, and a new one says so.

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)

local dead = redis.call('ZRANGE', KEYS[2], '-inf', now_ms, 'BYSCORE')
for _, host in ipairs(dead) do
  redis.call('HDEL', KEYS[1], host)
  redis.call('ZREM', KEYS[2], host)
end

redis.call('SET', KEYS[3], string.format('%d', now_ms), 'NX')
local reply = { redis.call('GET', KEYS[3]) }
for _, item in ipairs(redis.call('HGETALL', KEYS[1])) do
  reply[#reply + 1] = item
end
return reply
