"""Groups of weights to numbers of few bits: csrc/cpu/nearest_numbers.cpp, compiled when it is first used.

Each function gives the bytes that its PyTorch form gives, or None where only that can compute: on another
device, of other dtypes and strides, or without a compiler (which the report says).
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from kernels import fallbacks
from kernels.cpu.native_library import NEAREST, NotCompiled, built

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # `DType` of nearest_numbers.cpp
FP8, FP4, INTEGER = 0, 1, 2  # `Kind`
FLOATS = {8: FP8, 4: FP4}  # by bits
SMALL = 2**16  # values that are not worth a second thread


class GroupsStruct(ctypes.Structure):
    """`Groups` of nearest_numbers.cpp."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("dtype", "count", "size", "threads")),
    )


class NumbersStruct(ctypes.Structure):
    """`Numbers` of nearest_numbers.cpp."""

    _fields_ = (
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
        ("top", ctypes.c_float),
    )


class RoundedStruct(ctypes.Structure):
    """`Rounded` of nearest_numbers.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "table")),
        *((name, ctypes.c_int64) for name in ("rows", "groups", "every")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled passes; the log says why there are none."""
    try:
        compiled = built(NEAREST, tiles=False)
    except NotCompiled as fault:
        fallbacks.note("rounding to nearest", str(fault))
        return None
    groups, pointer = ctypes.POINTER(GroupsStruct), ctypes.c_void_p
    compiled.nibble_ranges.argtypes = [groups, pointer, pointer]
    compiled.nibble_nearest.argtypes = [groups, ctypes.POINTER(NumbersStruct), pointer]
    compiled.nibble_squares.argtypes = [groups, ctypes.POINTER(RoundedStruct), pointer]
    for name in ("ranges", "nearest", "squares"):
        getattr(compiled, "nibble_" + name).restype = None
    return compiled


def fits(grouped: Tensor) -> bool:
    """Whether the library reads it: (..., group_size), on the CPU, one value after another."""
    return (
        grouped.device.type == "cpu"
        and grouped.dtype in TYPES
        and grouped.is_contiguous()
        and not grouped.requires_grad
        and grouped.numel() > 0
    )


def groups_struct(grouped: Tensor) -> GroupsStruct:
    size, values = grouped.shape[-1], grouped.numel()
    threads = 1 if values < SMALL else torch.get_num_threads()
    return GroupsStruct(grouped.data_ptr(), TYPES[grouped.dtype], values // size, size, threads)


def ranges(grouped: Tensor) -> tuple[Tensor, Tensor] | None:
    """The least and the largest of each group, float32 (..., 1), NaN where it holds one."""
    compiled = library() if fits(grouped) else None
    if compiled is None:
        return None
    low, high = (torch.empty((*grouped.shape[:-1], 1)) for _ in range(2))
    compiled.nibble_ranges(groups_struct(grouped), low.data_ptr(), high.data_ptr())
    return low, high


def nearest_floats(grouped: Tensor, scale: Tensor, bits: int) -> Tensor | None:
    """uint8 codes, shaped as `grouped`, of its values divided by `scale`, float32 (..., 1)."""
    return nearest(grouped, NumbersStruct(kind=FLOATS[bits]), (scale,))


def nearest_integers(grouped: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor | None:
    """uint8 integers 0..top, shaped as `grouped`: its values divided by `scale`, rounded, plus `zero`."""
    return nearest(grouped, NumbersStruct(kind=INTEGER, top=top), (scale, zero))


def nearest(grouped: Tensor, numbers: NumbersStruct, of_groups: tuple[Tensor, ...]) -> Tensor | None:
    """`of_groups`: the scales, and of integers the zero points."""
    expected = (*grouped.shape[:-1], 1)
    if not all(each.shape == expected and each.dtype == torch.float32 for each in of_groups):
        return None
    compiled = library() if fits(grouped) else None
    if compiled is None:
        return None
    whole = [each.contiguous() for each in of_groups]
    numbers.scales, numbers.zeros = whole[0].data_ptr(), whole[-1].data_ptr()
    codes = torch.empty(grouped.shape, dtype=torch.uint8)
    compiled.nibble_nearest(groups_struct(grouped), numbers, codes.data_ptr())
    return codes


def squares(
    values: Tensor, codes: Tensor, grid: tuple[Tensor, Tensor], table: Tensor, every: int
) -> tuple[float, float] | None:
    """Sums over every so many rows (rows, C) of the squares of rounding errors and of weights.

    `grid`: scale float32 and zero point uint8, (rows, groups) each; a code n is (table[n] - zero) * scale.
    """
    scale, zero = grid
    expected = ((codes, torch.uint8), (scale, torch.float32), (zero, torch.uint8), (table, torch.float32))
    whole = all(each.is_contiguous() and each.dtype == dtype for each, dtype in expected)
    compiled = library() if whole and fits(values) else None
    if compiled is None:
        return None
    groups = scale.shape[1]
    sums = (ctypes.c_double * 2)()
    rounded = RoundedStruct(
        codes.data_ptr(), scale.data_ptr(), zero.data_ptr(), table.data_ptr(), len(values), groups, every
    )
    compiled.nibble_squares(groups_struct(values.view(len(values) * groups, -1)), rounded, sums)
    return sums[0], sums[1]
