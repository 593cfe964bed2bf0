-- Count a score for the expert that answered a decision; once per decision, the last word counts.
--
-- KEYS[1]  stream  <ns>:decisions            see append_decisions.lua
-- KEYS[2]  hash    <ns>:decisions:ids        decision id -> entry
-- KEYS[3]  hash    <ns>:feedback:given       decision id -> score
-- KEYS[4]  hash    <ns>:feedback:posteriors  "<category> <expert>" -> "<sum of scores> <sum of 1 - score>"
-- KEYS[5]  stream  <ns>:feedback:log         field "record": what was answered and its score, JSON
-- ARGV     decision id, id of the key that asks ('': none), score, most evidence to hold, number of
--          entries to keep in the log
-- Returns  'unknown' (never made, by another key, or forgotten), 'unanswered', 'same', 'changed' or
--          'counted'
--
-- Evidence beyond the bound is scaled down, so that what experts become counts more than what they
-- were.

local id, key_id, score = ARGV[1], ARGV[2], tonumber(ARGV[3])
local most, keep = tonumber(ARGV[4]), ARGV[5]

local entry = redis.call('HGET', KEYS[2], id)
if not entry then return 'unknown' end
local found = redis.call('XRANGE', KEYS[1], entry, entry)
if not found[1] then return 'unknown' end
local record = cjson.decode(found[1][2][2])
local owner = type(record.key_id) == 'string' and record.key_id or ''
if owner ~= key_id then return 'unknown' end
if type(record.expert) ~= 'string' then return 'unanswered' end

local before = tonumber(redis.call('HGET', KEYS[3], id) or '')
if before == score then return 'same' end

local category = type(record.category) == 'string' and record.category or ''
local field = category .. ' ' .. record.expert
local good, bad = string.match(redis.call('HGET', KEYS[4], field) or '0 0', '^(%S+) (%S+)$')
good = math.max(0, tonumber(good) + score - (before or 0))
bad = math.max(0, tonumber(bad) + (1 - score) - (before and 1 - before or 0))
if good + bad > most then
  local scale = most / (good + bad)
  good, bad = good * scale, bad * scale
end
redis.call('HSET', KEYS[4], field, string.format('%.6f %.6f', good, bad))
redis.call('HSET', KEYS[3], id, ARGV[3])
redis.call('XADD', KEYS[5], 'MAXLEN', '~', keep, '*', 'record', cjson.encode({
  decision_id = id, score = score, expert = record.expert, category = category,
  input_sha256 = record.input_sha256, cost_micro_usd = record.cost_micro_usd,
  input_tokens = record.input_tokens, output_tokens = record.output_tokens,
  at_ms = record.at_ms, policy = record.policy,
}))
return before and 'changed' or 'counted'
