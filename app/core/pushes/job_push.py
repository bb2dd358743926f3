"""Records the push that a job asks for: of its first artifact, once, however often this is tried."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from app.core.access.hub_tokens import HubTokens
from app.core.pushes.push_store import PushStore
from app.core.records.ids import push_id
from app.core.records.job import Job
from app.core.records.push import Push


def push_result(pushes: PushStore, tokens: HubTokens, job: Job) -> tuple[str, dict[str, Any]] | None:
    """Push the job's first artifact if requested; returns kind and payload of the event about it."""
    options = job.spec.push
    if options is None:
        return None
    if not job.artifacts:
        return "note", {"code": "nothing_to_push", "message": "not pushed: the job has published nothing"}
    push = Push(
        id=push_id(job.id),
        tenant=job.tenant,
        artifact=job.artifacts[0],
        job=job.id,
        options=options,
        has_hub_token=job.has_hub_token,
        created_at=datetime.now(UTC),
    )
    # Before the push is due: who takes it up finds its token.
    tokens.hand_over(job.id, push.id)
    pushes.create(push)
    return "push", {"id": push.id, "artifact": push.artifact, "state": push.state, "repo_id": options.repo_id}
