"""LoRA adapters for tests, written as peft saves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from app.core.sources.adapter_config import CONFIG
from app.core.sources.adapter_model import PREFIX, WEIGHTS

GOLDEN = Path(__file__).with_name("golden") / "adapters"
SETTINGS: dict[str, object] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
DOWN = "model.layers.0.mlp.down_proj"


def factors(shape: tuple[int, int], module: str = DOWN, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A and B of a linear (out, in)."""
    draws = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, shape[1], generator=draws) / shape[1] ** 0.5,
        f"{module}.lora_B.weight": torch.randn(shape[0], rank, generator=draws) / rank,
    }


def write_adapter(folder: Path, tensors: dict[str, Tensor], prefix: str = PREFIX, **settings: object) -> Path:
    """The folder of an adapter; `tensors` are named as the model's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**SETTINGS, **settings}))
    save_file({prefix + name: value for name, value in tensors.items()}, folder / WEIGHTS)
    return folder
