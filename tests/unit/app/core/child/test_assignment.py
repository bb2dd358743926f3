"""What finished layers belong to."""

from __future__ import annotations

from pathlib import Path

from app.core.child.assignment import Assignment, digest_of
from app.core.records.specs import CalibrationSpec, JobSpec, Recipe


def assignment(**changes: object) -> Assignment:
    body = {
        "spec": JobSpec(model="org/name"), "model_folder": Path("/model"), "model_name": "name",
        "model_digest": "m", "calibration_digest": "t", "work_folder": Path("/work"),
    }  # fmt: skip
    return Assignment.model_validate({**body, **changes})


def test_the_identity_depends_on_all_that_shapes_a_layer() -> None:
    def identity(recipe: Recipe | None = None, **changes: object) -> str:
        return assignment(**changes).layers_identity([recipe or Recipe()])

    def with_spec(**changes: object) -> str:
        return identity(spec=JobSpec(model="org/name", **changes))  # type: ignore[arg-type]

    other = [
        identity(model_digest="n"),
        identity(calibration_digest="u"),
        identity(device="cuda:0"),
        identity(Recipe(bits=3)),
        with_spec(calibration=CalibrationSpec(seed=1)),
        assignment().layers_identity([]),
    ]
    assert len({identity(), *other}) == 7
    assert identity(device="cuda:0") == identity(device="cuda:1")
    assert with_spec(formats=("awq",), timeout_s=5, labels={"a": "b"}) == identity()
    assert identity(model_folder=Path("/elsewhere"), model_name="other") == identity()


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    base = digest_of({"model": "a", "tokens": "b", "recipes": [{"bits": 4}]})
    assert base == digest_of({"recipes": [{"bits": 4}], "tokens": "b", "model": "a"})
    assert base != digest_of({"model": "a", "tokens": "b", "recipes": [{"bits": 3}]})
    assert base != digest_of({"model": "a", "tokens": "c", "recipes": [{"bits": 4}]})
