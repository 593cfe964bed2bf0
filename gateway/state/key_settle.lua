-- Put what a request really used in the place of what was set aside. Once: again changes nothing.
--
-- KEYS     as in key_common.lua
-- ARGV     admission id, micro-dollars spent, tokens used, now_ms ('': the server's)
-- Returns  'settled'; 'late' when its lease had ended (the money is spent all the same, so it is
--          charged); 'unknown' when it was settled before, or never admitted (nothing is charged)
--
-- The money counts in the windows that are current now. Tokens that were not used go back into the
-- bucket; those beyond the estimate are owed to it.

local id, spent, tokens, now_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), time_ms(ARGV[4])
local usage = read_hash(KEYS[2])

local function charge()
  for _, window in ipairs(WINDOWS) do
    local before, start = window_spent(usage, window, now_ms)
    redis.call('HSET', KEYS[2],
      window .. '_spent', whole(before + spent), window .. '_start', whole(start))
  end
end

local function give_back_tokens(unused)
  local limit = tonumber(redis.call('HGET', KEYS[1], 'tokens_per_minute') or '')
  if not limit or not usage.tokens_level then return end
  local level = bucket_level(usage, 'tokens', limit, now_ms) + unused * PART
  redis.call('HSET', KEYS[2],
    'tokens_level', whole(math.min(limit * PART, level)),
    'tokens_at', whole(math.max(now_ms, tonumber(usage.tokens_at))))
end

local held = redis.call('HGET', KEYS[3], id)
if held then
  local money, reserved_tokens = string.match(held, '^(%d+) (%d+)$')
  redis.call('HDEL', KEYS[3], id)
  redis.call('ZREM', KEYS[4], id)
  change_reserved(-tonumber(money))
  charge()
  give_back_tokens(tonumber(reserved_tokens) - tokens)
  return 'settled'
end
if redis.call('ZREM', KEYS[5], id) == 1 then
  charge()
  return 'late'
end
return 'unknown'
