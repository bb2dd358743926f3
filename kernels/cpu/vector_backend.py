"""Products on processors with AVX-512 but no matrix units, for any dtype.

The same products as in a whole decoder's call, a linear at a time: with VNNI of integers (csrc/cpu/lanes.h),
else in float32 with weights decoded in registers (csrc/cpu/products.h).
"""

from __future__ import annotations

import copy
import ctypes

import torch
from torch import Tensor

from kernels.checks import check_bias, check_input
from kernels.cpu.blocked_layout import BlockedWeight, to_blocks
from kernels.cpu.native import Blocks, threads_for
from kernels.cpu.native_library import NotCompiled
from kernels.cpu.whole_decoder import (
    CHANNEL_MULTIPLE,
    LinearStruct,
    decoder_library,
    keeps_floats,
    reads_lanes,
)
from kernels.product import LinearProduct
from kernels.weight import PackedWeight

MOST_ROWS = 64  # multiplied at once, which bounds the memory of each thread: `kSlab` of lanes.h


class VectorKernel:
    """Keeps a weight in blocks."""

    def __init__(self, weight: BlockedWeight, dtype: torch.dtype) -> None:
        library = decoder_library()
        if isinstance(library, str):
            raise NotCompiled(library)
        self.weight, self.dtype, self._product = weight, dtype, library.nibble_product
        self._blocks = Blocks.of(weight)
        self._channels = -(-weight.in_features // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
        self._linear = LinearStruct(
            packed=ctypes.pointer(self._blocks.struct),
            in_features=self._channels,
            out_features=weight.out_features,
            fine=keeps_floats(dtype),
        )

    def __deepcopy__(self, memo: dict[int, object]) -> VectorKernel:
        return VectorKernel(copy.deepcopy(self.weight, memo), self.dtype)

    @property
    def packed_bytes(self) -> int:
        return self.weight.packed_bytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.weight
        check_input(x, weight.in_features, self.dtype, weight.codes.device)
        check_bias(bias, weight.out_features, x)
        rows = x.reshape(-1, weight.in_features).float()
        rows = torch.nn.functional.pad(rows, (0, self._channels - weight.in_features)).contiguous()
        output = torch.empty(rows.shape[0], weight.out_features)
        for first in range(0, rows.shape[0], MOST_ROWS):
            some, target = rows[first : first + MOST_ROWS], output[first : first + MOST_ROWS]
            self._product(
                ctypes.byref(self._linear), some.data_ptr(), some.shape[0], target.data_ptr(),
                threads_for(self._blocks, some.shape[0]),
            )  # fmt: skip
        whole = output if bias is None else output + bias.float()
        return whole.to(x.dtype).view(*x.shape[:-1], weight.out_features)


class VectorBackend:
    name = "vector"

    def can_implement(self, problem: LinearProduct) -> str | None:
        """None, or why the library can't be had. The first call compiles it."""
        library = decoder_library()
        return library if isinstance(library, str) else None

    def prepare(self, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> VectorKernel:
        return VectorKernel(to_blocks(weight.to(device), in_lanes=reads_lanes()), dtype)
