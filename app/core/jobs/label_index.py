"""A tenant's jobs by label: for each `key=value` a sorted set of ids, kept by the scripts of job_scripts.

LABELLED counts the jobs of each tenant that are in them. Where that is not the number of its jobs, some were
recorded by an earlier version, which had no such sets: the next search reads every job once and adds it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from redis import Redis

from app.core.changes.atomic_changes import Script
from app.core.changes.redis_keys import LABELLED, job_key, jobs_key, label_key

READ_AT_ONCE = 500

# Does nothing for a job that was deleted meanwhile.
ADD = Script(
    keys=("job",),
    more_keys="labels",
    args=("id",),
    body="""
if redis.call('EXISTS', job) == 0 then return 0 end
for _, label in ipairs(labels) do redis.call('ZADD', label, 0, id) end
return 1
""",
)

COMPLETE = Script(
    keys=("tenant_jobs",),
    args=("tenant",),
    body=f"""
redis.call('HSET', '{LABELLED}', tenant, redis.call('ZCARD', tenant_jobs))
return 1
""",
)


def label_keys(tenant: str, labels: Mapping[str, str]) -> list[str]:
    return [label_key(tenant, f"{name}={value}") for name, value in labels.items()]


class LabelIndex:
    """Finds jobs by their labels."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._add, self._complete = ADD.on(redis), COMPLETE.on(redis)

    def sets(self, tenant: str, labels: Mapping[str, str]) -> list[str]:
        """The keys of the sets that together hold the tenant's jobs with all these labels."""
        if labels and not self._is_complete(tenant):
            self._fill(tenant)
        return label_keys(tenant, labels)

    def _is_complete(self, tenant: str) -> bool:
        pipe = self._redis.pipeline()  # at one moment
        pipe.hget(LABELLED, tenant)
        pipe.zcard(jobs_key(tenant))
        indexed, jobs = pipe.execute()
        return int(indexed or 0) == int(jobs)

    def _fill(self, tenant: str) -> None:
        ids = [job_id.decode() for job_id in self._redis.zrange(jobs_key(tenant), 0, -1)]
        for start in range(0, len(ids), READ_AT_ONCE):
            pipe = self._redis.pipeline(transaction=False)
            for job_id in ids[start : start + READ_AT_ONCE]:
                pipe.hget(job_key(job_id), "spec")
            for job_id, spec in zip(ids[start : start + READ_AT_ONCE], pipe.execute(), strict=True):
                labels = {} if spec is None else json.loads(spec).get("labels", {})
                if labels:
                    self._add(job=job_key(job_id), labels=label_keys(tenant, labels), id=job_id)
        self._complete(tenant_jobs=jobs_key(tenant), tenant=tenant)
