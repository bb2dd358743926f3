"""Packing, unpacking and dequantizing on the GPU: the operators' bodies for CUDA tensors."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels import fallbacks, layouts
from kernels.cuda.compiler import CompileError
from kernels.cuda.decode import TYPE_CODES
from kernels.cuda.driver import DriverError, KernelLaunch
from kernels.cuda.library import shared_library

SOURCE = "packing.cu"
THREADS = 256
MOST_VALUES = 2**31 - 1
NATURAL_ORDER = tuple(range(8))
DEQUANTIZED_AT_ONCE = 8  # values of a thread


@functools.cache
def missing(device: int) -> str | None:
    """Why the kernels can't be had on the device, or None."""
    try:
        shared_library().function(SOURCE, "pack", device, {"BITS": 4})
    except (CompileError, DriverError, ValueError) as fault:
        return str(fault)
    return None


def takes(operator: str, tensor: Tensor) -> bool:
    """Whether the kernels take this tensor; notes why a GPU's tensor is left to PyTorch."""
    if not tensor.is_cuda:
        return False
    why = missing(tensor.get_device())
    if tensor.numel() > MOST_VALUES:
        why = f"tensors of more than {MOST_VALUES} values are beyond its 32-bit indices"
    if why is not None:
        fallbacks.note(operator, why)
    return why is None


def order_word(order: tuple[int, ...]) -> str:
    """Which of eight values lies at each place of a word, a nibble each."""
    return f"{sum(value << (4 * nibble) for nibble, value in enumerate(order)):#x}u"


def pack(values: Tensor, bits: int, *, down: bool = False, order: tuple[int, ...] = NATURAL_ORDER) -> Tensor:
    """uint8 (rows, n) to int32 words along the rows, or (n, columns) along the columns if `down`.

    Raises ValueError for a value that does not fit: it would change its neighbour.
    """
    if values.numel() and int(values.max()) >= 2**bits:
        raise ValueError(f"pack: value {int(values.max())} does not fit {bits} bits")
    values = values.contiguous()
    lines, count = values.shape[::-1] if down else values.shape
    words = layouts.packed_words(count, bits)
    packed = values.new_empty((words, lines) if down else (lines, words), dtype=torch.int32)
    steps = (1, lines, 1, lines) if down else (count, 1, words, 1)
    run("pack", bits, order, packed.numel(), (values, packed, lines, count, words, *steps, int(down)))
    return packed


def unpack(
    packed: Tensor, bits: int, count: int, *, down: bool = False, order: tuple[int, ...] = NATURAL_ORDER
) -> Tensor:
    """The inverse of `pack`: `count` values of each line."""
    packed = packed.contiguous()
    words, lines = packed.shape if down else packed.shape[::-1]
    values = packed.new_empty((count, lines) if down else (lines, count), dtype=torch.uint8)
    steps = (1, lines, 1, lines) if down else (count, 1, words, 1)
    run("unpack", bits, order, values.numel(), (packed, values, lines, count, *steps, int(down)))
    return values


def run(
    name: str, bits: int, order: tuple[int, ...], threads: int, arguments: tuple[Tensor | int, ...]
) -> None:
    """One thread for each of `threads` results."""
    if threads == 0:
        return
    assert isinstance(arguments[0], Tensor)
    defines: dict[str, int | str] = {"BITS": bits, "ORDER": order_word(order)}
    function = shared_library().function(SOURCE, name, arguments[0].get_device(), defines)
    function(KernelLaunch((-(-threads // THREADS), 1, 1), (THREADS, 1, 1)), arguments)


def dequantize(
    qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """operators.dequantize of checked tensors."""
    rows, groups = scale.shape
    output = torch.empty(rows, in_features, dtype=dtype, device=qweight.device)
    defines = {"BITS": bits, "SCALE_TYPE": TYPE_CODES[scale.dtype], "OUTPUT_TYPE": TYPE_CODES[dtype]}
    function = shared_library().function(SOURCE, "dequantize", qweight.get_device(), defines)
    threads = rows * -(-in_features // DEQUANTIZED_AT_ONCE)
    sizes = rows, in_features, qweight.shape[1], groups, in_features // groups
    function(
        KernelLaunch((-(-threads // THREADS), 1, 1), (THREADS, 1, 1)), (qweight, scale, zero, output, *sizes)
    )
    return output
