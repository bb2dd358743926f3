"""How a deployment's record changes: by its owner, by requests, and by what becomes of its servers.

Each function gives the record after the change; one that does not apply gives the same record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.core.deployments.deployment import Deployment, Goal, Replacement, Replica, Served
from app.core.errors import Conflict
from app.core.records.job import Problem


def with_changes(deployment: Deployment, **changes: Any) -> Deployment:
    return deployment.model_copy(update=changes)


# By requests and idleness


def awakened(deployment: Deployment) -> Deployment:
    """The deployment started again by a request while it was idle."""
    return moved(deployment, Goal.REST, Goal.SERVE)


def resting(deployment: Deployment) -> Deployment:
    """The deployment unloaded for want of requests, unless a replacement is under way."""
    return deployment if deployment.incoming is not None else moved(deployment, Goal.SERVE, Goal.REST)


def moved(deployment: Deployment, goal: Goal, to: Goal) -> Deployment:
    return with_changes(deployment, goal=to) if deployment.goal is goal else deployment


# By its owner


def require_present(deployment: Deployment) -> None:
    """Raises Conflict for a deployment that is being deleted."""
    if deployment.goal is Goal.REMOVE:
        raise Conflict(
            f"the deployment {deployment.id} is deleted",
            code="deployment_deleted",
            remedy="its name is free: make another one",
        )


def removed(deployment: Deployment) -> Deployment:
    return with_changes(deployment, goal=Goal.REMOVE)


def paused(deployment: Deployment) -> Deployment:
    """The deployment stopped until its owner resumes it."""
    return deployment if deployment.goal is Goal.REMOVE else with_changes(deployment, goal=Goal.PAUSE)


def resumed(deployment: Deployment) -> Deployment:
    """The deployment after a pause; one that failed is tried again."""
    if deployment.error is not None:
        deployment = succeeded_by(deployment, deployment.spec.served)
    return moved(deployment, Goal.PAUSE, Goal.SERVE)


def scaled(deployment: Deployment, replicas: int) -> Deployment:
    spec = deployment.spec
    if spec.replicas == replicas:
        return deployment
    most = max(deployment.most_replicas, spec.replicas, replicas)
    return with_changes(deployment, spec=spec.model_copy(update={"replicas": replicas}), most_replicas=most)


def replaced(deployment: Deployment, served: Served) -> Deployment:
    """The deployment whose servers shall be others; at once where none serve.

    To replace by what serves already ends a replacement that is under way, and forgets one that has failed.
    """
    if served == deployment.spec.served:
        return with_changes(deployment, replacement=None)
    if deployment.incoming is not None and deployment.incoming.served == served:
        return deployment
    if not deployment.wants_servers:
        return succeeded_by(deployment, served)
    generation = deployment.generations + 1
    return with_changes(
        deployment,
        generations=generation,
        replacement=Replacement(generation=generation, served=served),
    )


def succeeded_by(deployment: Deployment, served: Served) -> Deployment:
    """The deployment of the next generation, without a time in which both serve."""
    generation = deployment.generations + 1
    return with_changes(
        deployment,
        spec=deployment.spec.serving(served),
        generation=generation,
        generations=generation,
        side=1 - deployment.side,
        replacement=None,
        error=None,
        setback="",
    )


# By what becomes of its servers


def promoted(deployment: Deployment, generation: int) -> Deployment:
    """The deployment whose replacement serves."""
    incoming = deployment.incoming
    if incoming is None or incoming.generation != generation:
        return deployment
    return with_changes(
        deployment,
        spec=deployment.spec.serving(incoming.served),
        generation=generation,
        side=1 - deployment.side,
        replacement=None,
        setback="",
    )


def loaded(deployment: Deployment, load_s: float | None) -> Deployment:
    """The deployment after a replica became ready."""
    return with_changes(deployment, load_s=load_s, setback="")


def bereft(deployment: Deployment, replica: Replica, others: Sequence[Replica], error: Problem) -> Deployment:
    """The deployment after a replica that could not be had; `others` are its ready ones.

    While others of the same kind serve, it is tried again. Else the replacement has failed, or, where
    nothing else could serve, the deployment.
    """
    incoming = deployment.incoming
    if deployment.goal is Goal.REMOVE:
        return deployment
    if incoming is not None and replica.generation == incoming.generation:
        if any(other.generation == replica.generation for other in others):
            return with_changes(deployment, setback=error.message)
        return with_changes(deployment, replacement=incoming.model_copy(update={"error": error}))
    if replica.generation != deployment.generation:
        return deployment
    if others or incoming is not None:
        return with_changes(deployment, setback=error.message)
    return with_changes(deployment, error=error)
