"""Families beyond the plain decoder, end to end: hybrids, towers, experts of several forms.

The whole table is `make families`.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import pytest

from app.core.child.assignment import Checkpointed, ProgressMessage
from app.core.planning.family import known_family
from app.core.records.specs import Recipe, SearchSpec
from tests.families.table import OPENS_NEAR, RECIPE, SELF_CHECK, family_row, is_right
from tests.tiny_models import EngineRun, assignment, save_model, tiny_spec
from workers.child.job_run import run_job
from workers.discovery.family_discovery import discover_type, working_model

SAMPLE = (
    "qwen3_5", "gemma3", "gemma4", "qwen2_moe", "bloom", "falcon_h1", "glm_moe_dsa", "nemotron_h",
    "hunyuan_vl",
)  # fmt: skip
ANOTHER = Recipe(method="rtn", bits=8, group_size=32, indivisible="skip", search=SearchSpec(grid_points=4))


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_tiny_model_is_quantized_and_opened_by_transformers(model_type: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' classes
        row = family_row(model_type, tmp_path)
    assert row["self_check"] <= SELF_CHECK
    assert row["scaled"] > 0
    assert row["opens"] == pytest.approx(row["kl"], rel=OPENS_NEAR)
    assert "lost" not in row


def test_experts_that_transformers_loses_are_opened_where_they_keep_their_precision(tmp_path: Path) -> None:
    """Files have each quantized expert by itself, and its class of this type has one tensor for all."""
    row = family_row("gpt_oss", tmp_path)
    assert all(".experts." in name for name in row["lost"])
    assert is_right(row["kept"])


class Broken(Exception):
    """The process ends here."""


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_vl", "qwen3_moe", "gemma3n", "kimi_linear"])
def test_a_job_of_two_recipes_goes_on_to_the_same_bytes(model_type: str, tmp_path: Path) -> None:
    """A hybrid, a tower, experts, state that layers hand on, and tensors that files hold in parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = working_model({"model_type": model_type})
        source = save_model(model, tmp_path / "model")
        spec = tiny_spec((RECIPE, ANOTHER))
        whole = EngineRun(spec, source, tmp_path / "whole")
        written: list[ProgressMessage] = []

        def until_the_second_layer(message: ProgressMessage) -> None:
            written.append(message)
            if sum(isinstance(each, Checkpointed) for each in written) == 3:
                raise Broken

        with pytest.raises(Broken):
            run_job(assignment(spec, source, tmp_path / "broken"), until_the_second_layer)
        resumed = EngineRun(spec, source, tmp_path / "broken")
    for recipe in range(2):
        folders = (run.folder("compressed-tensors", recipe) for run in (whole, resumed))
        first, second = ([digest(path) for path in sorted(each.glob("*.safetensors"))] for each in folders)
        assert first == second


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("model_type", ["granite", "granitemoehybrid", "falcon_h1", "granite_speech"])
def test_an_output_that_is_multiplied_before_it_joins_the_stream_does_not_join_it(model_type: str) -> None:
    """The multiplier is 1 in transformers' default, and another number in every published model."""
    family = known_family(model_type)
    assert family is not None
    assert all(
        group.joins is None for kind in family.kinds for group in kind.groups if "o_proj" in str(group)
    )
    assert family == discover_type(model_type)
