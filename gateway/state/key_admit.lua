-- Admit one request of a key, or refuse it: every limit at once, all or nothing.
--
-- KEYS     as in key_common.lua
-- ARGV     admission id, worst-case micro-dollars, tokens (prompt and output at most), lease_ms,
--          policy asked for ('': none is checked), expert named ('': none), now_ms ('': server's),
--          then the experts of the plan
-- Returns  verdict, what it is about, ms until it fits (-1: it never will), what is left (-1: not
--          said), then for requests and for tokens: limit (-1: none), remaining, ms until full
-- Verdicts admitted, unknown, revoked, policy, expert, budget, concurrency, rate
--
-- An id that is admitted already stays as it is. Refusals change nothing but what time has changed.
-- Money is checked before rates: waiting for a rate does not help a key that is out of money.

local id, amount, tokens = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local lease_ms, policy, named, now_ms = tonumber(ARGV[4]), ARGV[5], ARGV[6], time_ms(ARGV[7])
local record, usage = read_hash(KEYS[1]), read_hash(KEYS[2])
local asked = { requests = PART, tokens = tokens * PART }
local levels = {}

local function limit_of(field)
  return tonumber(record[field] or '')
end

local function reply(verdict, about, wait_ms, left)
  local answer = { verdict, about, math.ceil(wait_ms), left }
  for _, bucket in ipairs(BUCKETS) do
    local limit = limit_of(bucket .. '_per_minute')
    if limit and levels[bucket] then
      local level = levels[bucket]
      answer[#answer + 1] = limit
      answer[#answer + 1] = math.max(0, math.floor(level / PART))
      answer[#answer + 1] = math.ceil((limit * PART - level) / limit)
    else
      for _ = 1, 3 do answer[#answer + 1] = -1 end
    end
  end
  return answer
end

-- "a b c" holds names without spaces; no field: everything is permitted.
local function permits(field, name)
  return not record[field] or string.find(' ' .. record[field] .. ' ', ' ' .. name .. ' ', 1, true)
end

local function denied()
  if policy ~= '' and not permits('policies', policy) then return 'policy', policy end
  if named ~= '' and record.policies and not record.experts then return 'expert', named end
  for i = 8, #ARGV do
    if not permits('experts', ARGV[i]) then return 'expert', ARGV[i] end
  end
end

-- Leases of gateways that died end here. Their ids are remembered, should they be settled after all.
local function release_expired()
  local late = redis.call('ZRANGE', KEYS[4], '-inf', now_ms, 'BYSCORE', 'LIMIT', 0, 1000)
  for _, gone in ipairs(late) do
    local money = tonumber(string.match(redis.call('HGET', KEYS[3], gone), '^(%d+) '))
    change_reserved(-money)
    usage.reserved = tonumber(usage.reserved or '0') - money
    redis.call('HDEL', KEYS[3], gone)
    redis.call('ZREM', KEYS[4], gone)
    redis.call('ZADD', KEYS[5], now_ms, gone)
  end
  redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', now_ms - EXPIRED_KEPT_MS)
  redis.call('ZREMRANGEBYRANK', KEYS[5], 0, -EXPIRED_KEPT - 1)
end

-- The window that stays closed longest, if any is too full; a total never opens.
local function over_budget()
  local found, found_wait, found_left
  for _, window in ipairs(WINDOWS) do
    local limit = limit_of('budget_' .. window)
    if limit then
      local left = limit - window_spent(usage, window, now_ms) - tonumber(usage.reserved or '0')
      if amount > left then
        local _, ends = window_bounds(window, now_ms)
        local wait = ends and amount <= limit and ends - now_ms or -1
        if not found or wait == -1 or (found_wait ~= -1 and wait > found_wait) then
          found, found_wait, found_left = window, wait, math.max(0, left)
        end
      end
    end
  end
  return found, found_wait, found_left
end

-- The bucket that takes longest to hold enough, if any holds too little.
local function over_rate()
  local found, found_wait
  for _, bucket in ipairs(BUCKETS) do
    local limit = limit_of(bucket .. '_per_minute')
    if limit and levels[bucket] < asked[bucket] then
      local wait = (asked[bucket] - levels[bucket]) / limit
      if asked[bucket] > limit * PART then wait = -1 end
      if not found or wait == -1 or (found_wait ~= -1 and wait > found_wait) then
        found, found_wait = bucket, wait
      end
    end
  end
  return found, found_wait
end

if not record.id then return reply('unknown', '', -1, -1) end
if record.revoked_ms then return reply('revoked', '', -1, -1) end
local kind, name = denied()
if kind then return reply(kind, name, -1, -1) end

release_expired()
for _, bucket in ipairs(BUCKETS) do
  local limit = limit_of(bucket .. '_per_minute')
  if limit then levels[bucket] = bucket_level(usage, bucket, limit, now_ms) end
end
if redis.call('HEXISTS', KEYS[3], id) == 1 then return reply('admitted', '', 0, -1) end

local window, wait_ms, left = over_budget()
if window then return reply('budget', window, wait_ms, left) end
local at_once = limit_of('concurrent_requests')
if at_once and redis.call('ZCARD', KEYS[4]) >= at_once then
  return reply('concurrency', 'concurrent requests', 1000, 0)
end
local bucket
bucket, wait_ms = over_rate()
if bucket then
  return reply('rate', bucket, wait_ms, math.max(0, math.floor(levels[bucket] / PART)))
end

local changes = {}
for _, used in ipairs(BUCKETS) do
  if levels[used] then
    levels[used] = levels[used] - asked[used]
    changes[#changes + 1] = used .. '_level'
    changes[#changes + 1] = whole(levels[used])
    changes[#changes + 1] = used .. '_at'
    changes[#changes + 1] = whole(math.max(now_ms, tonumber(usage[used .. '_at'] or '0')))
  end
end
if #changes > 0 then redis.call('HSET', KEYS[2], unpack(changes)) end
change_reserved(amount)
redis.call('HSET', KEYS[3], id, whole(amount) .. ' ' .. whole(tokens))
redis.call('ZADD', KEYS[4], now_ms + lease_ms, id)
redis.call('ZREM', KEYS[5], id)
return reply('admitted', '', 0, -1)
