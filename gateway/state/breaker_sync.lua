-- Take in what a gateway saw of its calls, and tell it which breakers are not closed.
--
-- ARGV     now_ms ('': server's), failures_in_a_row, failure_share, calls_min, slot_ms, open_ms,
--          open_max_ms, then five per report: target, kind, and three numbers
--            calls  ok, failed, failed since the last ok
--            probe  ok (1 or 0), failed (1 or 0), 0; neither: the probe was abandoned
--            open   ms for which a gateway that had no store left it alone, 0, 0
-- Returns  five per breaker that was reported or is not closed: target, in_a_row, ms for which it
--          is still open (-1: closed, 0: half open), backoff_ms, ms for which a probe holds it

local now = time_ms(ARGV[1])
local in_a_row_max, share, calls_min = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local slot_ms, open_ms, open_max_ms = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local touched = {}

local function open(breaker, for_ms)
  breaker.open_until, breaker.backoff = now + for_ms, for_ms
  breaker.in_a_row, breaker.probe_until, breaker.slots = 0, 0, {}
end

local function too_many(breaker)
  if breaker.in_a_row >= in_a_row_max then return true end
  local ok, failed = 0, 0
  for _, counts in pairs(breaker.slots) do
    ok, failed = ok + counts[1], failed + counts[2]
  end
  return ok + failed >= calls_min and failed >= share * (ok + failed)
end

local function record(breaker, ok, failed, failed_last)
  if breaker.open_until ~= 0 then return end
  local slot = math.floor(now / slot_ms)
  for number in pairs(breaker.slots) do
    if number <= slot - SLOTS then breaker.slots[number] = nil end
  end
  local counts = breaker.slots[slot] or { 0, 0 }
  breaker.slots[slot] = { counts[1] + ok, counts[2] + failed }
  breaker.in_a_row = ok > 0 and failed_last or breaker.in_a_row + failed
  if failed > 0 and too_many(breaker) then open(breaker, open_ms) end
end

local function probed(breaker, ok, failed)
  if breaker.open_until == 0 then return end
  if ok == 1 then
    breaker.open_until, breaker.backoff, breaker.probe_until = 0, 0, 0
  elseif failed == 1 then
    open(breaker, math.min(open_max_ms, 2 * breaker.backoff))
  else
    breaker.probe_until = 0
  end
end

for i = 8, #ARGV, 5 do
  local target, kind = ARGV[i], ARGV[i + 1]
  local a, b, c = tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4])
  local breaker = read_breaker(target)
  if kind == 'calls' then
    record(breaker, a, b, c)
  elseif kind == 'probe' then
    probed(breaker, a, b)
  elseif breaker.open_until == 0 then
    open(breaker, a)
  end
  write_breaker(target, breaker)
  touched[target] = true
end

-- What is at rest: closed with nothing in its window, or half open with nobody asking for an hour.
if #ARGV > 7 and redis.call('HLEN', KEYS[1]) > TARGETS_MAX then
  for _, target in ipairs(redis.call('HKEYS', KEYS[1])) do
    local breaker = read_breaker(target)
    local newest = 0
    for slot in pairs(breaker.slots) do newest = math.max(newest, slot) end
    local busy = newest > math.floor(now / slot_ms) - SLOTS
    if not busy and (breaker.open_until == 0 or breaker.open_until + KEPT_MS < now) then
      redis.call('HDEL', KEYS[1], target)
      redis.call('HDEL', KEYS[2], target)
    end
  end
end
if #ARGV > 7 then
  redis.call('PEXPIRE', KEYS[1], KEPT_MS)
  redis.call('PEXPIRE', KEYS[2], KEPT_MS)
end

for _, target in ipairs(redis.call('HKEYS', KEYS[2])) do touched[target] = true end
local answer = {}
for target in pairs(touched) do
  local breaker = read_breaker(target)
  local closed = breaker.open_until == 0
  answer[#answer + 1] = target
  answer[#answer + 1] = breaker.in_a_row
  answer[#answer + 1] = closed and -1 or math.max(0, breaker.open_until - now)
  answer[#answer + 1] = breaker.backoff
  answer[#answer + 1] = math.max(0, breaker.probe_until - now)
end
return answer
