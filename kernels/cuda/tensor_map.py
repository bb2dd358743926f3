"""The copy engine's description of a matrix, from which it fetches tiles (CUtensorMap)."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from kernels.cuda.driver import open_driver

ELEMENT_TYPES = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_FLOAT16, _BFLOAT16
SWIZZLE_128_BYTES = 3
PROMOTE_TO_256_BYTES = 3
SWIZZLED_COLUMNS = 64  # of 16 bits: 128 bytes
ALIGNMENT = 64


class TensorMap(ctypes.Structure):
    """128 bytes that only the driver writes."""

    _fields_ = [("words", ctypes.c_uint64 * 16)]


def describe(matrix: Tensor, box_rows: int) -> TensorMap:
    """Boxes of `box_rows` by 64 columns of a contiguous 16-bit matrix; what lies outside reads as zeros."""
    return description(matrix.data_ptr(), *matrix.shape, matrix.dtype, box_rows)


@functools.lru_cache(maxsize=1024)  # PyTorch hands out the same addresses again and again
def description(address: int, rows: int, columns: int, dtype: torch.dtype, box_rows: int) -> TensorMap:
    memory = (ctypes.c_uint8 * (ctypes.sizeof(TensorMap) + ALIGNMENT))()
    start = -ctypes.addressof(memory) % ALIGNMENT
    open_driver().call(
        "cuTensorMapEncodeTiled",
        ctypes.byref(memory, start),
        ELEMENT_TYPES[dtype],
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(columns * dtype.itemsize),
        (ctypes.c_uint32 * 2)(SWIZZLED_COLUMNS, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        SWIZZLE_128_BYTES,
        PROMOTE_TO_256_BYTES,
        0,
    )
    return TensorMap.from_buffer_copy(memory, start)
