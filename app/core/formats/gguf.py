"""GGUF, the single file of llama.cpp: weights in blocks of 32, the settings of the model and its tokenizer.

Block types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and gguf 0.19.0 (`quants.py`), which
writes no K-quants: their super-blocks of 256 have scales of their own that a recipe does not search. The
model types are those whose answers the judge compares with llama.cpp's; what its converter
(`conversion/` of ggml-org/llama.cpp) does to their tensors was read there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from app.core.formats.file_format import FileFormat, FormatRefusal, ModuleSchemes, Scheme, StoredTensor

BLOCK: Literal[32] = 32  # values
OTHER_FORMAT = "the format compressed-tensors"


class BlockLayout(NamedTuple):
    """A block type of GGML, and its bytes."""

    name: str
    size: int


# By bits and symmetric. Q4_0: d and 16 bytes of two integers; Q4_1: d, m and the same; Q8_0: d and 32 bytes.
BLOCKS = {
    (4, True): BlockLayout("Q4_0", 18),
    (4, False): BlockLayout("Q4_1", 20),
    (8, True): BlockLayout("Q8_0", 34),
}
ROPE_TYPES = ("default", "linear", "llama3")


class Setting(NamedTuple):
    """A key of config.json, what its absence means, and the values that llama.cpp computes."""

    key: str
    absent: Any
    allowed: tuple[Any, ...]


@dataclass(frozen=True)
class GgufFamily:
    """How a model type lies in GGUF."""

    architecture: str  # of llama.cpp
    interleaved: bool = False  # the rows of q and k, for llama.cpp's rotary embedding
    settings: tuple[Setting, ...] = ()
    # Keys of config.json that go to keys of the architecture as they are.
    numbers: Mapping[str, str] = field(default_factory=dict)


SILU = Setting("hidden_act", "silu", ("silu",))
NO_WINDOW = Setting("use_sliding_window", False, (False,))
NO_BIAS = Setting("attention_bias", False, (False,))
NO_MLP_BIAS = Setting("mlp_bias", False, (False,))
FAMILIES = {
    "llama": GgufFamily("llama", interleaved=True, settings=(SILU, NO_BIAS, NO_MLP_BIAS)),
    "mistral": GgufFamily(
        "llama", interleaved=True, settings=(SILU, Setting("sliding_window", 4096, (None,)))
    ),
    "qwen2": GgufFamily("qwen2", settings=(SILU, NO_WINDOW)),
    "qwen3": GgufFamily("qwen3", settings=(SILU, NO_WINDOW, NO_BIAS)),
    "olmo2": GgufFamily("olmo2", settings=(SILU, NO_BIAS)),
    "granite": GgufFamily(
        "granite", interleaved=True, settings=(SILU, NO_BIAS, NO_MLP_BIAS),
        numbers={
            "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
        },
    ),
    "smollm3": GgufFamily(
        "smollm3", interleaved=True,
        settings=(SILU, NO_WINDOW, NO_BIAS, NO_MLP_BIAS, Setting("no_rope_layer_interval", 4, (4,))),
    ),
}  # fmt: skip
# Why the others are not written, by what is in their names.
REASONS = {
    "moe": "its experts lie in tensors of three dimensions there, which are not written yet",
    "mixtral": "its experts lie in tensors of three dimensions there, which are not written yet",
    "gemma": "its vocabulary is SentencePiece's and its norms are stored plus one, which are not written yet",
    "phi3": "its fused matrices and rotary factors were not compared with llama.cpp's",
    "mamba": "its recurrent layers were not compared with llama.cpp's",
}


class GgufFormat(FileFormat):
    """Integers of 4 and 8 bits in groups of 32, of the model types above."""

    suffixes = ("blocks",)
    scale_dtype = "F16"
    group_size = BLOCK
    single_file = "model.gguf"
    unserved = "deployments don't read them; llama.cpp's server does: `llama-server -m model.gguf`"

    def tensors(
        self, out_features: int, in_features: int, scheme: Scheme, dtype: str
    ) -> dict[str, StoredTensor]:
        row = in_features // BLOCK * block_of(scheme).size
        return {"blocks": StoredTensor((out_features, row), "U8")}

    def entry(self, modules: ModuleSchemes) -> dict[str, Any]:
        return {"quant_method": "gguf"}

    def dense_dtype(self, shape: tuple[int, ...], dtype: str) -> str:
        """llama.cpp multiplies by norms and adds biases in float32."""
        return "F32" if len(shape) < 2 else dtype

    def refusal(self, schemes: set[Scheme]) -> FormatRefusal | None:
        if (refusal := super().refusal(schemes)) is not None:
            return refusal
        for scheme in sorted(schemes, key=lambda each: (each.bits, each.group_size, each.symmetric)):
            if scheme.group_size != BLOCK:
                size = "whole rows" if scheme.group_size == -1 else str(scheme.group_size)
                return FormatRefusal(f"holds groups of {BLOCK}, not of {size}", f"group_size {BLOCK}")
            if (scheme.bits, scheme.symmetric) in BLOCKS:
                continue
            if scheme.bits == 8:
                return FormatRefusal("holds 8 bits without zero points only", "symmetric true")
            return FormatRefusal(f"holds 4 and 8 bits, not {scheme.bits}", "bits 4")
        return None

    def model_refusal(self, model_type: str, config: Mapping[str, Any]) -> FormatRefusal | None:
        family = FAMILIES.get(model_type)
        if family is None:
            reason = next((why for name, why in REASONS.items() if name in model_type), None)
            because = "" if reason is None else f": {reason}"
            return FormatRefusal(
                f"holds models of the types {', '.join(FAMILIES)}, not {model_type}{because}", OTHER_FORMAT
            )
        for setting in family.settings:
            value = config.get(setting.key, setting.absent)
            if value not in setting.allowed:
                allowed = " or ".join(map(repr, setting.allowed))
                return FormatRefusal(
                    f"holds models of type {model_type} with {setting.key} {allowed}, not {value!r}",
                    OTHER_FORMAT,
                )
        rope: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if kind not in ROPE_TYPES or share not in (None, 1, 1.0):
            what = f"rope_type {kind!r}" if kind not in ROPE_TYPES else f"partial_rotary_factor {share}"
            return FormatRefusal(
                f"holds rotary embeddings of the types {', '.join(ROPE_TYPES)} over whole heads, not {what}",
                OTHER_FORMAT,
            )
        return None

    def loader_notes(self, modules: ModuleSchemes, model_type: str) -> Iterator[str]:
        yield f"gguf files: {self.unserved}"

    def unreadable(self, entry: Mapping[str, Any]) -> str | None:
        return self.unserved


def block_of(scheme: Scheme) -> BlockLayout:
    """The block type of a scheme that the format holds."""
    return BLOCKS[scheme.bits, scheme.symmetric]
