"""The engine on a GPU: the same quality as on a CPU, files that open, and the same bytes twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.core.records.specs import CalibrationSpec, EvaluationSpec, JobSpec, Recipe, SearchSpec
from tests.tiny_models import EngineRun, some_text

FORMATS = ("awq", "compressed-tensors")


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    return JobSpec(
        model="example",
        recipe=Recipe(search=SearchSpec(grid_points=10)),
        calibration=CalibrationSpec(texts=(some_text("valid"),), num_samples=8, sequence_length=128),
        evaluation=EvaluationSpec(texts=(some_text("test"),), num_samples=8),
        formats=FORMATS,
    )


@pytest.fixture(scope="module")
def on_cuda(spec: JobSpec, example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineRun:
    return EngineRun(spec, example_model, tmp_path_factory.mktemp("cuda"), device="cuda:0")


def test_quality_is_that_of_the_cpu(
    on_cuda: EngineRun, spec: JobSpec, example_model: Path, tmp_path: Path
) -> None:
    """The GPU computes in the model's bfloat16, the CPU in float32: a perplexity moves by a few tenths of a
    percent, and near ties in the search may fall to other candidates. The ratio cancels most of it."""
    cpu, cuda = EngineRun(spec, example_model, tmp_path / "cpu").report, on_cuda.report
    assert cuda.original.perplexity == pytest.approx(cpu.original.perplexity, rel=0.01)
    assert cuda.candidates[0].perplexity_ratio == pytest.approx(cpu.candidates[0].perplexity_ratio, rel=0.01)
    assert cuda.candidates[0].kl == pytest.approx(cpu.candidates[0].kl, rel=0.25)
    assert cuda.candidates[0].bytes == cpu.candidates[0].bytes
    assert cuda.environment["device"] == "cuda:0"
    assert cuda.peak_vram_bytes is not None
    assert cuda.peak_vram_bytes > 0


def test_layers_wait_in_host_memory(on_cuda: EngineRun) -> None:
    result = on_cuda.checkpoints().load_layer(0, 0)
    assert len(result.quantized) == 7
    assert {weight.q.device.type for weight in result.quantized.values()} == {"cpu"}
    assert {value.device.type for value in result.dense.values()} == {"cpu"}


def test_the_artifact_opens_and_has_the_reported_quality(on_cuda: EngineRun) -> None:
    folder = on_cuda.folder("compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    windows = on_cuda.texts().evaluation.tokens
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.double() for window in windows]
    loaded = float(torch.stack(losses).mean().exp())
    assert loaded == pytest.approx(on_cuda.report.candidates[0].perplexity, rel=0.01)  # float32 or bfloat16


def test_two_runs_write_the_same_bytes(
    on_cuda: EngineRun, spec: JobSpec, example_model: Path, tmp_path: Path
) -> None:
    again = EngineRun(spec, example_model, tmp_path / "again", device="cuda:0")
    for name in FORMATS:
        first, second = (run.folder(name) for run in (on_cuda, again))
        for file in first.iterdir():
            assert file.read_bytes() == (second / file.name).read_bytes(), file.name
