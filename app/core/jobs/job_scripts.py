"""The changes of a job's keys that must happen in one step, as scripts that Redis runs.

The delivery of a webhook is recorded together with the change that it tells of: neither is ever lost.
So is the note that a job has ended: what follows from that is done, even if the process dies (outcome).
"""

from __future__ import annotations

from app.core.changes.stamps import STAMP
from app.core.records.job_keys import CHANGES, ENDED, LINES

FAILURES = "nibble:tally:failures"
MAX_EVENTS = 10_000
DELIVERIES_KEPT_S = 30 * 24 * 3600

# The last three keys of a script that uses it: delivery, the job's deliveries, deliveries due. Last two
# arguments: delivery id or '', delivery.
RECORD_DELIVERY = f"""
if ARGV[#ARGV - 1] ~= '' then
  local id = ARGV[#ARGV - 1]
  redis.call('SET', KEYS[#KEYS - 2], ARGV[#ARGV], 'EX', {DELIVERIES_KEPT_S})
  redis.call('ZADD', KEYS[#KEYS - 1], 0, id)
  redis.call('EXPIRE', KEYS[#KEYS - 1], {DELIVERIES_KEPT_S})
  redis.call('ZADD', KEYS[#KEYS], redis.call('TIME')[1], id)
end
"""

# KEYS: job, tenant index, state set, events, the tenant's active jobs, the stamp of its jobs, its
# turns, its line, …
# ARGV: id, record, spec, event payload, 1 if active, most active jobs or 0, most turns or 0, rank in line,
# tenant, …
CREATE = f"""
{STAMP}
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
if ARGV[5] == '1' then
  local most = tonumber(ARGV[6])
  if most > 0 and redis.call('SCARD', KEYS[5]) >= most then return -1 end
  redis.call('SADD', KEYS[5], ARGV[1])
  local turns = tonumber(ARGV[7])
  if turns > 0 and redis.call('SCARD', KEYS[7]) >= turns then
    redis.call('ZADD', KEYS[8], ARGV[8], ARGV[1])
    redis.call('SADD', '{LINES}', ARGV[9])
  else
    redis.call('SADD', KEYS[7], ARGV[1])
  end
else
  redis.call('SADD', '{ENDED}', ARGV[1])
end
redis.call('HSET', KEYS[1], 'record', ARGV[2], 'spec', ARGV[3], 'version', 1)
redis.call('ZADD', KEYS[2], 0, ARGV[1])
redis.call('SADD', KEYS[3], ARGV[1])
redis.call('XADD', KEYS[4], '*', 'kind', 'state', 'payload', ARGV[4])
stamp(KEYS[6])
{RECORD_DELIVERY}
redis.call('PUBLISH', '{CHANGES}', ARGV[1])
return 1
"""

# KEYS: job, state set before, state set after, events, the tenant's active jobs, the stamp of its jobs, its
# turns, its line, …
# ARGV: id, expected version, record, event kind or '', event payload, 1 if active, code of a failure or '', a
# word of this change alone, …
# A client whose answer was lost asks again: what it has written already is no other writer's.
SWAP = f"""
{STAMP}
if redis.call('HGET', KEYS[1], 'version') ~= ARGV[2] then
  return redis.call('HGET', KEYS[1], 'change') == ARGV[8] and 1 or 0
end
redis.call('HSET', KEYS[1], 'record', ARGV[3], 'change', ARGV[8])
redis.call('HINCRBY', KEYS[1], 'version', 1)
stamp(KEYS[6])
redis.call('SREM', KEYS[2], ARGV[1])
redis.call('SADD', KEYS[3], ARGV[1])
if ARGV[6] ~= '1' then
  redis.call('SADD', '{ENDED}', ARGV[1])
  redis.call('SREM', KEYS[5], ARGV[1])
  redis.call('SREM', KEYS[7], ARGV[1])
  redis.call('ZREM', KEYS[8], ARGV[1])
end
if ARGV[7] ~= '' then redis.call('HINCRBY', '{FAILURES}', ARGV[7], 1) end
if ARGV[4] ~= '' then
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', {MAX_EVENTS}, '*', 'kind', ARGV[4], 'payload', ARGV[5])
end
{RECORD_DELIVERY}
redis.call('PUBLISH', '{CHANGES}', ARGV[1])
return 1
"""

# KEYS: job, tenant index, state set, events, lease, the stamp of the tenant's jobs.
# ARGV: id, expected version. -1 while what follows from the job's end is not done.
DELETE = f"""
{STAMP}
if redis.call('SISMEMBER', '{ENDED}', ARGV[1]) == 1 then return -1 end
if redis.call('HGET', KEYS[1], 'version') ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1], KEYS[4], KEYS[5])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('SREM', KEYS[3], ARGV[1])
stamp(KEYS[6])
redis.call('PUBLISH', '{CHANGES}', ARGV[1])
return 1
"""

# KEYS: ended jobs. ARGV: id. Announced, as whoever follows the job waits for the events that come of its end.
SETTLE = f"""
if redis.call('SREM', KEYS[1], ARGV[1]) == 1 then redis.call('PUBLISH', '{CHANGES}', ARGV[1]) end
return 1
"""

# KEYS: job, events. ARGV: id, kind, payload, attempt or '', field of the job or ''.
# An event of a deleted job would never be removed. With an attempt, only the one that executes the job may
# speak: -1 for any other. With a field, the event is added only while the job lacks it: '' otherwise.
APPEND = f"""
local record = redis.call('HGET', KEYS[1], 'record')
if not record then return false end
if ARGV[4] ~= '' then
  local job = cjson.decode(record)
  if job.attempt ~= tonumber(ARGV[4]) or (job.state ~= 'running' and job.state ~= 'cancelling') then
    return -1
  end
end
if ARGV[5] ~= '' and redis.call('HSETNX', KEYS[1], ARGV[5], 1) == 0 then return '' end
local id = redis.call('XADD', KEYS[2], 'MAXLEN', '~', {MAX_EVENTS}, '*', 'kind', ARGV[2], 'payload', ARGV[3])
redis.call('PUBLISH', '{CHANGES}', ARGV[1])
return id
"""

# KEYS: turns, line. ARGV: the most turns or 0. Gives the id of the first in line, which has a turn now.
NEXT_TURN = """
local most = tonumber(ARGV[1])
if most > 0 and redis.call('SCARD', KEYS[1]) >= most then return false end
local first = redis.call('ZPOPMIN', KEYS[2])[1]
if not first then return false end
redis.call('SADD', KEYS[1], first)
return first
"""

# KEYS: lease. ARGV: attempt, milliseconds.
RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

# KEYS: lease. ARGV: attempt.
RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""
