"""Follows up the end of a job. One table holds for every way in which a job can end.

| | succeeded | failed | cancelled |
|---|---|---|---|
| its deployment, if `deploy` asks for one | recorded | | |
| its push, if `push` asks for one | recorded, with the job's hub token | | |
| its hub token | removed | removed | removed |
| later jobs of the same contents | are given its artifacts | | |
| its artifacts, as far as they are visible | are counted for the tenant | are withdrawn | are withdrawn |
| its checkpoints | removed | kept for a retry | removed |
| its entry in the queue | | removed | removed |
| its turn | goes to the tenant's next job | the same | the same |

The webhook's message and the event that tells of the end are written in the step that ends the job, which
also notes the job's id (job_scripts). Until all of the table is done, janitors do it again: each part may be
done any number of times, by several processes at once, and leads to the same.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from redis.exceptions import RedisError

from app.core.access.hub_tokens import HubTokens
from app.core.access.limits import TenantLimits
from app.core.deployments.deployment_store import DeploymentStore
from app.core.deployments.job_deployment import deploy_result
from app.core.errors import NibbleError, RecordUnreadable
from app.core.jobs.job_queue import JobQueue
from app.core.jobs.job_store import JobStore
from app.core.jobs.turns import Turns
from app.core.pushes.job_push import push_result
from app.core.pushes.push_store import PushStore
from app.core.records.job import Job
from app.core.storage.object_store import ObjectStore
from app.core.storage.published import count_stored, read_manifest, withdraw
from app.core.storage.reuse import JobResult, ReuseIndex
from app.core.storage.storage_keys import checkpoint_prefix

log = logging.getLogger(__name__)

DEPLOYMENT = "deployment"  # the name of the event that tells what became of `deploy`
PUSH = "push"  # the same of `push`


@dataclass(frozen=True)
class Outcome:
    """Follows up the ends of jobs."""

    jobs: JobStore
    queue: JobQueue
    turns: Turns
    objects: ObjectStore
    deployments: DeploymentStore
    reuse: ReuseIndex
    limits: TenantLimits
    pushes: PushStore
    hub_tokens: HubTokens

    def follow_up(self, job_id: str) -> bool:
        """Follow up the job's end; False if some of it could not be done.

        A janitor does the rest later. The end itself stands.
        """
        try:
            self.settle(job_id)
        except (RedisError, NibbleError) as fault:
            log.warning("what follows from the end of %s is left to a janitor: %s", job_id, fault)
            return False
        return True

    def settle(self, job_id: str) -> None:
        """As `follow_up`, but raises RedisError, or NibbleError of storage and records."""
        if self.jobs.is_settled(job_id):
            return
        job = self.jobs.load(job_id)
        # Steps that need Redis alone come first, so that a storage failure holds up no turn.
        if job.has_no_result:
            self.queue.remove(job)
        else:
            self._deploy(job)
            self._push(job)
            self._index(job)
        self.hub_tokens.forget(job_id)
        self.turns.give(job.tenant)
        if job.has_no_result:
            withdraw(self.objects, self.limits, job)
        else:
            self._count(job)
        if not job.may_need_checkpoints:
            self.objects.delete_prefix(checkpoint_prefix(job_id))
        self.jobs.settle(job_id)

    def _deploy(self, job: Job) -> None:
        # Once: a deployment that was deleted since, or refused, is not tried again.
        if self.jobs.has_appended(job.id, DEPLOYMENT):
            return
        event = deploy_result(self.deployments, job)
        if event is not None:
            self.jobs.append_once(job.id, DEPLOYMENT, *event)

    def _push(self, job: Job) -> None:
        if self.jobs.has_appended(job.id, PUSH):
            return
        event = push_result(self.pushes, self.hub_tokens, job)
        if event is not None:
            self.jobs.append_once(job.id, PUSH, *event)

    def _index(self, job: Job) -> None:
        result = JobResult(job=job.reused_from or job.id, artifacts=job.artifacts)
        for contents in filter(None, (job.fingerprint, job.contents)):
            self.reuse.note(job.tenant, contents, result)

    def _count(self, job: Job) -> None:
        for artifact_id in job.artifacts:
            try:
                manifest = read_manifest(self.objects, artifact_id)
            except RecordUnreadable as fault:  # the collection of garbage counts it once it can be read
                log.warning("not counted with %s: %s", job.id, fault.message)
                continue
            if manifest is not None:
                count_stored(self.objects, self.limits, manifest)
