"""Which replicas of a deployment live: every state of its record and its replicas."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from app.core.deployments.deployment import (
    Deployment,
    DeploymentSpec,
    Goal,
    LiveDeployment,
    Replacement,
    Replica,
    ReplicaState,
    Served,
)
from app.core.deployments.placement import free_slots, is_replaced, placement, ready_count
from app.core.deployments.transitions import promoted
from app.core.records.ids import new_id
from app.core.records.job import Problem

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OLD, NEW = 1, 2
FAULT = Problem(code="c", message="m")
R, L, D = ReplicaState.READY, ReplicaState.LOADING, ReplicaState.DRAINING
Held = dict[int, tuple[int, ReplicaState]]  # slot: generation and state


def live(held: Held, *, replicas: int = 2, replacing: bool = False, **changes: object) -> LiveDeployment:
    spec = DeploymentSpec(artifact=new_id("art"), name="tiny", replicas=replicas)
    deployment = Deployment(id=new_id("dep"), tenant="t", spec=spec, created_at=NOW)
    if replacing:
        incoming = Replacement(generation=NEW, served=Served(artifact=new_id("art")))
        changes = {"replacement": incoming, "generations": NEW, **changes}
    servers = tuple(
        Replica(deployment=deployment.id, slot=slot, generation=generation, owner="o", worker="w", since=NOW,
                engine="transformers", state=state, url="http://h:1" if state is R else None)
        for slot, (generation, state) in held.items()
    )  # fmt: skip
    return LiveDeployment(deployment=deployment.model_copy(update=changes), replicas=servers)


@pytest.mark.parametrize(
    ("case", "served"),
    [
        # Nothing is served but by SERVE without an error.
        (live({0: (OLD, R)}, goal=Goal.REST), {}),
        (live({0: (OLD, R)}, goal=Goal.PAUSE), {}),
        (live({0: (OLD, R)}, goal=Goal.REMOVE), {}),
        (live({0: (OLD, L)}, error=FAULT), {}),
        (live({0: (OLD, R)}, goal=Goal.PAUSE, replacing=True), {}),
        # As many as are asked for, whatever they do.
        (live({}), {0: OLD, 1: OLD}),
        (live({0: (OLD, R), 1: (OLD, D)}), {0: OLD, 1: OLD}),
        # Scaled down: the slots beyond have no generation, so what is in them ends.
        (live({0: (OLD, R), 1: (OLD, R), 2: (OLD, R)}, replicas=1), {0: OLD}),
        # Replacing: one of the new beside all of the old,
        (live({0: (OLD, R), 1: (OLD, R)}, replacing=True), {0: OLD, 1: OLD, 16: NEW}),
        (live({0: (OLD, R), 1: (OLD, R), 16: (NEW, L)}, replacing=True), {0: OLD, 1: OLD, 16: NEW}),
        # the next one once it is ready, and one of the old ends;
        (live({0: (OLD, R), 1: (OLD, R), 16: (NEW, R)}, replacing=True), {0: OLD, 16: NEW, 17: NEW}),
        (live({0: (OLD, R), 1: (OLD, D), 16: (NEW, R)}, replacing=True), {0: OLD, 16: NEW, 17: NEW}),
        (live({0: (OLD, R), 16: (NEW, R), 17: (NEW, L)}, replacing=True), {0: OLD, 16: NEW, 17: NEW}),
        (live({0: (OLD, R), 16: (NEW, R), 17: (NEW, R)}, replacing=True), {16: NEW, 17: NEW}),
        # of the old the one that does not answer ends first;
        (live({0: (OLD, L), 1: (OLD, R), 16: (NEW, R)}, replacing=True), {1: OLD, 16: NEW, 17: NEW}),
        # if the new one is lost, the old one comes back, and if all are, both begin again.
        (live({0: (OLD, R)}, replacing=True), {0: OLD, 1: OLD, 16: NEW}),
        (live({}, replacing=True), {0: OLD, 1: OLD, 16: NEW}),
        (live({}, replicas=1, replacing=True), {0: OLD, 16: NEW}),
        (live({16: (NEW, R)}, replicas=1, replacing=True), {16: NEW}),
        # New ones that are there are kept though the first is not ready any more.
        (live({0: (OLD, R), 16: (NEW, L), 17: (NEW, L)}, replacing=True), {0: OLD, 1: OLD, 16: NEW, 17: NEW}),
        # Scaled while it is replaced.
        (live({0: (OLD, R), 16: (NEW, R)}, replicas=1, replacing=True), {16: NEW}),
        (live({0: (OLD, R), 16: (NEW, R)}, replicas=3, replacing=True), {0: OLD, 1: OLD, 16: NEW, 17: NEW}),
    ],
)  # fmt: skip
def test_the_generation_of_each_slot(case: LiveDeployment, served: dict[int, int]) -> None:
    assert placement(case) == served
    held = {replica.slot for replica in case.replicas}
    assert free_slots(case) == {slot: each for slot, each in served.items() if slot not in held}


def test_a_replacement_that_failed_leaves_the_old_ones() -> None:
    failed = Replacement(generation=NEW, served=Served(artifact=new_id("art")), error=FAULT)
    case = live({0: (OLD, R), 16: (NEW, L)}, replacement=failed, generations=NEW)
    assert placement(case) == {0: OLD, 1: OLD}
    assert set(case.deployment.slots) == {0, 1, 16, 17}


def test_a_second_replacement_waits_for_the_slots_of_the_first_one() -> None:
    third = Replacement(generation=3, served=Served(artifact=new_id("art")))
    case = live({0: (OLD, R), 16: (NEW, R)}, replicas=1, replacement=third, generations=3)
    assert placement(case) == {0: OLD, 16: 3}  # so what has the second generation ends
    assert free_slots(case) == {}


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
def test_step_by_step_never_fewer_are_ready_than_before_nor_more_than_one_too_many(replicas: int) -> None:
    """Carried out by workers that start and end one at a time, until the replacement serves alone."""
    held: Held = dict.fromkeys(range(replicas), (OLD, R))
    for _ in range(10 * replicas):
        case = live(held, replicas=replicas, replacing=True)
        assert len(case.ready) >= replicas
        assert len([state for _, state in held.values() if state is not D]) <= replicas + 1
        if is_replaced(case):
            break
        served = placement(case)
        ending = [slot for slot, (generation, _) in held.items() if served.get(slot) != generation]
        if ending:
            held.pop(ending[0])
            continue
        loading = [slot for slot, (_, state) in held.items() if state is L]
        if loading:
            held[loading[0]] = (NEW, R)
            continue
        slot, generation = next(iter(free_slots(case).items()))
        held[slot] = (generation, L)
    assert ready_count(case, NEW) == replicas
    after = case.model_copy(update={"deployment": promoted(case.deployment, NEW)})
    assert placement(after) == dict.fromkeys(range(16, 16 + replicas), NEW)
