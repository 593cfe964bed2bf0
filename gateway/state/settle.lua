-- Turn a reservation into what was really spent. Once: settling again changes nothing.
--
-- KEYS     totals, amounts, leases, expired of one scope, as in reserve.lua
-- ARGV     reservation id, actual micro-dollars (0 releases the reservation)
-- Returns  'settled'; 'late' when its lease had expired (the money is spent all the same, so it is
--          charged); 'unknown' when it was settled before, or never made (nothing is charged)
--
-- The money counts in the window that was current when the scope was last reserved from.

local id, actual = ARGV[1], tonumber(ARGV[2])

local held = redis.call('HGET', KEYS[2], id)
if held then
  redis.call('HDEL', KEYS[2], id)
  redis.call('ZREM', KEYS[3], id)
  redis.call('HINCRBY', KEYS[1], 'reserved', -tonumber(held))
  redis.call('HINCRBY', KEYS[1], 'spent', actual)
  return 'settled'
end
if redis.call('ZREM', KEYS[4], id) == 1 then
  redis.call('HINCRBY', KEYS[1], 'spent', actual)
  return 'late'
end
return 'unknown'
