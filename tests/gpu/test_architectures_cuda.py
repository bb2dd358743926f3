"""Every architecture on a GPU in bfloat16: folds hold there too, and the quality is that of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.core.records.specs import Recipe, SearchSpec
from tests.tiny_models import OTHER_MODELS, EngineRun, random_model, save_model, tiny_spec


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_quality_is_that_of_the_cpu(tmp_path: Path, name: str) -> None:
    model_type, changes = OTHER_MODELS[name]
    model = random_model(model_type, torch.bfloat16, **changes)  # type: ignore[arg-type]
    folder = save_model(model, tmp_path / "model")
    spec = tiny_spec(Recipe(group_size=32, symmetric=True, search=SearchSpec(grid_points=4)))
    cuda = EngineRun(spec, folder, tmp_path / "cuda", device="cuda:0").report
    cpu = EngineRun(spec, folder, tmp_path / "cpu").report
    assert cuda.candidates[0].kl == pytest.approx(cpu.candidates[0].kl, rel=0.3)
    assert max(layer.equivalence_error for layer in cuda.candidates[0].layers) < 0.02
