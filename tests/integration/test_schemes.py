"""One pass answers every scheme; transformers and our server compute what the report says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from app.core.formats.schemes import SCHEMES, SchemeName
from app.core.records.specs import EvaluationSpec, Recipe
from tests.tiny_models import TOKENIZER, EngineRun, some_text, tiny_spec
from workers.serving.loading import LoadRequest, load_model

OTHERS: list[SchemeName] = [name for name in SCHEMES if name != "wna16"]
RECIPES = [
    *(Recipe(scheme=name, method="rtn") for name in OTHERS),
    Recipe(scheme="nvfp4a16", method="gptq"),
    Recipe(scheme="fp8", method="awq"),
    Recipe.model_validate(
        {"scheme": "fp8", "method": "rtn", "overrides": [{"match": "down_proj", "scheme": "w8a8"}]}
    ),
]
IN_BFLOAT16 = 0.01  # compressed-tensors 0.20 dequantizes FP4 in bfloat16 alone


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> EngineRun:
    evaluation = EvaluationSpec(texts=(some_text("test") * 4,), num_samples=16, sequence_length=128)
    spec = tiny_spec(tuple(RECIPES), evaluation=evaluation)
    return EngineRun(spec, TOKENIZER, tmp_path_factory.mktemp("schemes"))


def perplexity(model: nn.Module, windows: Tensor) -> float:
    with torch.no_grad():
        logarithms = torch.log_softmax(model(windows).logits[:, :-1].double(), dim=-1)
    return math.exp(-logarithms.gather(2, windows[:, 1:, None]).mean())


@pytest.mark.parametrize("index", range(len(RECIPES)))
def test_our_server_computes_what_the_report_says(run: EngineRun, index: int) -> None:
    stated = run.report.candidates[index]
    folder = run.folder("compressed-tensors", index)
    loaded = load_model(LoadRequest(folder, torch.device("cpu"), torch.float32))
    found = perplexity(loaded.model, run.texts().evaluation.tokens)
    assert found == pytest.approx(stated.perplexity, rel=2e-3)


@pytest.mark.parametrize("index", range(len(RECIPES) - 1))
def test_transformers_computes_what_the_report_says(run: EngineRun, index: int) -> None:
    stated, folder = run.report.candidates[index], run.folder("compressed-tensors", index)
    is_fp4 = "fp4" in stated.recipe.scheme
    dtype = torch.bfloat16 if is_fp4 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    found = perplexity(model, run.texts().evaluation.tokens)
    assert found == pytest.approx(stated.perplexity, rel=IN_BFLOAT16 if is_fp4 else 1e-4)


def test_the_report_names_the_scheme_of_every_linear(run: EngineRun) -> None:
    for recipe, candidate in zip(RECIPES, run.report.candidates, strict=True):
        linears = [linear for layer in candidate.layers for linear in layer.linears]
        schemes = {linear.scheme for linear in linears}
        assert schemes == ({recipe.scheme} if not recipe.overrides else {"fp8", "w8a8"})


def test_wider_numbers_lose_less(run: EngineRun) -> None:
    kl = {candidate.label: candidate.kl for candidate in run.report.candidates}
    assert kl["rtn fp8"] < kl["rtn nvfp4a16"] < kl["rtn nvfp4"]
    assert kl["rtn w8a8"] < kl["rtn w8a8-static"]
    assert kl["rtn mxfp4a16"] < kl["rtn mxfp4"]
    assert kl["gptq nvfp4a16"] < kl["rtn nvfp4a16"]
    sizes = [candidate.bits_per_weight for candidate in run.report.candidates[:10]]
    assert [round(size, 1) for size in sizes] == [4.1, 8.1, 8.1, 8.1, 8.0, 8.1, 4.5, 4.5, 4.2, 4.2]
