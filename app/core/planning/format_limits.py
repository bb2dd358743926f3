"""What each file format can hold, and the bytes that it takes.

Layouts: AutoAWQ `awq/modules/linear/gemm.py`, compressed-tensors `compressors/pack_quantized`, GPTQ
`quant.py` as GPTQModel writes it (checkpoint format `gptq`, the first version).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from app.core.records.specs import FormatName, Frozen


class Scheme(Frozen):
    """The integer grid of one linear. `group_size` -1 is one group per output channel."""

    bits: int
    group_size: int
    symmetric: bool

    def groups(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else in_features // self.group_size


def common_scheme(schemes: Iterable[Scheme | None]) -> Scheme:
    """The scheme that most of the linears have; at least one must have any."""
    counts = Counter(scheme for scheme in schemes if scheme is not None)
    return counts.most_common(1)[0][0]


class FormatRefusal(Frozen):
    why: str
    nearest: str


def awq_refusal(schemes: set[Scheme]) -> FormatRefusal | None:
    """AutoAWQ's GEMM layout: one scheme for the whole model, 4 bits, zero points, finite groups."""
    if len(schemes) > 1:
        return FormatRefusal(
            why="holds one bit width and group size for all linears, and here they have several",
            nearest="one scheme without overrides or smaller groups, or the format compressed-tensors",
        )
    for scheme in schemes:
        if scheme.bits != 4:
            return FormatRefusal(why=f"holds 4 bits only, not {scheme.bits}", nearest="bits 4")
        if scheme.symmetric:
            return FormatRefusal(why="always has zero points", nearest="symmetric false")
        if scheme.group_size == -1:
            return FormatRefusal(why="needs a finite group size", nearest="group_size 128")
    return None


def gptq_refusal(schemes: set[Scheme]) -> FormatRefusal | None:
    """GPTQ v1 stores zero points less one, so 0 has no place; vLLM reads symmetric files only."""
    if not all(scheme.symmetric for scheme in schemes):
        return FormatRefusal(why="holds symmetric grids only", nearest="symmetric true")
    return None


def format_refusal(name: FormatName, schemes: set[Scheme]) -> FormatRefusal | None:
    """Why `name` can't hold a model of these schemes, or None. compressed-tensors holds all that we make."""
    if name == "awq":
        return awq_refusal(schemes)
    return gptq_refusal(schemes) if name == "gptq" else None


# What out_features and in_features must be multiples of: formats without padding pack whole words.
SHAPE_MULTIPLES: dict[FormatName, tuple[int, int]] = {
    "awq": (8, 1), "compressed-tensors": (1, 1), "gptq": (32, 32)
}  # fmt: skip


def shape_refusal(name: FormatName, out_features: int, in_features: int) -> str | None:
    """Why `name` can't hold a linear of this shape, or None."""
    out_multiple, in_multiple = SHAPE_MULTIPLES[name]
    if out_features % out_multiple:
        return f"out_features={out_features} is not a multiple of {out_multiple}"
    if in_features % in_multiple:
        return f"in_features={in_features} is not a multiple of {in_multiple}"
    return None


FLOAT16_FORMATS: tuple[FormatName, ...] = (
    "awq",
    "gptq",
)  # whose scales are float16 whatever the model's dtype


def words(values: int, bits: int) -> int:
    """int32 words for `values` integers packed densely."""
    return -(-values * bits // 32)


def packed_bytes(
    name: FormatName, scheme: Scheme, out_features: int, in_features: int, *, weight_bits: int
) -> int:
    """Bytes of one quantized linear's tensors, bias excluded; `weight_bits` is the original's width."""
    groups = scheme.groups(in_features)
    if name == "awq":
        scales = 2 * out_features * groups  # always float16
        return 4 * in_features * (out_features // 8) + 4 * groups * (out_features // 8) + scales
    if name == "gptq":
        columns = words(in_features, scheme.bits) * out_features + groups * words(out_features, scheme.bits)
        return 4 * columns + 2 * out_features * groups + 4 * in_features
    scales = weight_bits // 8 * out_features * groups
    zeros = 0 if scheme.symmetric else 4 * words(out_features, scheme.bits) * groups
    return 4 * out_features * words(in_features, scheme.bits) + scales + zeros + 16
