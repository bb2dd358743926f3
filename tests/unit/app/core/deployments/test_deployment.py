from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from app.core.deployments.deployment import (
    Deployment,
    DeploymentSpec,
    DeploymentState,
    Goal,
    LiveDeployment,
    Replica,
    ReplicaState,
)
from app.core.records.ids import new_id
from app.core.records.job import Problem

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def live(*states: ReplicaState, engine: str = "auto", replicas: int = 2, **changes: object) -> LiveDeployment:
    spec = DeploymentSpec.model_validate(
        {"artifact": new_id("art"), "name": "tiny", "engine": engine, "replicas": replicas}
    )
    deployment = Deployment(id=new_id("dep"), tenant="t", spec=spec, created_at=NOW).model_copy(
        update=changes
    )
    servers = tuple(
        Replica(deployment=deployment.id, slot=slot, owner="o", worker="w", engine="transformers",
                state=state, url="http://h:1" if state is ReplicaState.READY else None, since=NOW)
        for slot, state in enumerate(states)
    )  # fmt: skip
    return LiveDeployment(deployment=deployment, replicas=servers)


@pytest.mark.parametrize(
    ("found", "state"),
    [
        (live(), DeploymentState.STARTING),
        (live(ReplicaState.LOADING), DeploymentState.STARTING),
        (live(ReplicaState.READY, ReplicaState.LOADING), DeploymentState.READY),
        (live(ReplicaState.RESTARTING, ReplicaState.RESTARTING), DeploymentState.STARTING),
        (live(ReplicaState.DRAINING, goal=Goal.REST), DeploymentState.DRAINING),
        (live(goal=Goal.REST), DeploymentState.STOPPED),
        (live(ReplicaState.READY, goal=Goal.REMOVE), DeploymentState.DRAINING),
        (live(error=Problem(code="c", message="m")), DeploymentState.FAILED),
    ],
)
def test_the_state_follows_from_goal_and_replicas(found: LiveDeployment, state: DeploymentState) -> None:
    assert found.state is state


def test_a_reason_names_what_is_missing() -> None:
    assert live(ReplicaState.READY, ReplicaState.READY).reason([("transformers",)]) == ""
    assert "no worker takes the queue" in live().reason([])
    assert "no worker has vllm" in live(engine="vllm").reason([("transformers",)])
    assert "1 of 2 replicas wait: for a worker with a free slot" in live(ReplicaState.READY).reason(
        [("transformers",)]
    )
    assert "replica 0: loading" in live(ReplicaState.LOADING).reason([("transformers",)])


def test_names_are_fit_for_requests_and_paths() -> None:
    for name in ("", "-a", "a/b", "a b", "a" * 97, "ä"):
        with pytest.raises(ValidationError):
            DeploymentSpec(artifact=new_id("art"), name=name)
    assert DeploymentSpec(artifact=new_id("art"), name="Llama-3.1:8b_w4").name


def test_what_is_no_artifacts_id_is_told_with_where_to_find_one() -> None:
    with pytest.raises(ValidationError, match=r"'art_x' is not an artifact's id .* `nibble artifacts`"):
        DeploymentSpec.model_validate({"artifact": "art_x", "name": "tiny"})
