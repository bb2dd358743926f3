"""Layers whose experts are too many to be held are those over the bound, and predicted memory follows."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.core.jobs.estimate import expert_notes
from app.core.planning import large_layers
from app.core.planning.cost_model import predict, working_bytes
from app.core.planning.device_profile import NOMINAL
from app.core.planning.large_layers import layers_by_expert
from app.core.planning.plan import Plan, plan_job
from app.core.records.specs import JobSpec
from app.core.sources.model_source import inspect_model, open_model
from tests.tiny_models import tiny_model

SPEC = JobSpec.model_validate({"model": "m", "recipe": {"group_size": 32}})
SIZES = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
EXPERT = 3 * 64 * 32 * 4  # bytes


def planned(folder: Path, model_type: str, **sizes: object) -> Plan:
    model = tiny_model(folder, model_type, **sizes)
    headers = inspect_model(open_model(model.as_uri(), model_roots=(model.parent,)))
    return plan_job(SPEC, headers.config, headers.tensors)


@pytest.mark.parametrize("experts", [4, 8])
def test_a_layer_is_split_by_the_bytes_of_its_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: int
) -> None:
    plan = planned(tmp_path, "qwen3_moe", num_experts=experts, **SIZES)
    monkeypatch.setattr(large_layers, "EXPERT_BYTES", {"cpu": 4 * EXPERT, "cuda": 8 * EXPERT})
    assert layers_by_expert(plan, "cpu") == ({1} if experts == 8 else set())
    assert layers_by_expert(plan, "cuda") == set()


def test_no_dense_layer_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_layers, "EXPERT_BYTES", {"cpu": 0, "cuda": 0})
    assert layers_by_expert(planned(tmp_path, "llama"), "cpu") == set()


@pytest.mark.parametrize(("method", "words"), [("awq", "expert by expert"), ("omniquant", "whole layers")])
def test_an_estimate_says_what_is_done_about_many_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, words: str
) -> None:
    model = tiny_model(tmp_path, "mixtral", num_local_experts=4)
    headers = inspect_model(open_model(model.as_uri(), model_roots=(model.parent,)))
    spec = JobSpec.model_validate({"model": "m", "recipe": {"method": method, "group_size": 32}})
    plan = plan_job(spec, headers.config, headers.tensors)
    assert expert_notes(plan, "cpu") == ()
    held = working_bytes(plan, spec, "cpu")
    monkeypatch.setattr(large_layers, "EXPERT_BYTES", {"cpu": 0, "cuda": 0})
    (note,) = expert_notes(plan, "cpu")
    assert words in note
    assert (working_bytes(plan, spec, "cpu") == held) == (method == "omniquant")


def test_predicted_memory_of_split_layers_does_not_follow_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    plans = [
        planned(tmp_path / str(experts), "mixtral", num_local_experts=experts, **sizes) for experts in (4, 16)
    ]
    held = [working_bytes(plan, SPEC, "cpu") for plan in plans]
    monkeypatch.setattr(large_layers, "EXPERT_BYTES", {"cpu": 0, "cuda": 0})
    split = [working_bytes(plan, SPEC, "cpu") for plan in plans]
    assert split[1] < held[1]
    assert split[1] - split[0] < 0.1 * (held[1] - held[0])
    ram = predict(plans[1], SPEC, NOMINAL["cpu"]).ram_bytes
    monkeypatch.setattr(large_layers, "EXPERT_BYTES", {"cpu": 2**30, "cuda": 2**32})
    assert ram <= predict(plans[1], SPEC, NOMINAL["cpu"]).ram_bytes
