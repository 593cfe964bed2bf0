-- Replace one policy's record, if nobody has changed it since it was read.
--
-- KEYS[1]  hash    <ns>:{policies}:records    name -> record, JSON (see gateway/policy_versions.py)
-- KEYS[2]  hash    <ns>:{policies}:revisions  name -> revision of that record
-- KEYS[3]  string  <ns>:{policies}:changes    grows with every change of any of them
-- ARGV     name, revision that was read (0: none), the new record, how many policies there may be
-- Returns  1 when written; 0 when the revision is another by now; -1 when there are too many
--
-- Kept true: a name has a record if and only if it has a revision.

local known = redis.call('HGET', KEYS[2], ARGV[1]) or '0'
if known ~= ARGV[2] then return 0 end
if known == '0' and redis.call('HLEN', KEYS[2]) >= tonumber(ARGV[4]) then return -1 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('HINCRBY', KEYS[2], ARGV[1], 1)
redis.call('INCR', KEYS[3])
return 1
