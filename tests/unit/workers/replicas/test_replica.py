"""How often a replica's server is started again, and with which engine."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.core.deployments.deployment import Deployment, DeploymentSpec, Replica, ReplicaState
from app.core.errors import ModelRefused
from app.core.records.ids import new_id
from app.core.settings import Settings
from app.core.storage.artifact_store import ArtifactStore
from app.core.storage.object_store import ObjectStore
from workers.replicas import replica as serving_replica
from workers.replicas.artifact_cache import ArtifactCache
from workers.replicas.replica import MAX_FAILURES, ReplicaKeeper, ServingContext
from workers.replicas.served_files import ServedFiles
from workers.replicas.server_process import ServerEnded

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ENDED = ServerEnded("the inference server ended with signal 9")


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReplicaKeeper:
    monkeypatch.setattr(serving_replica, "BACKOFF_S", (0.0,) * MAX_FAILURES)
    objects = ObjectStore("memory:///")
    cache = ArtifactCache(tmp_path, objects)
    context = ServingContext(Settings(), ArtifactStore(objects), cache, "127.0.0.1", "cpu")
    spec = DeploymentSpec(artifact=new_id("art"), name="tiny")
    deployment = Deployment(id=new_id("dep"), tenant="t", spec=spec, created_at=NOW)
    replica = Replica(
        deployment=deployment.id, slot=0, owner="o", worker="w", engine="transformers", since=NOW
    )
    return ReplicaKeeper(context, deployment, replica)


def test_a_server_that_never_becomes_ready_is_given_up(keeper: ReplicaKeeper) -> None:
    for _ in range(MAX_FAILURES):
        keeper._note_failure(ENDED)
    with pytest.raises(ServerEnded):
        keeper._note_failure(ENDED)


def test_a_server_that_was_ready_is_started_again_however_often_it_ends(keeper: ReplicaKeeper) -> None:
    for count in range(1, 3 * MAX_FAILURES):
        keeper._publish(ReplicaState.READY, url="http://127.0.0.1:1")
        keeper._note_failure(ENDED)
        assert (keeper.replica.state, keeper.replica.restarts) == (ReplicaState.RESTARTING, count)


@pytest.mark.parametrize(("why_own", "engine"), [(None, "vllm"), ("it is a GGUF file", "transformers")])
def test_on_a_host_with_vllm_our_own_server_takes_what_vllm_can_not(
    keeper: ReplicaKeeper, why_own: str | None, engine: str
) -> None:
    keeper.replica = keeper.replica.model_copy(update={"engine": "vllm"})
    keeper._choose_engine(ServedFiles(Path("/"), why_own=why_own))
    assert keeper.replica.engine == engine


def test_vllm_is_not_replaced_where_it_was_asked_for(keeper: ReplicaKeeper) -> None:
    spec = keeper.deployment.spec.model_copy(update={"engine": "vllm"})
    keeper.deployment = keeper.deployment.model_copy(update={"spec": spec})
    keeper.replica = keeper.replica.model_copy(update={"engine": "vllm"})
    with pytest.raises(ModelRefused, match="GGUF"):
        keeper._choose_engine(ServedFiles(Path("/"), why_own="it is a GGUF file"))
