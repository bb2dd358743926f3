"""The search's operators on NVIDIA GPUs: kernels/csrc/cuda/search.cu, one launch for each call."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import fallbacks
from kernels.cuda.compiler import CompileError
from kernels.cuda.driver import DriverError, KernelFunction, KernelLaunch
from kernels.cuda.library import shared_library
from kernels.search.grids import GridRule

SOURCE = "search.cu"
GROUP_SIZES = (32, 64, 128)
WARP_ROWS = 16  # of the clip step
PAD = 8  # PAD of search.cu
SCALE_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
ERROR_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


@functools.cache
def runs_on(device: int) -> bool:
    """Whether the kernels can be compiled for the device; notes the reason if not."""
    try:
        shared_library().function(SOURCE, f"clip_step_{GROUP_SIZES[0]}", device)
    except (CompileError, DriverError, ValueError) as fault:
        fallbacks.note("the search", str(fault))
        return False
    return True


def fits(group_size: int, tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels take this group size and these rows, on 16-byte addresses; notes why not."""
    if group_size not in GROUP_SIZES:
        fallbacks.note("the search", f"group_size={group_size} is none of {', '.join(map(str, GROUP_SIZES))}")
        return False
    if not all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(-2) % 4 == 0 and tensor.stride(-2) < 2**31
        for tensor in tensors
    ):
        fallbacks.note("the search", "rows that don't start at multiples of 16 bytes")
        return False
    return True


def function(name: str, tensor: Tensor) -> KernelFunction:
    return shared_library().function(SOURCE, name, tensor.device.index or 0)


def rule_arguments(rule: GridRule) -> tuple[int, int, int, float]:
    """The members of struct Rule."""
    return rule.steps, int(rule.symmetric), SCALE_TYPES[rule.dtype], 2 / rule.steps


def rounding_errors(
    weight: Tensor, scales: Tensor, group_size: int, rule: GridRule, range_factor: float, errors: Tensor
) -> None:
    """Fills errors (candidates, rows, C)."""
    rows, channels = weight.shape
    warps = len(scales) * rows * channels // group_size
    arguments = (weight, scales, errors, len(scales), rows, channels, range_factor)
    kernel = function(f"rounding_errors_{group_size}_{ERROR_NAMES[errors.dtype]}", weight)
    kernel(KernelLaunch((-(-warps // 8), 1, 1), (256, 1, 1)), (*arguments, *rule_arguments(rule)))


@functools.cache
def factors_on(device: torch.device, values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values or (1.0,), dtype=torch.float32, device=device)


def clip_step(
    group: tuple[Tensor, Tensor, Tensor, Tensor],
    ranges: Tensor,
    joint: Sequence[float],
    side: Sequence[float],
    rule: GridRule,
) -> None:
    """Fills error and ranges; `group`: weight, block, others and error."""
    CudaClipStep(group[0].shape, ranges.device, joint, side, rule)(*group, ranges)


class CudaClipStep:
    """The kernel with what stays the same from group to group."""

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        joint: Sequence[float],
        side: Sequence[float],
        rule: GridRule,
    ) -> None:
        rows, size = shape
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        warps = 4 if rows >= 4 * WARP_ROWS * multiprocessors else 2
        shared = 4 * size * (size + PAD) + warps * WARP_ROWS * size * 4
        self.launch = KernelLaunch((-(-rows // (WARP_ROWS * warps)), 1, 1), (32 * warps, 1, 1), shared)
        self.kernel = shared_library().function(SOURCE, f"clip_step_{size}", device.index or 0)
        factors = factors_on(device, (*joint, *side))
        self.last = (factors, len(joint), len(side), rows, *rule_arguments(rule))

    def __call__(self, weight: Tensor, block: Tensor, others: Tensor, error: Tensor, ranges: Tensor) -> None:
        strided = (weight, block, others, error, ranges)
        first = [value for tensor in strided for value in (tensor, tensor.stride(0))]
        self.kernel(self.launch, (*first, *self.last))


def can_dot(left: Tensor, right: Tensor) -> bool:
    """Whether the kernel takes the dtype of both and their columns are even; notes why not."""
    even = all(
        tensor.stride(1) == 1 and tensor.stride(0) % 2 == 0 and tensor.data_ptr() % 8 == 0
        for tensor in (left, right)
    )
    supported = left.dtype == right.dtype and left.dtype in ERROR_NAMES
    if not (even and supported and left.shape[1] % 2 == 0):
        dtypes = f"{left.dtype} and {right.dtype}"
        fallbacks.note("the sum of losses", f"{dtypes}, or rows that are no whole pairs of columns")
        return False
    return runs_on(left.get_device())


def add_row_dots(left: Tensor, right: Tensor, total: Tensor) -> None:
    """total (rows,) float32 += the sum of left * right over each row."""
    rows, columns = left.shape
    kernel = function(f"row_dots_{ERROR_NAMES[left.dtype]}", left)
    arguments = (left, left.stride(0), right, right.stride(0), total, rows, columns)
    kernel(KernelLaunch((-(-rows // 8), 1, 1), (256, 1, 1)), arguments)
