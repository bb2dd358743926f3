"""The layouts of compressed-tensors (app/core/formats/compressed_tensors.py).

Rows of `pack-quantized` are those of the packed weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.core.formats.compressed_tensors import LAYOUT, layout_of
from app.core.formats.file_format import Scheme
from kernels.checks import BITS
from kernels.layouts import packed_words
from kernels.operators import pack, unpack
from kernels.weight import PackedWeight
from workers.formats.packings import Entry, Stored, group_size_of
from workers.modeling.float_numbers import FP8, exponent_codes, exponent_values, packed_fp4, unpacked_fp4
from workers.modeling.quantized_weight import QuantizedWeight, zero_point

FP4_BITS = 4
INT8_ZERO = 128


def pack_linear(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    scheme = weight.scheme
    if layout_of(scheme) == LAYOUT:
        stored = {
            "weight_packed": pack(weight.q, scheme.bits),
            "weight_scale": weight.scale.to(dtype),
            "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
        if not scheme.symmetric:
            stored["weight_zero_point"] = pack(weight.zero, scheme.bits, down=True)
        return stored
    stored = packed_codes(weight)
    stored["weight_scale"] = packed_scale(weight, dtype)
    if weight.divisor is not None:
        stored["weight_global_scale"] = weight.divisor
    if weight.input_scale is not None:
        below = weight.divisor is not None
        stored["input_global_scale" if below else "input_scale"] = (
            weight.input_scale if below else weight.input_scale.to(dtype)
        )
    return stored


def packed_codes(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The numbers of a scheme beside plain integers."""
    if weight.scheme.bits == FP4_BITS:
        return {"weight_packed": packed_fp4(weight.q)}
    if weight.scheme.kind.numbers == "float":
        return {"weight": weight.q.view(FP8)}
    return {"weight": (weight.q.to(torch.int16) - INT8_ZERO).to(torch.int8)}


def packed_scale(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """One scale for each block of rows and group of columns."""
    kind, scale = weight.scheme.kind, weight.scale[:: weight.scheme.kind.block_rows]
    if kind.scales == "e8m0":
        return exponent_codes(scale)
    if kind.scales == "e4m3":
        assert weight.divisor is not None
        return (scale * weight.divisor).to(FP8)  # as it was before it was divided: FP8 is far coarser
    return scale.to(dtype)


def unpack_linear(
    stored: Stored, entry: Entry, scheme: Scheme | None = None
) -> PackedWeight | QuantizedWeight:
    """Rows of under 32 integers may have as many words at several widths: then `scheme` decides."""
    if "weight_shape" not in stored:
        if scheme is None:
            raise ValueError("config.json does not say what numbers it has")
        return unpack_codes(stored, scheme)
    if "weight_g_idx" in stored:
        raise ValueError("its channels are grouped out of order (weight_g_idx)")
    out_features, in_features = (int(size) for size in stored["weight_shape"])
    packed, scale = stored["weight_packed"], stored["weight_scale"]
    widths = BITS if scheme is None else (scheme.bits,)
    bits = next((bits for bits in widths if packed_words(in_features, bits) == packed.shape[1]), None)
    if bits is None or packed.shape[0] != out_features:
        raise ValueError(f"weight_packed {tuple(packed.shape)} is not ({out_features}, {in_features}) packed")
    zero = None
    if "weight_zero_point" in stored:
        zero = unpack(stored["weight_zero_point"].contiguous(), bits, out_features, down=True)
    group_size = group_size_of(in_features, scale.shape[1])
    return PackedWeight(packed, scale.contiguous(), zero, bits, group_size, in_features)


def unpack_codes(stored: Stored, scheme: Scheme) -> QuantizedWeight:
    """The weight of a scheme beside plain integers. Raises ValueError for tensors that don't fit it."""
    kind, name = scheme.kind, "weight_packed" if scheme.bits == FP4_BITS else "weight"
    if name not in stored or "weight_scale" not in stored:
        raise ValueError(f"scheme {scheme.name} needs {name} and weight_scale")
    codes, scale, divisor = stored[name], stored["weight_scale"], stored.get("weight_global_scale")
    if scheme.bits == FP4_BITS:
        q = unpacked_fp4(codes)
    elif kind.numbers == "float":
        q = codes.view(torch.uint8)
    else:
        q = (codes.to(torch.int16) + INT8_ZERO).to(torch.uint8)
    if scale.shape != (-(-q.shape[0] // kind.block_rows), scheme.groups(q.shape[1])):
        raise ValueError(f"weight_scale {tuple(scale.shape)} does not belong to a {tuple(q.shape)} weight")
    values = exponent_values(scale) if kind.scales == "e8m0" else scale.to(torch.float32)
    if kind.scales == "e4m3":
        if divisor is None:
            raise ValueError(f"scheme {scheme.name} needs weight_global_scale")
        values = values / divisor
    inputs = stored.get("input_global_scale", stored.get("input_scale"))
    if kind.inputs is not None and kind.inputs.needs_range and inputs is None:
        raise ValueError(f"scheme {scheme.name} needs the range of inputs")
    rows = values.repeat_interleave(kind.block_rows, dim=0)[: q.shape[0]]
    zero = torch.full(rows.shape, zero_point(scheme), dtype=torch.uint8, device=q.device)
    inputs = None if inputs is None else inputs.to(torch.float32)
    return QuantizedWeight(q, rows, zero, scheme, divisor, inputs)
