-- Heartbeat of one host: its record and its expiry, together.
--
-- KEYS[1]  hash  <namespace>:{hosts}:records   host id -> record (JSON)
-- KEYS[2]  zset  <namespace>:{hosts}:expiry    host id -> server time in ms at which it counts as dead
-- ARGV     host id, record, ttl in ms
--
-- The server's clock alone decides who is alive, so the clocks of hosts and gateways need not agree.
-- Both keys expire by themselves when the last host has fallen silent.

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local ttl_ms = tonumber(ARGV[3])

redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], now_ms + ttl_ms, ARGV[1])
for _, key in ipairs(KEYS) do
  if redis.call('PTTL', key) < ttl_ms then
    redis.call('PEXPIRE', key, ttl_ms)
  end
end
return 1
