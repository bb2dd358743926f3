"""Every change of a deployment's record, from every state that it may be in."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from app.core.deployments.deployment import (
    Deployment,
    DeploymentSpec,
    Goal,
    Replacement,
    Replica,
    ReplicaState,
    Served,
)
from app.core.deployments.deployment_change import DeploymentChange
from app.core.deployments.transitions import awakened, bereft, promoted, removed, resting
from app.core.errors import Conflict, InvalidRequest
from app.core.records.ids import new_id
from app.core.records.job import Problem

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FAULT = Problem(code="c", message="m")
A, B, C = (new_id("art") for _ in range(3))
SPEC = DeploymentSpec(artifact=A, name="tiny")
BASE = Deployment(id=new_id("dep"), tenant="t", spec=SPEC, created_at=NOW)


def of(**changes: object) -> Deployment:
    return BASE.model_copy(update=changes)


def incoming(error: Problem | None = None) -> dict[str, object]:
    return {
        "generations": 2,
        "replacement": Replacement(generation=2, served=Served(artifact=B), error=error),
    }


STATES = {
    "serves": of(),
    "rests": of(goal=Goal.REST),
    "paused": of(goal=Goal.PAUSE),
    "failed": of(error=FAULT),
    "is replaced": of(**incoming()),
    "replacement failed": of(**incoming(FAULT)),
}
Change = Callable[[Deployment], Deployment]


def patch(**fields: object) -> Change:
    return DeploymentChange.model_validate(fields).applied_to


CHANGES: dict[str, Change] = {
    "request": awakened,
    "idle": resting,
    "pause": patch(paused=True),
    "resume": patch(paused=False),
    "replace": patch(artifact=C),
    "take back": patch(artifact=A),
    "promote": lambda deployment: promoted(deployment, 2),
}
# goal, whether it failed, artifact, generation, the replacement's artifact, its generation
After = tuple[str, bool, str, int, str | None, int | None]
SAME = "same"
TABLE: dict[str, dict[str, After | str]] = {
    "serves": {
        "request": SAME, "idle": ("rest", False, A, 1, None, None), "resume": SAME,
        "pause": ("pause", False, A, 1, None, None), "replace": ("serve", False, A, 1, C, 2),
        "take back": SAME, "promote": SAME,
    },
    "rests": {
        "request": ("serve", False, A, 1, None, None), "idle": SAME, "resume": SAME,
        "pause": ("pause", False, A, 1, None, None), "replace": ("rest", False, C, 2, None, None),
        "take back": SAME, "promote": SAME,
    },
    "paused": {
        "request": SAME, "idle": SAME, "pause": SAME, "resume": ("serve", False, A, 1, None, None),
        "replace": ("pause", False, C, 2, None, None), "take back": SAME, "promote": SAME,
    },
    "failed": {
        "request": SAME, "idle": ("rest", True, A, 1, None, None), "pause": ("pause", True, A, 1, None, None),
        "resume": ("serve", False, A, 2, None, None), "replace": ("serve", False, C, 2, None, None),
        "take back": SAME, "promote": SAME,
    },
    "is replaced": {
        "request": SAME, "idle": SAME, "pause": ("pause", False, A, 1, B, 2), "resume": SAME,
        "replace": ("serve", False, A, 1, C, 3), "take back": ("serve", False, A, 1, None, None),
        "promote": ("serve", False, B, 2, None, None),
    },
    "replacement failed": {
        "request": SAME, "idle": ("rest", False, A, 1, B, 2), "pause": ("pause", False, A, 1, B, 2),
        "resume": SAME, "replace": ("serve", False, A, 1, C, 3), "promote": SAME,
        "take back": ("serve", False, A, 1, None, None),
    },
}  # fmt: skip


def outline(deployment: Deployment) -> After:
    replacement = deployment.replacement
    return (
        str(deployment.goal), deployment.error is not None, deployment.spec.artifact, deployment.generation,
        *((None, None) if replacement is None else (replacement.served.artifact, replacement.generation)),
    )  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("state", STATES)
def test_every_change_from_every_state(state: str, change: str) -> None:
    before = STATES[state]
    after, expected = CHANGES[change](before), TABLE[state][change]
    if expected == SAME:
        assert after == before
    else:
        assert outline(after) == expected
        # Only what its owner does counts: If-Match of another owner must not fail for a server's sake.
        own = change in ("pause", "resume", "replace", "take back")
        assert after.revision == before.revision + own
        moved = after.generation != before.generation
        assert after.side == (1 - before.side if moved else before.side)


@pytest.mark.parametrize("fields", [{"paused": True}, {"replicas": 2}, {"artifact": C}, {"aliases": ["x"]}])
def test_what_is_deleted_is_not_changed(fields: dict[str, object]) -> None:
    gone = removed(BASE)
    with pytest.raises(Conflict, match="is deleted"):
        patch(**fields)(gone)
    assert gone.names == ()


def replica(generation: int, slot: int = 0) -> Replica:
    return Replica(deployment=BASE.id, slot=slot, generation=generation, owner="o", worker="w", since=NOW,
                   engine="transformers", state=ReplicaState.READY, url="http://h:1")  # fmt: skip


@pytest.mark.parametrize(
    ("state", "generation", "others", "fields"),
    [
        ("serves", 1, [], {"error": FAULT}),
        ("serves", 1, [replica(1, 1)], {"setback": "m"}),
        ("is replaced", 1, [], {"setback": "m"}),  # the new one may serve yet
        ("is replaced", 2, [], incoming(FAULT)),
        ("is replaced", 2, [replica(1)], incoming(FAULT)),
        ("is replaced", 2, [replica(2, 17)], {"setback": "m"}),
        ("replacement failed", 2, [], {}),
        ("replacement failed", 1, [], {"error": FAULT}),
        ("serves", 7, [], {}),  # a server of an earlier generation, which was to end anyway
    ],
)
def test_a_server_that_can_not_be_had(
    state: str, generation: int, others: list[Replica], fields: dict[str, object]
) -> None:
    before = STATES[state]
    after = bereft(before, replica(generation), others, FAULT)
    assert after == before.model_copy(update=fields)
    assert bereft(removed(before), replica(generation), others, FAULT) == removed(before)


def test_several_fields_at_once() -> None:
    body = {"replicas": 3, "aliases": ["a", "b/c"], "idle_timeout_s": 5, "max_num_seqs": 4}
    after = patch(**body)(BASE)
    assert (after.revision, after.spec.replicas, after.spec.idle_timeout_s) == (2, 3, 5)
    assert after.names == ("tiny", "a", "b/c")
    assert after.incoming is not None
    assert after.incoming.served == Served(artifact=A, max_num_seqs=4)
    # What is said on top of a replacement is about it.
    further = patch(dtype="float32")(after)
    assert further.incoming is not None
    assert further.incoming.served == Served(artifact=A, max_num_seqs=4, dtype="float32")
    assert (further.incoming.generation, further.generation) == (3, 1)
    # null is the default.
    assert patch(max_num_seqs=None, idle_timeout_s=None)(after).incoming is None
    # Slots of replicas that it had are still looked at.
    assert patch(replicas=1)(after).slots == [0, 1, 2, 16, 17, 18]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cache_share": 0.5}, '`cache_share` needs "engine": "transformers"'),
        ({"engine": "transformers", "vllm": {}}, 'options of vllm need "engine": "vllm"'),
        ({"engine": "vllm", "vllm": {"dtype": "auto"}, "dtype": "auto"}, "`dtype` is in `vllm` too"),
        ({"aliases": ["tiny"]}, "tiny is the deployment's name"),
    ],
)
def test_what_does_not_go_together(fields: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        patch(**fields)(BASE)
    assert words in refused.value.message


def test_the_same_alias_twice_is_refused_by_what_helps() -> None:
    with pytest.raises(InvalidRequest) as refused:
        patch(aliases=["x", "x"])(BASE)
    assert (refused.value.param, refused.value.remedy) == ("aliases", "name each once, or leave it out")
