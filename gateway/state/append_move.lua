-- Put a move on top of the list of the last ones.
--
-- KEYS[1]  list  <ns>:placement:moves   JSON, the newest first
-- ARGV     move, how many to keep
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('LTRIM', KEYS[1], 0, tonumber(ARGV[2]) - 1)
return 1
