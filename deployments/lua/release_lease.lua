-- Give a lease back at once; somebody else's is left alone.
--
-- KEYS[1]  string  <namespace>:lease:<name>
-- ARGV     owner
-- Returns  1: it was the owner's

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
