"""Writes a random Llama checkpoint, shard by layer, with the bundled model's tokenizer."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "wikitext-llama-6m"
SHAPES = {  # hidden, intermediate, heads, key/value heads, vocabulary
    "small": (1024, 2816, 16, 4, 4096),
    "tinyllama-1.1b": (2048, 5632, 32, 4, 32000),
    "llama-3-8b": (4096, 14336, 32, 8, 128256),
}


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


def random_tensor(shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return 1 + 0.1 * torch.randn(shape).to(torch.bfloat16)
    return (torch.randn(shape) * shape[1] ** -0.5).to(torch.bfloat16)


def write_model(folder: Path, shape: str, layers: int) -> None:
    hidden, intermediate, heads, kv_heads, vocabulary = SHAPES[shape]
    folder.mkdir(parents=True)
    for file in TOKENIZER.glob("*"):
        if file.name not in ("config.json", "README.md") and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
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
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    files: dict[str, str] = {}
    outside = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,)}
    parts = [
        outside,
        *(
            {
                f"model.layers.{i}.{n}": s
                for n, s in layer_shapes(hidden, intermediate, heads, kv_heads).items()
            }
            for i in range(layers)
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
    options = parser.parse_args()
    torch.manual_seed(0)
    write_model(options.folder, options.shape, options.layers)


if __name__ == "__main__":
    main()
