-- All records of policies, unless the asker knows them already. Changes nothing.
--
-- KEYS     as in policy_swap.lua: records, changes
-- ARGV     the count of changes that the asker has seen ('': none)
-- Returns  the count of changes, then the records; only the count when it is the one seen

local changes = redis.call('GET', KEYS[2]) or '0'
if changes == ARGV[1] then return { changes } end
return { changes, unpack(redis.call('HVALS', KEYS[1])) }
