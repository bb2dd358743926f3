"""Jobs without an evaluation: what they refuse, and which linears names choose."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.core.errors import ModelRefused, RecipeUnsupported
from app.core.planning.cost_model import predict
from app.core.planning.device_profile import NOMINAL
from app.core.planning.model_free import named_linears, plan_model_free
from app.core.planning.plan import plan_job
from app.core.records.specs import JobSpec
from app.core.sources.safetensors_header import TensorHeader

CONFIG: dict[str, object] = {"model_type": "nobody", "architectures": ["Nobody"], "num_hidden_layers": 2}


def header(*shape: int, dtype: str = "BF16") -> TensorHeader:
    return TensorHeader(dtype=dtype, shape=shape, file="model.safetensors", start=0, end=0)


def spec(**changes: Any) -> JobSpec:
    body = {"model": "m", "recipe": {"method": "rtn", "scheme": "fp8"}, "evaluation": None}
    return JobSpec.model_validate({**body, **changes})


@pytest.mark.parametrize(
    ("changes", "why", "what"),
    [
        ({"recipe": {"method": "awq"}}, "method awq calibrates", "use method rtn"),
        ({"recipe": {"method": "gptq"}}, "method gptq calibrates", "use method rtn"),
        ({"recipe": [{"method": "rtn"}, {"method": "awq"}]}, "recipe.1: method awq", "use method rtn"),
        ({"recipe": {"method": "rtn", "scheme": "fp8-static"}}, "range of inputs", "use fp8"),
        ({"recipe": {"method": "rtn", "scheme": "w8a8-static"}}, "range of inputs", "use w8a8"),
        ({"recipe": {"method": "rtn", "scheme": "nvfp4"}}, "range of inputs", "use nvfp4a16"),
        (
            {"recipe": {"method": "rtn", "overrides": [{"match": "q_proj", "scheme": "nvfp4"}]}},
            "scheme nvfp4 needs the range", "use nvfp4a16",
        ),
        ({"target": {"max_perplexity_ratio": 1.1}}, "a target needs an evaluation", "leave out `target`"),
        ({"calibration": {"num_samples": 4}}, "reads no text", "leave out `calibration`"),
    ],
)  # fmt: skip
def test_what_needs_a_text_is_refused_with_what_to_change(
    changes: dict[str, Any], why: str, what: str
) -> None:
    with pytest.raises(ValidationError) as refusal:
        spec(**changes)
    assert why in str(refusal.value)
    assert what in str(refusal.value)


@pytest.mark.parametrize(
    "scheme", ["wna16", "w3a16", "w4a8", "w8a8", "fp8", "fp8-block", "nvfp4a16", "mxfp4", "mxfp4a16"]
)
def test_every_scheme_without_a_range_is_taken(scheme: str) -> None:
    body = spec(recipe={"method": "rtn", "scheme": scheme})
    assert JobSpec.model_validate_json(body.model_dump_json()) == body


@pytest.mark.parametrize(
    ("name", "tensor", "chosen"),
    [
        ("model.layers.1.mlp.up_proj", header(64, 32), True),
        ("transformer.blocks.0.ff", header(64, 32, dtype="F16"), True),
        ("layers.0.experts.3.w1", header(64, 32), True),
        ("model.layers.2.mlp.up_proj", header(64, 32), False),  # beyond num_hidden_layers
        ("model.layers.0.mlp.gate", header(64, 32), False),
        ("model.layers.0.router", header(64, 32), False),
        ("model.layers.0.attn.position_bias", header(64, 32), False),
        ("model.layers.0.hash_embedding.up", header(64, 32), False),
        ("model.layers.0.input_layernorm", header(64), False),
        ("model.layers.0.conv1d", header(64, 1, 4), False),
        ("model.layers.0.shift", header(8, 32), False),  # fewer than 16 rows
        ("model.layers.0.codes", header(64, 32, dtype="I32"), False),
        ("vision_tower.blocks.0.fc", header(64, 32), False),
        ("model.visual.blocks.0.fc", header(64, 32), False),
        ("encoder.layers.0.fc", header(64, 32), False),
        ("mtp.layers.0.fc", header(64, 32), False),
        ("lm_head", header(64, 32), False),
        ("model.embed_tokens", header(64, 32), False),
        ("projector", header(64, 32), False),
    ],
)
def test_names_choose_the_linears(name: str, tensor: TensorHeader, chosen: bool) -> None:
    assert (name in named_linears(CONFIG, {f"{name}.weight": tensor})) == chosen


def test_a_refused_type_is_told_of_the_way_without_a_definition() -> None:
    tensors = {"layers.0.fc.weight": header(64, 128)}
    with pytest.raises(ModelRefused) as refusal:
        plan_job(JobSpec(model="m"), CONFIG, tensors)
    assert '"evaluation": null' in refusal.value.remedy
    plan = plan_model_free(spec(), CONFIG, tensors)
    (candidate,) = plan.candidates
    assert [linear.name for linear in candidate.linears] == ["layers.0.fc"]
    prediction = predict(plan, spec(), NOMINAL["cpu"])
    assert prediction.output_bytes == (sum(candidate.output_bytes.values()),)
    assert prediction.total_seconds > 0


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(ModelRefused, match="no linear is found by its name"):
        plan_model_free(spec(), CONFIG, {"lm_head.weight": header(64, 32)})


def test_the_file_for_llama_cpp_is_refused() -> None:
    with pytest.raises(RecipeUnsupported, match="gguf"):
        plan_model_free(spec(formats=["gguf"]), CONFIG, {"layers.0.fc.weight": header(64, 128)})
