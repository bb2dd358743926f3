"""AutoAWQ's GEMM layout: qweight, qzeros and scales, packed along the output channels.

Zero points are stored as they are, scales always as float16. Source: AutoAWQ `awq/modules/linear/gemm.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from app.core.formats.file_format import FileFormat, FormatRefusal, ModuleSchemes, Scheme, StoredTensor, words
from app.core.formats.targets import expert_set, fused_names

BITS = 4  # that the layout knows


class AwqFormat(FileFormat):
    """One scheme for the whole model: 4 bits, zero points, finite groups."""

    suffixes = ("qweight", "qzeros", "scales")
    multiples = (8, 1)
    scale_dtype = "F16"
    transformers_needs = ("gptqmodel", "accelerate")

    def tensors(
        self, out_features: int, in_features: int, scheme: Scheme, dtype: str
    ) -> dict[str, StoredTensor]:
        groups, columns = scheme.groups(in_features), words(out_features, BITS)
        return {
            "qweight": StoredTensor((in_features, columns), "I32"),
            "qzeros": StoredTensor((groups, columns), "I32"),
            "scales": StoredTensor((groups, out_features), "F16"),
        }

    def entry(self, modules: ModuleSchemes) -> dict[str, Any]:
        (scheme,) = modules.distinct
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": True,
            **({"lm_head": True} if modules.head is not None else {}),
            "modules_to_not_convert": unconverted(modules),
        }

    def refusal(self, schemes: set[Scheme]) -> FormatRefusal | None:
        if (refusal := super().refusal(schemes)) is not None:
            return refusal
        if len(schemes) > 1:
            return FormatRefusal(
                why="holds one bit width and group size for all linears, and here they have several",
                nearest="one scheme without overrides or smaller groups, or the format compressed-tensors",
            )
        for scheme in schemes:
            if scheme.bits != BITS:
                return FormatRefusal(why=f"holds 4 bits only, not {scheme.bits}", nearest="bits 4")
            if scheme.symmetric:
                return FormatRefusal(why="always has zero points", nearest="symmetric false")
            if scheme.group_size == -1:
                return FormatRefusal(why="needs a finite group size", nearest="group_size 128")
        return None

    def loader_notes(self, modules: ModuleSchemes, model_type: str) -> Iterator[str]:
        yield from self.head_notes(modules, "transformers 5.24")
        if modules.of_experts:
            yield "transformers 5.24 reads awq files of linears alone, not of experts"

    def unreadable(self, entry: Mapping[str, Any]) -> str | None:
        version = entry.get("version", "gemm")
        return None if str(version).lower() == "gemm" else f"AWQ's layout {version!r} is not gemm"


def unconverted(modules: ModuleSchemes) -> list[str]:
    """The modules that keep their precision, under the names of which loaders find one in a module's name.

    vLLM and SGLang ask for the experts of a layer together and for fused matrices: neither holds the name of
    a part. A layer's experts share one scheme, and so do the parts of a fused matrix.
    """
    names: dict[str, None] = {}
    for name in modules.unquantized:
        experts = expert_set(name)
        names |= dict.fromkeys((name, *fused_names(name)) if experts is None else (experts,))
    return list(names | dict.fromkeys(modules.towers))
