"""Makes `adapters/`: LoRA adapters as peft saves them, and the weights that its merge_and_unload() makes.

    python -m tests.golden.make_adapters

with peft, which no test needs (made with peft 0.21.2, transformers 5.24.0 and torch 2.13.0). Each folder has
the adapter and, as merged.safetensors, the tensors that merging changes; of the bundled model, which is read
as float32 here, every 509th value of each.
"""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ADAPTERS = Path(__file__).with_name("adapters")
BUNDLED = Path(__file__).parents[2] / "examples" / "wikitext-llama-6m"
STEP = 509
# Of each case: the model's config, and the adapter's.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "patterns": (
        {},
        {
            "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "up_proj"], "use_rslora": True,
            "rank_pattern": {"up_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.o_proj": 11},
        },
    ),
    "dora": ({}, {"r": 3, "lora_alpha": 6, "target_modules": ["k_proj", "gate_proj"], "use_dora": True}),
    "embeddings": (
        {"tie_word_embeddings": False},
        {"r": 2, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ),
    "saved": (
        {"tie_word_embeddings": False, "attention_bias": True},
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"], "bias": "all"},
    ),
}  # fmt: skip
BUNDLED_CASE = {
    "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"],
    "layers_to_transform": [0, 5],
}  # fmt: skip


def spread(shape: torch.Size, name: str) -> Tensor:
    """Values between -1/2 and 1/2 from plain arithmetic: no generator whose stream may change."""
    numbers = torch.arange(shape.numel()) * 7919 + zlib.crc32(name.encode()) % 1009
    return (numbers % 1009 / 1009 - 0.5).view(shape)


def fill(model: nn.Module, part: str = "", factor: float = 1.0) -> None:
    """Give the parameters whose names hold `part` values that follow from their names."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(factor * spread(parameter.shape, name))


def golden_model(**changes: Any) -> LlamaForCausalLM:
    """float32; what the adapters of CASES belong to."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, **changes,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    fill(model)
    return model


def make(case: str, model: Any, settings: dict[str, Any], step: int = 1) -> None:
    """Save an adapter and what merging it changes."""
    from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found]  # in no environment of ours

    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.name_or_path = f"org/{case}"
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for trained in ("lora_", "modules_to_save", "bias"):
        fill(adapted, trained, 0.25)
    folder = ADAPTERS / case
    shutil.rmtree(folder, ignore_errors=True)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    after = adapted.merge_and_unload().state_dict()
    changed = {
        name: value.flatten()[::step].clone() if step > 1 else value.contiguous()
        for name, value in after.items()
        if not torch.equal(value, before[name])
    }
    save_file(changed, folder / "merged.safetensors")


def main() -> None:
    for case, (config, settings) in CASES.items():
        make(case, golden_model(**config), settings)
    bundled = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    make("bundled", bundled, BUNDLED_CASE, STEP)


if __name__ == "__main__":
    main()
