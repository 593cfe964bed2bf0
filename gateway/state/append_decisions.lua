-- Append decision records to the bounded log.
--
-- KEYS[1]  stream  <ns>:decisions   one entry per decision: field "record", JSON
-- ARGV     number of records to keep (about: trimmed by whole nodes), then the records
-- Returns  how many were appended

for i = 2, #ARGV do
  redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'record', ARGV[i])
end
return #ARGV - 1
