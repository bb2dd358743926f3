"""A checksum of bytes in memory, for one process: csrc/cpu/checksum.cpp, or CRC-32 without a compiler."""

from __future__ import annotations

import ctypes
import functools
import zlib

from torch import Tensor

from kernels import fallbacks
from kernels.cpu.native_library import CHECKSUM, NotCompiled, built


@functools.cache
def library() -> ctypes.CDLL | None:
    try:
        compiled = built(CHECKSUM, tiles=False)
    except NotCompiled as fault:
        fallbacks.note("the checksum of written files", str(fault))
        return None
    compiled.nibble_checksum.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    compiled.nibble_checksum.restype = ctypes.c_uint64
    return compiled


def checksum(content: Tensor) -> int:
    """Of uint8 (n,), on the CPU, one after another."""
    compiled = library()
    if compiled is None:
        return zlib.crc32(content.numpy().data)
    return int(compiled.nibble_checksum(content.data_ptr(), content.numel()))
