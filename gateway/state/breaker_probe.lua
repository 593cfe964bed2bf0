-- Take the place of a half-open breaker's one probe.
--
-- ARGV     now_ms ('': server's), target, lease_ms
-- Returns  0: the place is the caller's; -1: the breaker is closed, no probe is needed; else the ms
--          until a call may be tried

local now = time_ms(ARGV[1])
local target, lease_ms = ARGV[2], tonumber(ARGV[3])
local breaker = read_breaker(target)
if breaker.open_until == 0 then return -1 end
local wait = wait_ms(breaker, now)
if wait > 0 then return wait end
breaker.probe_until = now + lease_ms
write_breaker(target, breaker)
return 0
