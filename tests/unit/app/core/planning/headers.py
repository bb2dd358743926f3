"""Headers of a small model, and its plans."""

from __future__ import annotations

from typing import Any

from app.core.planning.plan import Plan, plan_job
from app.core.records.specs import JobSpec
from app.core.sources.safetensors_header import TensorHeader

CONFIG: dict[str, object] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 192,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
}
SHAPES = {
    "self_attn.q_proj": (192, 192), "self_attn.k_proj": (96, 192), "self_attn.v_proj": (96, 192),
    "self_attn.o_proj": (192, 192), "mlp.gate_proj": (320, 192), "mlp.up_proj": (320, 192),
    "mlp.down_proj": (192, 320),
}  # fmt: skip
WEIGHTS_PER_LAYER = sum(rows * columns for rows, columns in SHAPES.values())


def header(shape: tuple[int, ...], dtype: str = "BF16") -> TensorHeader:
    size = 4 if dtype == "F32" else 2
    for length in shape:
        size *= length
    return TensorHeader(dtype=dtype, shape=shape, file="model.safetensors", start=0, end=size)


def tensors(**changes: TensorHeader) -> dict[str, TensorHeader]:
    found = {"model.embed_tokens.weight": header((1000, 192)), "model.norm.weight": header((192,))}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}{name}.weight": header(shape) for name, shape in SHAPES.items()}
        found[prefix + "input_layernorm.weight"] = header((192,))
    return {**found, **changes}


def planned(spec: JobSpec | None = None, config: dict[str, Any] | None = None) -> Plan:
    return plan_job(spec or asked(), {**CONFIG, **(config or {})}, tensors())


def asked(*formats: str, **recipe: object) -> JobSpec:
    body = {"group_size": 64, **recipe}
    return JobSpec.model_validate(
        {"model": "m", "recipe": body, "formats": formats or ("compressed-tensors",)}
    )
