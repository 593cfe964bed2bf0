-- Append decision records to the bounded log, and keep its index.
--
-- KEYS[1]  stream  <ns>:decisions        one entry per decision: field "record", JSON
-- KEYS[2]  hash    <ns>:decisions:ids    decision id -> entry, of the entries in the log
-- KEYS[3]  hash    <ns>:feedback:given   decision id -> score, likewise (see give_feedback.lua)
-- ARGV     number of records to keep, then the records; "decision_id" is the first of their fields
-- Returns  how many were appended
--
-- The log is trimmed some entries at a time, so that the index can be trimmed along with it.

local SURPLUS = 100
local keep = tonumber(ARGV[1])

local function id_of(record)
  return string.match(record, '^{"decision_id":"([^"\\]*)"')
end

for i = 2, #ARGV do
  local entry = redis.call('XADD', KEYS[1], '*', 'record', ARGV[i])
  local id = id_of(ARGV[i])
  if id then redis.call('HSET', KEYS[2], id, entry) end
end

local surplus = redis.call('XLEN', KEYS[1]) - keep
if surplus >= math.min(SURPLUS, keep) then
  for _, old in ipairs(redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', surplus)) do
    local id = id_of(old[2][2])
    if id and redis.call('HGET', KEYS[2], id) == old[1] then
      redis.call('HDEL', KEYS[2], id)
      redis.call('HDEL', KEYS[3], id)
    end
  end
  redis.call('XTRIM', KEYS[1], 'MAXLEN', keep)
end
return #ARGV - 1
