"""Steps replayed as CUDA graphs: the tokens of steps that are launched, and the kernels that they bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from app.core.records.specs import Recipe
from tests.inference import Served, greedy, prompts_of_text, sampled
from tests.tiny_models import EngineRun, tiny_spec
from workers.modeling.float_numbers import float_codes
from workers.modeling.fp8_linear import Fp8Linear, why_not_fp8
from workers.modeling.input_rounding import InputRounder
from workers.modeling.quantized_weight import QuantizedWeight
from workers.modeling.rounding_linear import RoundingLinear
from workers.serving.step_attention import grouped, split
from workers.serving.steps import EagerSteps, GraphSteps, StepRunner

GPU = torch.device("cuda", 0)
NEW_TOKENS = 40
NEAR_TIE = 0.1  # between two logits of bfloat16 products, which round to 2^-8 of sizes near 10


@pytest.fixture(scope="module")
def artifact(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = tiny_spec(Recipe(method="rtn", group_size=128, symmetric=True), formats=("compressed-tensors",))
    run = EngineRun(spec, example_model, tmp_path_factory.mktemp("run"), device="cuda:0")
    return run.folder("compressed-tensors")


def served(artifact: Path, runner: StepRunner | None) -> Served:
    return Served(artifact, slots=runner, native=False, device="cuda:0")


def requests() -> list[dict[str, Any]]:
    return [greedy(prompt, NEW_TOKENS) for prompt in prompts_of_text(20)]


def test_graphs_answer_as_launched_steps_do(artifact: Path) -> None:
    """The same kernels with the same inputs: the same tokens, also of rows that draw with seeds."""
    runner = GraphSteps()
    drawn = [sampled(prompt, 20, seed=row) for row, prompt in enumerate(prompts_of_text(5))]
    launched, replayed = (served(artifact, each) for each in (EagerSteps(), runner))
    for asked in (requests()[:1], requests()[:8], requests(), drawn):
        assert replayed.generate(asked) == launched.generate(asked)
    assert runner.note == ""


def test_tokens_are_those_of_the_growing_cache_until_a_near_tie(artifact: Path) -> None:
    """bfloat16 rounds by a step's shape: two sums may cross where they are nearly equal, and only there."""
    plain, graphs = served(artifact, None), served(artifact, GraphSteps())
    model = plain.loaded.model
    for request, expected, found in zip(
        requests(), plain.generate(requests()), graphs.generate(requests()), strict=True
    ):
        pairs = zip(expected, found, strict=True)
        place = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        if place is not None:
            text = torch.tensor([[*request["prompt"], *expected[:place]]], device=GPU)
            with torch.no_grad():
                logits = model(input_ids=text).logits[0, -1].float()
            assert abs(float(logits[expected[place]] - logits[found[place]])) < NEAR_TIE
            assert float(logits.max() - logits[found[place]]) < NEAR_TIE


def attention_case(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    column, first = torch.arange(700, device=GPU), torch.arange(rows, device=GPU) * 29
    mask = (column >= first[:, None]) & (column <= 600)
    query = torch.randn(rows, 32, 128, device=GPU, dtype=dtype)
    keys, values = torch.randn(2, rows, 8, 700, 128, device=GPU, dtype=dtype)
    return query, keys, values, mask


@pytest.mark.parametrize("attend", [grouped, split])
@pytest.mark.parametrize("rows", [1, 8, 20])
def test_attention_of_steps(attend: Any, rows: int) -> None:
    query, keys, values, mask = attention_case(rows, torch.bfloat16)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None].double(), keys.double().repeat_interleave(4, 1),
        values.double().repeat_interleave(4, 1), attn_mask=mask[:, None, None], scale=0.1,
    )[:, :, 0]  # fmt: skip
    found = attend(query, keys, values, mask, 0.1)
    assert float((found.double() - expected).norm() / expected.norm()) < 8e-3


@pytest.mark.parametrize("rows", [1, 5, 64, 300])
def test_fp8_products(rows: int) -> None:
    if torch.cuda.get_device_capability(0) < (8, 9):
        pytest.skip("no products of FP8 here")
    values = torch.randn(256, 512, device=GPU)
    scale = values.abs().amax(1, keepdim=True) / 448
    scheme = Scheme(bits=8, group_size=-1, symmetric=True, name="fp8")
    zero = torch.zeros(256, 1, dtype=torch.uint8, device=GPU)
    weight = QuantizedWeight(float_codes(values / scale, 8), scale, zero, scheme)
    inputs = scheme.kind.inputs
    assert inputs is not None
    rounder = InputRounder(inputs)
    assert why_not_fp8(weight, rounder, torch.bfloat16, GPU) is None
    x = torch.randn(rows, 512, device=GPU, dtype=torch.bfloat16)
    expected, found = (
        kind(weight, rounder, dtype=torch.bfloat16, device=GPU)(x) for kind in (RoundingLinear, Fp8Linear)
    )
    assert float((found - expected).double().norm() / expected.double().norm()) < 1e-2
