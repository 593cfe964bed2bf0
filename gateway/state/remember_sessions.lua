-- Remember who answered in conversations; each entry forgets itself.
--
-- KEYS     <ns>:session:<digest of the conversation>, one per entry
-- ARGV     for each key: the session (JSON), ms to keep it
-- Returns  how many were written

for i, key in ipairs(KEYS) do
  redis.call('SET', key, ARGV[2 * i - 1], 'PX', ARGV[2 * i])
end
return #KEYS
