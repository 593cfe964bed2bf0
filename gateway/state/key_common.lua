-- Shared by the scripts of one API key; its text is put in front of each of them.
--
-- Keys of one API key; <ns> is the namespace, <digest> the SHA-256 of its secret:
-- KEYS[1]  hash  <ns>:key:{<digest>}:record   what it permits (see gateway/state/keys.py)
-- KEYS[2]  hash  <ns>:key:{<digest>}:usage    reserved; <window>_spent, <window>_start for each
--                                             window; <bucket>_level, <bucket>_at for each bucket
-- KEYS[3]  hash  <ns>:key:{<digest>}:holds    admission id -> "micro-dollars tokens"
-- KEYS[4]  zset  <ns>:key:{<digest>}:leases   admission id -> ms at which its lease ends
-- KEYS[5]  zset  <ns>:key:{<digest>}:expired  admission id -> ms at which its lease ended
--
-- Kept true: usage.reserved is the sum of the money in holds; holds and leases have the same ids;
-- in every window with a budget, spent + reserved stays within it as long as nobody settles more
-- than was reserved. Money is micro-dollars. A bucket's level is in sixty-thousandths of a unit,
-- so that a limit of n per minute refills by exactly n of them per ms, in whole numbers.

local WINDOWS = { 'hour', 'day', 'month', 'total' }
local BUCKETS = { 'requests', 'tokens' }
local PART = 60000
local EXPIRED_KEPT = 1000 -- admissions whose late settlement can still be told from a repeated one
local EXPIRED_KEPT_MS = 3600000
local HOUR_MS, DAY_MS = 3600000, 86400000

-- The server's clock, unless a test gives the time.
local function time_ms(given)
  if given and given ~= '' then return tonumber(given) end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Numbers travel as whole decimals: tostring() rounds to 14 digits.
local function whole(number)
  return string.format('%.0f', number)
end

-- '-0' is no number to HINCRBY.
local function change_reserved(by)
  if by ~= 0 then redis.call('HINCRBY', KEYS[2], 'reserved', whole(by)) end
end

local function read_hash(key)
  local flat, map = redis.call('HGETALL', key), {}
  for i = 1, #flat, 2 do map[flat[i]] = flat[i + 1] end
  return map
end

-- First day of the month of a day, and of the next month, all as days since the epoch.
-- Howard Hinnant, "chrono-compatible low-level date algorithms": civil_from_days, days_from_civil.
local function month_of(day)
  local function first_day(year, month)
    if month <= 2 then year = year - 1 end
    local era = math.floor(year / 400)
    local yoe = year - era * 400
    local doy = math.floor((153 * (month + (month > 2 and -3 or 9)) + 2) / 5)
    return era * 146097 + yoe * 365 + math.floor(yoe / 4) - math.floor(yoe / 100) + doy - 719468
  end
  local z = day + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor(
    (doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local month = mp + (mp < 10 and 3 or -9)
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  local next_year = month == 12 and year + 1 or year
  return first_day(year, month), first_day(next_year, month % 12 + 1)
end

-- When the present window began and when it ends; it never ends for the total.
local function window_bounds(window, now_ms)
  if window == 'hour' then
    local start = now_ms - now_ms % HOUR_MS
    return start, start + HOUR_MS
  elseif window == 'day' then
    local start = now_ms - now_ms % DAY_MS
    return start, start + DAY_MS
  elseif window == 'month' then
    local first, following = month_of(math.floor(now_ms / DAY_MS))
    return first * DAY_MS, following * DAY_MS
  end
  return 0, nil
end

-- Spent in the present window. Windows move forward only: a clock that was set back must not empty
-- the present one. What is reserved stays reserved, for it will be spent in the new window.
local function window_spent(usage, window, now_ms)
  local start = window_bounds(window, now_ms)
  if start > tonumber(usage[window .. '_start'] or '0') then return 0, start end
  return tonumber(usage[window .. '_spent'] or '0'), tonumber(usage[window .. '_start'] or '0')
end

-- A bucket's level now. It is full when it was never used.
local function bucket_level(usage, bucket, limit, now_ms)
  local full = limit * PART
  local level = tonumber(usage[bucket .. '_level'] or whole(full))
  local elapsed_ms = math.max(0, now_ms - tonumber(usage[bucket .. '_at'] or whole(now_ms)))
  return math.min(full, level + elapsed_ms * limit)
end
