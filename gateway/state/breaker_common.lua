-- Circuit breakers that all gateways share; the text of this file precedes both scripts.
-- The rules are those of gateway/breakers.py, which holds them for a gateway without its store.
--
-- KEYS[1]  hash  <ns>:{breakers}:state    target -> "in_a_row open_until_ms backoff_ms
--                                         probe_until_ms slot:ok:failed ..."
-- KEYS[2]  hash  <ns>:{breakers}:tripped  target -> open_until_ms, for those that are not closed
--
-- A target is "expert:<id>" or "host:<id>". Times are the server's, in ms, unless a test gives one.
-- Both keys end an hour after the last report.

local SLOTS = 10
local KEPT_MS = 3600000
local TARGETS_MAX = 2000 -- experts of the catalogue and hosts; above it, what is at rest goes

local function time_ms(given)
  if given and given ~= '' then return tonumber(given) end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function whole(number)
  return string.format('%.0f', number)
end

local function read_breaker(target)
  local text = redis.call('HGET', KEYS[1], target)
  local breaker = { in_a_row = 0, open_until = 0, backoff = 0, probe_until = 0, slots = {} }
  if not text then return breaker end
  local a, b, c, d, rest = string.match(text, '^(%d+) (%d+) (%d+) (%d+)(.*)$')
  breaker.in_a_row, breaker.open_until = tonumber(a), tonumber(b)
  breaker.backoff, breaker.probe_until = tonumber(c), tonumber(d)
  for slot, ok, failed in string.gmatch(rest, ' (%d+):(%d+):(%d+)') do
    breaker.slots[tonumber(slot)] = { tonumber(ok), tonumber(failed) }
  end
  return breaker
end

local function write_breaker(target, breaker)
  local parts = { whole(breaker.in_a_row), whole(breaker.open_until), whole(breaker.backoff),
    whole(breaker.probe_until) }
  for slot, counts in pairs(breaker.slots) do
    parts[#parts + 1] = whole(slot) .. ':' .. whole(counts[1]) .. ':' .. whole(counts[2])
  end
  redis.call('HSET', KEYS[1], target, table.concat(parts, ' '))
  if breaker.open_until == 0 then
    redis.call('HDEL', KEYS[2], target)
  else
    redis.call('HSET', KEYS[2], target, whole(breaker.open_until))
  end
end

local function wait_ms(breaker, now)
  if breaker.open_until == 0 then return 0 end
  return math.max(0, math.max(breaker.open_until, breaker.probe_until) - now)
end
