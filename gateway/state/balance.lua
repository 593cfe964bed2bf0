-- What a scope has spent in the present window, and what is reserved. Changes nothing.
--
-- KEYS     totals, amounts, leases of one scope, as in reserve.lua
-- ARGV     now_ms ('': the server's clock)
-- Returns  spent, reserved under leases that have not ended (micro-dollars)

local now_ms = tonumber(ARGV[1])
if now_ms == nil then
  local time = redis.call('TIME')
  now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
end

local function total(field)
  return tonumber(redis.call('HGET', KEYS[1], field) or '0')
end

local window_ms, spent, reserved = total('window_ms'), total('spent'), total('reserved')
if window_ms > 0 and now_ms - now_ms % window_ms > total('window_start') then
  spent = 0
end
for _, late in ipairs(redis.call('ZRANGE', KEYS[3], '-inf', now_ms, 'BYSCORE')) do
  reserved = reserved - tonumber(redis.call('HGET', KEYS[2], late))
end
return { spent, reserved }
