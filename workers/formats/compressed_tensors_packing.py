"""`pack-quantized`: rows are those of the packed weight (app/core/formats/compressed_tensors.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from kernels.checks import BITS
from kernels.layouts import packed_words
from kernels.operators import pack, unpack
from kernels.weight import PackedWeight
from workers.formats.packings import Entry, Stored, group_size_of
from workers.modeling.quantized_weight import QuantizedWeight


def pack_linear(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    bits = weight.scheme.bits
    stored = {
        "weight_packed": pack(weight.q, bits),
        "weight_scale": weight.scale.to(dtype),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if not weight.scheme.symmetric:
        stored["weight_zero_point"] = pack(weight.zero, bits, down=True)
    return stored


def unpack_linear(stored: Stored, entry: Entry, scheme: Scheme | None = None) -> PackedWeight:
    """Rows of under 32 integers may have as many words at several widths: then `scheme` decides."""
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
