-- Write a new key's record and list it. Never overwrites.
--
-- KEYS[1]  hash  <ns>:key:{<digest>}:record
-- KEYS[2]  hash  <ns>:keys   key id -> digest
-- ARGV     id, digest, how many keys there may be, then the record's fields and values
-- Returns  created_ms, by the server's clock; 0: the id is taken; -1: there are too many keys

if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 then return 0 end
if redis.call('HLEN', KEYS[2]) >= tonumber(ARGV[3]) then return -1 end
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], 'id', ARGV[1], 'created_ms', string.format('%.0f', now_ms),
  unpack(ARGV, 4))
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return now_ms
