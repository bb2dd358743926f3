"""Writes a random checkpoint of Llama or Qwen3-MoE, shard by layer, with the bundled model's tokenizer."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "wikitext-llama-6m"
SHAPES = {  # hidden, intermediate, heads, key/value heads, vocabulary
    "small": (1024, 2816, 16, 4, 4096),
    "tinyllama-1.1b": (2048, 5632, 32, 4, 32000),
    "llama-3-8b": (4096, 14336, 32, 8, 128256),
}
EXPERTS = 128  # of Qwen3-30B-A3B, whose width is that of `moe_shapes`
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, MOE_VOCABULARY = 2048, 768, 32, 4, 128, 4096


def layer_shapes(hidden: int, intermediate: int, heads: int, kv_heads: int) -> dict[str, tuple[int, ...]]:
    head_dim = hidden // heads
    return {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def moe_shapes(experts: int) -> dict[str, tuple[int, ...]]:
    """A layer of Qwen3-30B-A3B with so many experts."""
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "self_attn.q_norm": (HEAD_DIM,),
        "self_attn.k_norm": (HEAD_DIM,),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate": (experts, HIDDEN),
    }
    for number in range(experts):
        shapes[f"mlp.experts.{number}.gate_proj"] = (INNER, HIDDEN)
        shapes[f"mlp.experts.{number}.up_proj"] = (INNER, HIDDEN)
        shapes[f"mlp.experts.{number}.down_proj"] = (HIDDEN, INNER)
    return shapes


def random_tensor(shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return 1 + 0.1 * torch.randn(shape).to(torch.bfloat16)
    return (torch.randn(shape) * shape[1] ** -0.5).to(torch.bfloat16)


def write_model(folder: Path, shape: str, layers: int) -> None:
    hidden, intermediate, heads, kv_heads, vocabulary = SHAPES[shape]
    config = json.loads((TOKENIZER / "config.json").read_text("utf-8"))
    config |= {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    write_folder(folder, config, [layer_shapes(hidden, intermediate, heads, kv_heads)] * layers)


def write_moe(folder: Path, experts: int, layers: int) -> None:
    """Qwen3-30B-A3B's width with few layers, few experts and a small vocabulary."""
    config = json.loads((TOKENIZER / "config.json").read_text("utf-8")) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "moe_intermediate_size": INNER,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": layers,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "vocab_size": MOE_VOCABULARY,
        "tie_word_embeddings": True,
    }
    write_folder(folder, config, [moe_shapes(experts)] * layers)


def write_folder(folder: Path, config: dict[str, Any], layers: list[dict[str, tuple[int, ...]]]) -> None:
    """A folder with these shapes of each layer's tensors."""
    folder.mkdir(parents=True)
    for source in TOKENIZER.glob("*"):
        if source.name not in ("config.json", "README.md") and source.suffix != ".safetensors":
            shutil.copyfile(source, folder / source.name)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    files: dict[str, str] = {}
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    outside: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocabulary, hidden),
        "model.norm": (hidden,),
    }
    parts = [
        outside,
        *(
            {f"model.layers.{i}.{name}": shape for name, shape in shapes.items()}
            for i, shapes in enumerate(layers)
        ),
    ]
    for number, part in enumerate(parts):
        file = f"model-{number:05d}.safetensors"
        save_file({f"{name}.weight": random_tensor(shape) for name, shape in part.items()}, folder / file)
        files |= {f"{name}.weight": file for name in part}
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, help="Qwen3-30B-A3B's width, with so many experts")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.experts:
        write_moe(options.folder, options.experts, options.layers)
    else:
        write_model(options.folder, options.shape, options.layers)


if __name__ == "__main__":
    main()
