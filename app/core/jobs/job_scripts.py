"""Lua scripts that change a job's keys in one step.

A webhook's delivery is recorded in the same step as the change that it reports, so neither is lost. So is the
end of a job, so that it is followed up even if the process dies (outcome).
"""

from __future__ import annotations

from app.core.changes.atomic_changes import Script
from app.core.changes.redis_keys import ENDED, FAILURES, JOB_CHANGES, LINES
from app.core.changes.stamps import STAMP

MAX_EVENTS = 10_000
DELIVERIES_KEPT_S = 30 * 24 * 3600

JOB_KEYS = ("job", "state", "events", "active_jobs", "turns", "line", "jobs_stamp")
DELIVERY_KEYS = ("delivery", "deliveries", "due")
DELIVERY_ARGS = ("message_id", "message")  # '' for no message
RECORD_DELIVERY = f"""
if message_id ~= '' then
  redis.call('SET', delivery, message, 'EX', {DELIVERIES_KEPT_S})
  redis.call('ZADD', deliveries, 0, message_id)
  redis.call('EXPIRE', deliveries, {DELIVERIES_KEPT_S})
  redis.call('ZADD', due, redis.call('TIME')[1], message_id)
end
"""

CREATE = Script(
    keys=(*JOB_KEYS, "tenant_jobs", *DELIVERY_KEYS),
    args=("id", "tenant", "record", "spec", "payload", "is_active", "most_active", "most_turns", "rank",
          *DELIVERY_ARGS),  # most: 0 is no limit; rank: in line
    body=f"""
{STAMP}
if redis.call('EXISTS', job) == 1 then return 0 end
if is_active == '1' then
  local most, turns_to_give = tonumber(most_active), tonumber(most_turns)
  if most > 0 and redis.call('SCARD', active_jobs) >= most then return -1 end
  redis.call('SADD', active_jobs, id)
  if turns_to_give > 0 and redis.call('SCARD', turns) >= turns_to_give then
    redis.call('ZADD', line, rank, id)
    redis.call('SADD', '{LINES}', tenant)
  else
    redis.call('SADD', turns, id)
  end
else
  redis.call('SADD', '{ENDED}', id)
end
redis.call('HSET', job, 'record', record, 'spec', spec, 'version', 1)
redis.call('ZADD', tenant_jobs, 0, id)
redis.call('SADD', state, id)
redis.call('XADD', events, '*', 'kind', 'state', 'payload', payload)
stamp(jobs_stamp)
{RECORD_DELIVERY}
redis.call('PUBLISH', '{JOB_CHANGES}', id)
return 1
""",
)  # fmt: skip

# A client that lost the answer repeats the call. `change` is random, so the script recognises its own write
# and reports success instead of a collision.
SWAP = Script(
    keys=(*JOB_KEYS, "state_before", *DELIVERY_KEYS),
    args=("id", "version", "record", "change", "kind", "payload", "is_active", "failure", *DELIVERY_ARGS),
    body=f"""
{STAMP}
if redis.call('HGET', job, 'version') ~= version then
  return redis.call('HGET', job, 'change') == change and 1 or 0
end
redis.call('HSET', job, 'record', record, 'change', change)
redis.call('HINCRBY', job, 'version', 1)
stamp(jobs_stamp)
redis.call('SREM', state_before, id)
redis.call('SADD', state, id)
if is_active ~= '1' then
  redis.call('SADD', '{ENDED}', id)
  redis.call('SREM', active_jobs, id)
  redis.call('SREM', turns, id)
  redis.call('ZREM', line, id)
end
if failure ~= '' then redis.call('HINCRBY', '{FAILURES}', failure, 1) end
if kind ~= '' then
  redis.call('XADD', events, 'MAXLEN', '~', {MAX_EVENTS}, '*', 'kind', kind, 'payload', payload)
end
{RECORD_DELIVERY}
redis.call('PUBLISH', '{JOB_CHANGES}', id)
return 1
""",
)

# -1 while what follows from the job's end is not done.
DELETE = Script(
    keys=("job", "state", "events", "lease", "tenant_jobs", "jobs_stamp"),
    args=("id", "version"),
    body=f"""
{STAMP}
if redis.call('SISMEMBER', '{ENDED}', id) == 1 then return -1 end
if redis.call('HGET', job, 'version') ~= version then return 0 end
redis.call('DEL', job, events, lease)
redis.call('ZREM', tenant_jobs, id)
redis.call('SREM', state, id)
stamp(jobs_stamp)
redis.call('PUBLISH', '{JOB_CHANGES}', id)
return 1
""",
)

# Publishes the change: those who follow the job wait for the events of its end.
SETTLE = Script(
    args=("id",),
    body=f"""
if redis.call('SREM', '{ENDED}', id) == 1 then redis.call('PUBLISH', '{JOB_CHANGES}', id) end
return 1
""",
)

# Returns nothing for a deleted job: its event would never be removed. With `attempt`, -1 unless that attempt
# executes the job. With `once`, '' if that field of the job is set already.
APPEND = Script(
    keys=("job", "events"),
    args=("id", "kind", "payload", "attempt", "once"),
    body=f"""
local record = redis.call('HGET', job, 'record')
if not record then return false end
if attempt ~= '' then
  local fields = cjson.decode(record)
  if fields.attempt ~= tonumber(attempt) or (fields.state ~= 'running' and fields.state ~= 'cancelling') then
    return -1
  end
end
if once ~= '' and redis.call('HSETNX', job, once, 1) == 0 then return '' end
local event = redis.call('XADD', events, 'MAXLEN', '~', {MAX_EVENTS}, '*', 'kind', kind, 'payload', payload)
redis.call('PUBLISH', '{JOB_CHANGES}', id)
return event
""",
)

# Gives the id of the first in line, which has a turn now.
NEXT_TURN = Script(
    keys=("turns", "line"),
    args=("most",),  # 0 is no limit
    body="""
most = tonumber(most)
if most > 0 and redis.call('SCARD', turns) >= most then return false end
local first = redis.call('ZPOPMIN', line)[1]
if not first then return false end
redis.call('SADD', turns, first)
return first
""",
)

RENEW = Script(
    keys=("lease",),
    args=("attempt", "milliseconds"),
    body="""
if redis.call('GET', lease) ~= attempt then return 0 end
return redis.call('PEXPIRE', lease, milliseconds)
""",
)

RELEASE = Script(
    keys=("lease",),
    args=("attempt",),
    body="""
if redis.call('GET', lease) ~= attempt then return 0 end
return redis.call('DEL', lease)
""",
)
