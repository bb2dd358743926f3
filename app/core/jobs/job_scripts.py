"""Lua scripts that change a job's keys in one step.

A webhook's delivery is recorded in the same step as the change that it reports, so neither is lost. So is the
end of a job, so that it is followed up even if the process dies (outcome).
"""

from __future__ import annotations

from app.core.changes.atomic_changes import Script
from app.core.changes.redis_keys import ENDED, FAILURES, JOB_CHANGES, LABELLED, LINES, WORKERS
from app.core.changes.stamps import STAMP
from app.core.outgoing.delivery_scripts import DELIVERY_ARGS, DELIVERY_KEYS, RECORD_DELIVERY

MAX_EVENTS = 10_000
IN_QUEUE = 10  # added to a job's rank in its tenant's line while it is in the queue and no worker has it
RANKS = range(3)
WORKERS_A_PLACE = 32  # a claim queues its successor after some tenths of a second, and jobs end meanwhile

JOB_KEYS = ("job", "state", "events", "active_jobs", "turns", "line", "jobs_stamp")

# Functions of scripts: whether a tenant may have one more job queued or running, and one more of this rank in
# the queue: at least `least`, and more where many workers take them. 0 is no limit.
ROOM = f"""
local function has_turn(turns, most)
  return tonumber(most) == 0 or redis.call('SCARD', turns) < tonumber(most)
end
local function has_room(line, rank, least)
  if tonumber(least) == 0 then return true end
  local queued = rank + {IN_QUEUE}
  local places = math.max(tonumber(least), math.floor(redis.call('ZCARD', '{WORKERS}') / {WORKERS_A_PLACE}))
  return redis.call('ZCOUNT', line, queued, queued) < places
end
"""

CREATE = Script(
    keys=(*JOB_KEYS, "tenant_jobs", *DELIVERY_KEYS),
    more_keys="labels",
    args=("id", "tenant", "record", "spec", "payload", "is_active", "most_active", "most_turns",
          "least_queued", "rank", *DELIVERY_ARGS),  # most: 0 is no limit; rank: in line
    body=f"""
{STAMP}
{ROOM}
if redis.call('EXISTS', job) == 1 then return 0 end
if is_active == '1' then
  local most = tonumber(most_active)
  if most > 0 and redis.call('SCARD', active_jobs) >= most then return -1 end
  redis.call('SADD', active_jobs, id)
  local is_next = redis.call('ZCOUNT', line, rank, rank) == 0 or least_queued == '0'
  if is_next and has_turn(turns, most_turns) and has_room(line, rank, least_queued) then
    redis.call('SADD', turns, id)
    redis.call('ZADD', line, rank + {IN_QUEUE}, id)
  else
    redis.call('ZADD', line, rank, id)
  end
  redis.call('SADD', '{LINES}', tenant)
else
  redis.call('SADD', '{ENDED}', id)
end
redis.call('HSET', job, 'record', record, 'spec', spec, 'version', 1)
redis.call('ZADD', tenant_jobs, 0, id)
for _, label in ipairs(labels) do redis.call('ZADD', label, 0, id) end
redis.call('HINCRBY', '{LABELLED}', tenant, 1)
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
if state ~= state_before then
  redis.call('SREM', state_before, id)
  redis.call('SADD', state, id)
  redis.call('ZREM', line, id)
end
if is_active ~= '1' then
  redis.call('SADD', '{ENDED}', id)
  redis.call('SREM', active_jobs, id)
  redis.call('SREM', turns, id)
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
    more_keys="labels",
    args=("id", "tenant", "version"),
    body=f"""
{STAMP}
if redis.call('SISMEMBER', '{ENDED}', id) == 1 then return -1 end
if redis.call('HGET', job, 'version') ~= version then return 0 end
redis.call('DEL', job, events, lease)
redis.call('ZREM', tenant_jobs, id)
for _, label in ipairs(labels) do redis.call('ZREM', label, id) end
if redis.call('HINCRBY', '{LABELLED}', tenant, -1) <= 0 then redis.call('HDEL', '{LABELLED}', tenant) end
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

# Gives the id of the first in line for which there is room, which has a turn now and is to be queued.
NEXT_TURN = Script(
    keys=("turns", "line"),
    args=("most", "least_queued"),  # 0 is no limit
    body=f"""
{ROOM}
for rank = {RANKS.start}, {RANKS.stop - 1} do
  local first = redis.call('ZRANGEBYSCORE', line, rank, rank, 'LIMIT', 0, 1)[1]
  if first and has_turn(turns, most) and has_room(line, rank, least_queued) then
    redis.call('SADD', turns, first)
    redis.call('ZADD', line, rank + {IN_QUEUE}, first)
    return first
  end
end
return false
""",
)

# Strikes out jobs that left the queue while a worker of an earlier version, which does not do it, took them.
STRIKE = Script(
    keys=("line", "waiting"),
    args=("tenant",),
    body=f"""
for _, id in ipairs(redis.call('ZRANGEBYSCORE', line, {IN_QUEUE}, '+inf')) do
  if redis.call('SISMEMBER', waiting, id) == 0 then redis.call('ZREM', line, id) end
end
if redis.call('ZCARD', line) == 0 then redis.call('SREM', '{LINES}', tenant) end
return 1
""",
)

# The least of a set of ids, which is the oldest, without sending them all.
OLDEST = Script(
    keys=("jobs",),
    body="""
local oldest = false
for _, id in ipairs(redis.call('SMEMBERS', jobs)) do
  if not oldest or id < oldest then oldest = id end
end
return oldest
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
