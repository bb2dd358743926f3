"""Bodies for CUDA tensors of torch.ops.nibble.pack, unpack and dequantize: one launch for each call."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import layouts, operators
from kernels.checks import DTYPES, check_dtype, check_packed
from kernels.cuda import packing


@operators.pack.register_kernel("cuda")
def pack(values: Tensor, bits: int) -> Tensor:
    operators.check_values(values, bits)
    return packing.pack(values, bits) if packing.takes(values) else layouts.pack_rows(values, bits)


@operators.unpack.register_kernel("cuda")
def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    operators.check_words(words, bits, count)
    if packing.takes(words):
        return packing.unpack(words, bits, count)
    return layouts.unpack_rows(words, bits, count)


@operators.dequantize.register_kernel("cuda")
def dequantize(
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    check_packed(qweight, scale, zero, bits, group_size, in_features)
    check_dtype("dtype", dtype, DTYPES)
    if packing.takes(qweight):
        return packing.dequantize(qweight, scale, zero, bits, in_features, dtype)
    return operators.dequantize_in_torch(qweight, scale, zero, bits, in_features, dtype)
