-- Revoke a key. The record stays: what was spent under it is still owed. Idempotent.
--
-- KEYS[1]  hash  <ns>:key:{<digest>}:record
-- Returns  when it was first revoked, in ms by the server's clock; 0 when there is no such key

if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSETNX', KEYS[1], 'revoked_ms', string.format('%.0f', now_ms))
return tonumber(redis.call('HGET', KEYS[1], 'revoked_ms'))
