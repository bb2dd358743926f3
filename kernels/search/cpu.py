"""The search's operators on CPUs: kernels/csrc/cpu/search.cpp, compiled when they are first used."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import fallbacks
from kernels.cpu.native_library import SEARCH, TILES_NEED, NotCompiled, built, processor
from kernels.search.grids import GridRule

GROUP_SIZES = (32, 64, 128)  # of the clip step
LANES = 16  # values of a vector
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # `ScaleType` of search.cpp
SMALL = 2**16  # values that are not worth a second thread


class RuleStruct(ctypes.Structure):
    """`Rule` of search.cpp."""

    _fields_ = (
        ("steps", ctypes.c_int64),
        ("symmetric", ctypes.c_int64),
        ("scale_type", ctypes.c_int64),
        ("two_steps", ctypes.c_float),
        ("range_factor", ctypes.c_float),
    )


class RowsStruct(ctypes.Structure):
    """`Rows` of search.cpp."""

    _fields_ = (("at", ctypes.c_void_p), ("stride", ctypes.c_int64))


class ClipStruct(ctypes.Structure):
    """`ClipStep` of search.cpp."""

    _fields_ = (
        *((name, RowsStruct) for name in ("weight", "block", "others", "error", "ranges")),
        ("factors", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("joint", "side", "rows", "size", "threads")),
    )


class ColumnsStruct(ctypes.Structure):
    """`ColumnBlock` of columns.h."""

    _fields_ = (
        *((name, RowsStruct) for name in ("target", "before", "rounded", "change")),
        *((name, RowsStruct) for name in ("coefficients", "scale", "low")),
        ("group", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("columns", "rows", "threads")),
        ("steps", ctypes.c_float),
    )


def rows_of(tensor: Tensor | None) -> RowsStruct:
    return RowsStruct() if tensor is None else RowsStruct(tensor.data_ptr(), tensor.stride(0))


def rule_struct(rule: GridRule, range_factor: float = 1.0) -> RuleStruct:
    return RuleStruct(rule.steps, rule.symmetric, TYPES[rule.dtype], 2 / rule.steps, range_factor)


def has_tiles() -> bool:
    """Whether the CPU has matrix units for bfloat16."""
    return processor()[1] >= TILES_NEED


def has_bfloat16_products() -> bool:
    """Whether the CPU multiplies bfloat16 in half of the time of float32 or less."""
    return "avx512_bf16" in processor()[1]


@functools.cache
def loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, with AMX where there is one, and its name for reports; the log says why there is none."""
    reasons = []
    for tiles in (True, False) if has_tiles() else (False,):
        try:
            return typed(built(SEARCH, tiles=tiles)), "cpu-amx" if tiles else "cpu-vectors"
        except NotCompiled as fault:
            reasons.append(str(fault))
    fallbacks.note("the search", "; ".join(reasons))
    return None, "torch"


def library() -> ctypes.CDLL | None:
    return loaded()[0]


def typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """Raises NotCompiled if the system keeps the registers back that it was compiled for."""
    if not library.nibble_search_ready():
        raise NotCompiled("the system does not grant AMX's registers")
    pointer, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    rule = ctypes.POINTER(RuleStruct)
    library.nibble_rounding_errors.argtypes = [
        pointer, pointer, number, number, number, number, rule, pointer, number, threads,
    ]  # fmt: skip
    library.nibble_clip_step.argtypes = [ctypes.POINTER(ClipStruct), rule]
    library.nibble_row_dots.argtypes = [pointer, number, pointer, number, pointer, number, number, threads]
    library.nibble_round_columns.argtypes = [ctypes.POINTER(ColumnsStruct)]
    for name in ("rounding_errors", "clip_step", "row_dots", "round_columns"):
        getattr(library, "nibble_" + name).restype = None
    return library


def threads_for(values: int) -> int:
    return 1 if values < SMALL else torch.get_num_threads()


def rounding_errors(
    weight: Tensor, scales: Tensor, group_size: int, rule: GridRule, range_factor: float, errors: Tensor
) -> bool:
    """Fills errors (candidates, rows, C) as PyTorch's operators would, to the bit; False if it can't."""
    rows, channels = weight.shape
    size = channels if group_size == -1 else group_size
    compiled = library() if size % LANES == 0 else None
    if compiled is None:
        return False
    compiled.nibble_rounding_errors(
        weight.data_ptr(), scales.data_ptr(), scales.shape[0], rows, channels, size,
        rule_struct(rule, range_factor), errors.data_ptr(), TYPES[errors.dtype], threads_for(errors.numel()),
    )  # fmt: skip
    return True


def can_clip(group_size: int) -> bool:
    return group_size in GROUP_SIZES and library() is not None


class CpuClipStep:
    """The kernel with what stays the same from group to group."""

    def __init__(self, joint: Sequence[float], side: Sequence[float], rule: GridRule) -> None:
        compiled = library()
        assert compiled is not None
        self.step, self.rule = compiled.nibble_clip_step, rule_struct(rule)
        self.counts = len(joint), len(side)
        self.factors = (ctypes.c_float * (len(joint) + len(side)))(*joint, *side)

    def __call__(self, weight: Tensor, block: Tensor, others: Tensor, error: Tensor, ranges: Tensor) -> None:
        rows = (rows_of(tensor) for tensor in (weight, block, others, error, ranges))
        factors = ctypes.cast(self.factors, ctypes.c_void_p)
        self.step(
            ClipStruct(*rows, factors, *self.counts, *weight.shape, threads_for(weight.numel())), self.rule
        )


def can_dot(left: Tensor, right: Tensor) -> bool:
    rows_lie_together = left.stride(1) == right.stride(1) == 1
    return left.dtype == right.dtype == torch.bfloat16 and rows_lie_together and library() is not None


def add_row_dots(left: Tensor, right: Tensor, total: Tensor) -> None:
    """total (rows,) float32 += the sum of left * right over each row."""
    compiled = library()
    assert compiled is not None
    compiled.nibble_row_dots(
        left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0), total.data_ptr(), *left.shape,
        threads_for(left.numel()),
    )  # fmt: skip


def round_columns(values: Sequence[Tensor | None], grid: Sequence[Tensor], steps: int) -> bool:
    """Fills the third and fourth of target, before, rounded, change, coefficients; False if it can't.

    grid: scale, low and the group of each column, int64.
    """
    compiled = library()
    if compiled is None:
        return False
    target, (scale, low, group) = values[0], grid
    assert target is not None
    rows = (rows_of(tensor) for tensor in (*values, scale, low))
    compiled.nibble_round_columns(
        ColumnsStruct(*rows, group.data_ptr(), *target.shape, threads_for(target.numel()), steps)
    )
    return True
