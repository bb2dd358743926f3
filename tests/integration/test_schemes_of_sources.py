"""Every scheme of every source: a job writes all schemes, and transformers opens each of the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.core.formats.registry import FormatName
from app.core.formats.schemes import SCHEMES, SchemeName
from app.core.records.specs import EvaluationSpec, Recipe
from tests.integration.test_schemes import IN_BFLOAT16, perplexity
from tests.quantized_sources import fp8_source, modelopt_source, mxfp4_source
from tests.tiny_gguf import write_gguf
from tests.tiny_models import TOKENIZER, EngineRun, some_text, tiny_spec

MakeSource = Callable[[Path], Path]
SHOWN = 1e-4  # of a perplexity, in float32
IN_FP4 = 0.03  # in bfloat16, where inputs are rounded to FP4 as well: a bit there moves a whole step here


def quantized_by_us(recipe: Recipe, format_name: FormatName) -> MakeSource:
    def make(folder: Path) -> Path:
        return EngineRun(tiny_spec(recipe, formats=(format_name,)), TOKENIZER, folder).folder(format_name)

    return make


def in_gguf(folder: Path) -> Path:
    return write_gguf(
        AutoModelForCausalLM.from_pretrained(TOKENIZER, dtype=torch.float32), folder / "model", tied=True
    )


INTEGERS = Recipe(method="rtn", group_size=64)
SOURCES: dict[str, MakeSource] = {
    "fp8 in blocks": lambda folder: fp8_source(TOKENIZER, folder / "model"),
    "mxfp4": lambda folder: mxfp4_source(TOKENIZER, folder / "model"),
    "nvfp4 of modelopt": lambda folder: modelopt_source(TOKENIZER, folder / "model"),
    "fp8 of compressed-tensors": quantized_by_us(Recipe(method="rtn", scheme="fp8"), "compressed-tensors"),
    "int4 of compressed-tensors": quantized_by_us(INTEGERS, "compressed-tensors"),
    "awq": quantized_by_us(INTEGERS, "awq"),
    "gptq": quantized_by_us(INTEGERS.model_copy(update={"symmetric": True}), "gptq"),
    "gguf": in_gguf,
}  # fmt: skip
RECIPES = tuple(
    Recipe(scheme=name, method="rtn", **({"group_size": 64} if name == "wna16" else {})) for name in SCHEMES
)


@pytest.fixture(scope="module", params=SOURCES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineRun:
    folder = tmp_path_factory.mktemp("source")
    evaluation = EvaluationSpec(texts=(some_text("test"),), num_samples=4, sequence_length=128)
    source = SOURCES[request.param](folder)
    return EngineRun(tiny_spec(RECIPES, evaluation=evaluation), source, folder / "work")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_opens_the_file_with_the_figures_of_the_report(
    run: EngineRun, scheme: SchemeName
) -> None:
    index = list(SCHEMES).index(scheme)
    stated, folder = run.report.candidates[index], run.folder("compressed-tensors", index)
    near = {"nvfp4": IN_FP4, "mxfp4": IN_FP4, "nvfp4a16": IN_BFLOAT16, "mxfp4a16": IN_BFLOAT16}.get(
        scheme, SHOWN
    )
    dtype = torch.float32 if near == SHOWN else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    shown = perplexity(model, run.texts().evaluation.tokens)
    assert shown == pytest.approx(stated.perplexity, rel=near)
    assert run.report.source is not None
