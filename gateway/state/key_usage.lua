-- What a key has spent, and what is set aside for running requests. Changes nothing.
--
-- KEYS     as in key_common.lua
-- ARGV     now_ms ('': the server's)
-- Returns  micro-dollars spent in the present hour, day, month and in all; micro-dollars reserved
--          and requests running under leases that have not ended

local now_ms = time_ms(ARGV[1])
local usage = read_hash(KEYS[2])
local answer = {}
for _, window in ipairs(WINDOWS) do
  local spent = window_spent(usage, window, now_ms)
  answer[#answer + 1] = spent
end
local reserved, running = tonumber(usage.reserved or '0'), redis.call('ZCARD', KEYS[4])
for _, late in ipairs(redis.call('ZRANGE', KEYS[4], '-inf', now_ms, 'BYSCORE')) do
  reserved = reserved - tonumber(string.match(redis.call('HGET', KEYS[3], late), '^(%d+) '))
  running = running - 1
end
answer[#answer + 1] = reserved
answer[#answer + 1] = running
return answer
