-- Reserve money before it is spent: all or nothing, in one step.
--
-- Keys of one scope (a budget: a key, a team, a policy); <ns> is the namespace:
-- KEYS[1]  hash  <ns>:budget:{<scope>}:totals   spent, reserved (micro-dollars), window_start, window_ms
-- KEYS[2]  hash  <ns>:budget:{<scope>}:amounts  reservation id -> reserved micro-dollars
-- KEYS[3]  zset  <ns>:budget:{<scope>}:leases   reservation id -> ms at which the lease ends
-- KEYS[4]  zset  <ns>:budget:{<scope>}:expired  reservation id -> ms at which the lease ended
-- ARGV     reservation id, amount, limit, lease_ms, window_ms (0: no window), now_ms ('': server's)
-- Returns  {1, left after it} when reserved, {0, left before it} when refused
--
-- Kept true: totals.reserved is the sum over amounts; amounts and leases hold the same ids; and as
-- long as nobody settles more than was reserved, spent + reserved never exceeds the limit.
-- Reserving again under the same id replaces the amount and renews the lease.

local id, amount, limit = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local lease_ms, window_ms, now_ms = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
if now_ms == nil then
  local time = redis.call('TIME')
  now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
end

local EXPIRED_KEPT = 1000 -- late settlements that can still be told from settled ones
local EXPIRED_KEPT_MS = 3600000

local function total(field)
  return tonumber(redis.call('HGET', KEYS[1], field) or '0')
end

-- A budget with windows forgets itself when idle: by then its window is over and its leases too.
local function keep_keys()
  for _, key in ipairs(KEYS) do
    if window_ms > 0 then
      redis.call('PEXPIRE', key, window_ms + math.max(lease_ms, EXPIRED_KEPT_MS))
    else
      redis.call('PERSIST', key)
    end
  end
end

-- A new window starts with nothing spent; what is reserved stays reserved, for it will be spent in
-- the new window. Windows only move forward: a clock that lags must not empty the present one.
local start = window_ms > 0 and now_ms - now_ms % window_ms or 0
if start > total('window_start') or window_ms ~= total('window_ms') then
  redis.call('HSET', KEYS[1], 'window_start', start, 'window_ms', window_ms, 'spent', 0)
end

-- Forgotten reservations are released; their ids are remembered, should they be settled after all.
for _, late in ipairs(redis.call('ZRANGE', KEYS[3], '-inf', now_ms, 'BYSCORE', 'LIMIT', 0, 1000)) do
  redis.call('HINCRBY', KEYS[1], 'reserved', -tonumber(redis.call('HGET', KEYS[2], late)))
  redis.call('HDEL', KEYS[2], late)
  redis.call('ZREM', KEYS[3], late)
  redis.call('ZADD', KEYS[4], now_ms, late)
end
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now_ms - EXPIRED_KEPT_MS)
redis.call('ZREMRANGEBYRANK', KEYS[4], 0, -EXPIRED_KEPT - 1)

local held = tonumber(redis.call('HGET', KEYS[2], id) or '0')
local left = limit - total('spent') - total('reserved') + held
if amount > left then
  keep_keys()
  return { 0, left }
end

redis.call('HINCRBY', KEYS[1], 'reserved', amount - held)
redis.call('HSET', KEYS[2], id, amount)
redis.call('ZADD', KEYS[3], now_ms + lease_ms, id)
redis.call('ZREM', KEYS[4], id)
keep_keys()
return { 1, left - amount }
