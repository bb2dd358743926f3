from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from app.core.errors import ModelRefused
from workers.modeling import soundness
from workers.modeling.checkpoint import Checkpoint


def checkpoint(folder: Path, **tensors: torch.Tensor) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps({}))
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 300, 999])
def test_every_weight_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, place: int
) -> None:
    monkeypatch.setattr("workers.modeling.checkpoint.CHUNK_BYTES", 64)
    sound, broken = torch.ones(1000, dtype=dtype), torch.ones(1000, dtype=dtype)
    broken[place] = float("nan")
    stored = checkpoint(tmp_path, a=sound, numbers=torch.arange(3), old_bias=broken)
    with pytest.raises(ModelRefused, match="old_bias holds NaN"):
        soundness.refuse_broken_weights(stored)
    stored.unused = frozenset({"old_bias"})
    soundness.refuse_broken_weights(stored)
