-- A host leaves in good order.
--
-- KEYS[1]  hash  <namespace>:{hosts}:records   host id -> record (JSON)
-- KEYS[2]  zset  <namespace>:{hosts}:expiry    host id -> server time in ms at which it counts as dead
-- ARGV     host id
-- Returns  1 when it was registered, else 0

redis.call('ZREM', KEYS[2], ARGV[1])
return redis.call('HDEL', KEYS[1], ARGV[1])
