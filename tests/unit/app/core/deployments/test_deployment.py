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
from app.core.deployments.reasons import ServingWorker, reason
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
        (live(ReplicaState.DRAINING, goal=Goal.PAUSE), DeploymentState.PAUSED),
        (live(goal=Goal.PAUSE, error=Problem(code="c", message="m")), DeploymentState.PAUSED),
    ],
)
def test_the_state_follows_from_goal_and_replicas(found: LiveDeployment, state: DeploymentState) -> None:
    assert found.state is state


def test_a_reason_names_what_is_missing() -> None:
    workers = [ServingWorker(("transformers",), servers=1, slots=4)]
    assert reason(live(ReplicaState.READY, ReplicaState.READY), workers) == ""
    assert "no worker takes the queue" in reason(live(), [])
    assert "no worker has vllm" in reason(live(engine="vllm"), workers)
    waits = "1 of 2 replicas wait: for a worker with a free slot"
    assert waits in reason(live(ReplicaState.READY), workers)
    assert "replica 0: loading" in reason(live(ReplicaState.LOADING), workers)


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ([(4, 4)], "1 of 2 replicas wait: none of 4 slots is free (1 worker); NIBBLE_SERVE_SLOTS gives"),
        ([(4, 4), (1, 1)], "none of 5 slots is free (2 workers); NIBBLE_SERVE_SLOTS gives a worker more"),
        ([(4, 4), (1, 2)], "for a worker with a free slot"),
        ([(4, 4), (1, 0)], "for a worker with a free slot"),  # of an earlier version: not known
    ],
)
def test_a_reason_names_the_setting_that_gives_more_slots(workers: list[tuple[int, int]], said: str) -> None:
    all_full = [ServingWorker(("transformers",), *counts) for counts in workers]
    other = ServingWorker(("vllm",), servers=0, slots=4)  # its free slots are of no use
    spec = live(ReplicaState.READY, engine="transformers")
    assert said in reason(spec, [*all_full, other])


def test_names_are_fit_for_requests_and_paths() -> None:
    for name in ("", "-a", "/a", "a/", "a//b", "a/../b", "a b", "a" * 97, "ä"):
        with pytest.raises(ValidationError):
            DeploymentSpec(artifact=new_id("art"), name=name)
    for name in ("Llama-3.1:8b_w4", "org/model"):
        assert DeploymentSpec(artifact=new_id("art"), name=name).name == name


def test_what_is_no_artifacts_id_is_told_with_where_to_find_one() -> None:
    with pytest.raises(ValidationError, match=r"'art_x' is not an artifact's id .* `nibble artifacts`"):
        DeploymentSpec.model_validate({"artifact": "art_x", "name": "tiny"})
