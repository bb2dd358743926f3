"""Deploys a job's first artifact as its `deploy` asks: once, however often this is tried."""

from __future__ import annotations

from typing import Any

from app.core.deployments.deployment import DeploymentSpec
from app.core.deployments.deployment_store import DeploymentStore
from app.core.errors import Conflict
from app.core.records.ids import deployment_id
from app.core.records.job import Job


def deploy_result(deployments: DeploymentStore, job: Job) -> tuple[str, dict[str, Any]] | None:
    """Deploy the job's first artifact if requested; returns kind and payload of the event about it.

    A refused deployment does not change the success of the job.
    """
    options = job.spec.deploy
    if options is None:
        return None
    if not job.artifacts:
        return "note", {"code": "nothing_to_deploy", "message": "not deployed: the job has published nothing"}
    spec = DeploymentSpec(artifact=job.artifacts[0], **options.model_dump())
    try:
        # The id follows from the job: a later attempt makes no second deployment.
        deployment = deployments.create(job.tenant, spec, deployment_id=deployment_id(job.id), job=job.id)
    except Conflict as refusal:
        return "note", {"code": refusal.code, "message": f"not deployed: {refusal.message}"}
    return "deployed", {"deployment": deployment.id, "name": spec.name, "artifact": spec.artifact}
