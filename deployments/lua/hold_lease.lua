-- Take a lease that is free, or renew one's own.
--
-- KEYS[1]  string  <namespace>:lease:<name>   who holds it; ends when nobody renews it
-- ARGV     owner, ttl in ms
-- Returns  1: it is the owner's until the ttl is over; 0: somebody else's

local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', tonumber(ARGV[2]))
return 1
