"""A GGUF file as a transformers model: its config, and its tensors by the names of checkpoints.

Names, and what llama.cpp's converter does to values, were read in gguf 0.19.0 (`tensor_mapping.py`) and in
transformers 5.24.0 (`modeling_gguf_pytorch_utils.py`), with whose reading the tests compare every tensor. A
key or tensor without a counterpart here is refused: what a model computes hangs on each.
"""

from __future__ import annotations

import re
from typing import Any

from app.core.records.specs import Frozen
from app.core.sources.gguf_header import GgufHeader, GgufTensor
from app.core.sources.json_file import refused
from app.core.sources.safetensors_header import TensorHeader

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,5})\.([\w.]+)", re.ASCII)
BIASES = {f"attn_{name}.bias": f"self_attn.{name}_proj.bias" for name in "qkv"}
HEAD_NORMS = {f"attn_{name}_norm.weight": f"self_attn.{name}_norm.weight" for name in "qk"}
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GgufArchitecture(Frozen):
    """What the files of one `general.architecture` hold in each layer."""

    class_name: str  # of transformers
    layer: dict[str, str]
    interleaved: bool = False  # the rows of q and k, for llama.cpp's rotary embedding


ARCHITECTURES = {
    "llama": GgufArchitecture(class_name="LlamaForCausalLM", layer=LAYER, interleaved=True),
    "qwen2": GgufArchitecture(class_name="Qwen2ForCausalLM", layer={**LAYER, **BIASES}),
    "qwen3": GgufArchitecture(class_name="Qwen3ForCausalLM", layer={**LAYER, **HEAD_NORMS}),
}
# Keys of an architecture that are understood, and those that say nothing about what is computed.
UNDERSTOOD = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "vocab_size",
    "tensor_data_layout",
)  # fmt: skip
TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def gguf_model(path: str, header: GgufHeader) -> tuple[dict[str, Any], dict[str, TensorHeader]]:
    """The content of config.json, and the tensors.

    Raises ModelRefused for an architecture, a key or a tensor without a counterpart.
    """
    name = header.metadata.get("general.architecture")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise refused(
            "architecture_unsupported",
            f"{path}: the architecture {str(name)[:200]!r} is not read from GGUF",
            f"use a file of one of {', '.join(ARCHITECTURES)}, or the original in safetensors",
        )
    metadata = ArchitectureKeys(path, str(name), header)
    dtype = value_dtype(header)
    return metadata.config(architecture, dtype), {
        checkpoint_name(path, architecture, stored): tensor_header(
            path, tensor, dtype, metadata.interleaved_heads(architecture, stored)
        )
        for stored, tensor in header.tensors.items()
    }


class ArchitectureKeys:
    """The keys of the file that begin with its architecture's name."""

    def __init__(self, path: str, model_type: str, header: GgufHeader) -> None:
        self.path, self.model_type, self.header = path, model_type, header
        prefix = f"{model_type}."
        self.values = {
            key.removeprefix(prefix): value
            for key, value in header.metadata.items()
            if key.startswith(prefix)
        }
        for key, value in self.values.items():
            if key not in UNDERSTOOD:
                raise self.unsupported(f"{prefix}{key} is {str(value)[:100]!r}")
        self.heads = self.natural("attention.head_count")
        self.kv_heads = self.natural("attention.head_count_kv", self.heads)
        self.head_size = self.natural("attention.key_length", self.natural("embedding_length") // self.heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.natural(key, self.head_size) != self.head_size:
                raise self.unsupported(
                    f"{prefix}{key} is {self.values[key]}, not the {self.head_size} of a head"
                )

    def unsupported(self, why: str) -> Exception:
        return refused(
            "gguf_unsupported",
            f"{self.path}: {why}, for which a {self.model_type} of transformers has no counterpart here",
            "submit the original model in safetensors",
        )

    def natural(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise refused(
                "model_config_invalid",
                f"{self.path}: {self.model_type}.{key} is {value!r}, expected a positive integer",
                "export the file again",
            )
        return value

    def real(self, key: str, default: float) -> float:
        """Files hold 32 bits: seven digits are what was meant."""
        value = self.values.get(key, default)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise refused(
                "model_config_invalid",
                f"{self.path}: {self.model_type}.{key} is {value!r}, expected a positive number",
                "export the file again",
            )
        return float(f"{value:.7g}")

    def config(self, architecture: GgufArchitecture, dtype: str) -> dict[str, Any]:
        embedding = self.header.tensors.get("token_embd.weight")
        if embedding is None:
            raise refused(
                "weights_missing", f"{self.path} holds no token_embd.weight", "export the file again"
            )
        tokens = {
            key: self.header.metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in TOKENS.items()
        }
        return {
            "architectures": [architecture.class_name],
            "model_type": self.model_type,
            "dtype": DTYPES[dtype],
            "hidden_size": self.natural("embedding_length"),
            "intermediate_size": self.natural("feed_forward_length"),
            "num_hidden_layers": self.natural("block_count"),
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": self.natural("context_length"),
            "rms_norm_eps": self.real("attention.layer_norm_rms_epsilon", 1e-6),
            "rope_theta": self.real("rope.freq_base", 10000.0),
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": "output.weight" not in self.header.tensors,
            **{key: value for key, value in tokens.items() if isinstance(value, int)},
        }

    def interleaved_heads(self, architecture: GgufArchitecture, stored: str) -> int:
        if not architecture.interleaved:
            return 0
        counts = {"attn_q.weight": self.heads, "attn_k.weight": self.kv_heads}
        return counts.get(stored.split(".", 2)[-1], 0)


def checkpoint_name(path: str, architecture: GgufArchitecture, stored: str) -> str:
    if stored in OUTSIDE:
        return OUTSIDE[stored]
    block = BLOCK.fullmatch(stored)
    if block is None or block[2] not in architecture.layer:
        raise refused(
            "gguf_unsupported",
            f"{path}: the tensor {stored[:200]} has no counterpart in {architecture.class_name}",
            "submit the original model in safetensors",
        )
    return f"model.layers.{block[1]}.{architecture.layer[block[2]]}"


def value_dtype(header: GgufHeader) -> str:
    """The dtype in which matrices are read: the file's where they are plain numbers, else that of the
    scales of most block types, float16."""
    kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1}
    if "BF16" in kinds:
        return "BF16"
    return "F32" if kinds == {"F32"} else "F16"


def tensor_header(path: str, tensor: GgufTensor, dtype: str, interleaved: int) -> TensorHeader:
    if interleaved and tensor.shape[0] % (2 * interleaved):
        raise refused(
            "model_header_invalid",
            f"{path}: {tensor.shape[0]} rows are not those of {interleaved} heads",
            "export the file again",
        )
    own = dtype if len(tensor.shape) > 1 else "F32"
    is_plain = tensor.kind == own and not interleaved
    return TensorHeader(
        dtype=own, shape=tensor.shape, file=path, start=tensor.start, end=tensor.end,
        encoding=None if is_plain else tensor.kind, interleaved=interleaved,
    )  # fmt: skip
