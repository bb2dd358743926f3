"""Products on AMX tiles.

One or two rows are multiplied as integers (csrc/cpu/digits.h), which is faster and as precise.
bfloat16 has 8 significant bits, and so has what tiles multiply. A float16 or float32 input is written as a
sum of bfloat16 numbers (two or three, which hold all its bits), and each is multiplied: no input loses
precision, and none takes a scalar path.
"""

from __future__ import annotations

import copy
import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.checks import (
    BITS,
    DTYPES,
    GROUP_SIZES,
    check_bias,
    check_contiguous,
    check_device,
    check_dtype,
    check_input,
    check_one_of,
    check_shape,
)
from kernels.cpu.blocked_layout import (
    CHUNK,
    DIGIT_BITS,
    FILL_ROWS,
    ROWS,
    WORDS,
    BlockedWeight,
    groups_per_chunk,
    to_blocks,
)
from kernels.cpu.native_library import BlockedStruct, NotCompiled, address, native_library
from kernels.product import LinearProduct
from kernels.weight import PackedWeight

Product = Callable[..., int | None]  # of the library

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # `ScaleType` of linear.cpp
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # bfloat16 numbers that hold an input

MOST_ROWS = 2048  # multiplied at once: bounds the memory for a rearranged input
# Up to here integers are faster than tiles, whose product of one row takes as long as that of sixteen.
DIGITS_BEFORE_TILES = 2
SMALL_PRODUCT = 2**20  # multiplications that are not worth a second thread


def blocked_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    """x (..., in_features) to (..., out_features), from a BlockedWeight's tensors."""
    check_blocked(x, codes, scale, zero, bits, group_size, out_features)
    return product(Blocks(codes, scale, zero, bits, group_size), x, bias, out_features)


def blocked_linear_fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    check_blocked(x, codes, scale, zero, bits, group_size, out_features)
    check_bias(bias, out_features, x)
    return x.new_empty((*x.shape[:-1], out_features))


def check_blocked(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> None:
    """Checks all sizes: the library does not, and would read beyond the tensors."""
    check_one_of("bits", bits, BITS)
    check_one_of("group_size", group_size, GROUP_SIZES)
    check_dtype("x", x.dtype, DTYPES)
    check_dtype("codes", codes.dtype, (torch.uint8,))
    check_dtype("scale", scale.dtype, DTYPES)
    if x.dim() == 0 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: (..., in_features)")
    if out_features < 1:
        raise ValueError(f"out_features={out_features}; allowed: 1 and more")
    chunks, blocks = -(-x.shape[-1] // CHUNK), -(-out_features // FILL_ROWS) * FILL_ROWS // ROWS
    planes = 2 if bits > DIGIT_BITS else 1
    check_shape("codes", codes, (blocks, chunks, ROWS, planes, 2 * WORDS))
    groups = 1 if group_size == -1 else chunks * CHUNK // group_size
    parts = {"codes": codes, "scale": scale} | ({} if zero is None else {"zero": zero})
    for name, tensor in parts.items():
        if name != "codes":
            check_shape(name, tensor, (blocks, groups, ROWS))
        check_device(name, tensor, x.device)
        check_contiguous(name, tensor)
    if zero is not None:
        check_dtype("zero", zero.dtype, (torch.uint8,))


# Defined without `custom_op`: its wrapper takes as long as a product of a small layer.
torch.library.define(
    "nibble::blocked_linear",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, "
    "int out_features) -> Tensor",
)
torch.library.impl("nibble::blocked_linear", "CPU", blocked_linear)
torch.library.register_fake("nibble::blocked_linear", blocked_linear_fake)


class Blocks:
    """The tensors of a BlockedWeight, as the library takes them."""

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bits: int,
        group_size: int,
        *,
        in_lanes: bool = False,
    ) -> None:
        self.tensors = (codes, scale, zero)  # kept: the struct holds their addresses
        self.blocks, chunks, _, planes, _ = codes.shape
        self.rows, self.channels = self.blocks * ROWS, chunks * CHUNK  # filled up
        self.struct = BlockedStruct(
            codes=codes.data_ptr(),
            scale=scale.data_ptr(),
            zero=address(zero),
            blocks=self.blocks,
            chunks=chunks,
            groups=scale.shape[1],
            per_chunk=groups_per_chunk(group_size),
            scale_type=TYPES[scale.dtype],
            planes=planes,
            midpoints=midpoints(bits).data_ptr(),
            in_lanes=in_lanes,
        )
        self.reference = ctypes.byref(self.struct)

    @classmethod
    def of(cls, weight: BlockedWeight) -> Blocks:
        return cls(
            weight.codes, weight.scale, weight.zero, weight.bits, weight.group_size, in_lanes=weight.in_lanes
        )


@functools.cache
def midpoints(bits: int) -> Tensor:
    return torch.full((4 * ROWS,), 2 ** (bits - 1), dtype=torch.uint8)


def product(weight: Blocks, x: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """x times the weight, plus bias: the body of the operator."""
    check_bias(bias, out_features, x)
    output = x.new_empty((*x.shape[:-1], out_features))
    if x.dim() == 2 and x.shape[0] == 1:  # one token of one sequence: as little as can be beside the library
        multiply_by_tiles(weight, x, bias, output)
        return output
    rows, flat = x.reshape(-1, x.shape[-1]), output.view(-1, out_features)
    for first in range(0, rows.shape[0], MOST_ROWS):
        span = slice(first, first + MOST_ROWS)
        multiply_by_tiles(weight, rows[span], bias, flat[span])
    return output


def threads_for(weight: Blocks, rows: int) -> int:
    return 1 if rows * weight.rows * weight.channels < SMALL_PRODUCT else torch.get_num_threads()


def in_bfloat16(x: Tensor, channels: int) -> Tensor:
    """x (rows, in_features) as bfloat16 (parts * rows, channels), whose parts add up to x."""
    stacked = x
    if x.dtype != torch.bfloat16:
        parts, rest = [], x.float()
        for _ in range(PARTS[x.dtype]):
            parts.append(rest.bfloat16())
            rest = rest - parts[-1].float()
        stacked = torch.cat(parts)
    if channels != stacked.shape[1]:
        stacked = torch.nn.functional.pad(stacked, (0, channels - stacked.shape[1]))
    return stacked if stacked.stride(1) == 1 else stacked.contiguous()


def multiply_by_tiles(weight: Blocks, x: Tensor, bias: Tensor | None, output: Tensor) -> None:
    library = native_library()
    columns = in_bfloat16(x, weight.channels)
    # Weights rounded to bfloat16 are multiplied, as in a dense product of that dtype, so that sums need not
    # leave the tiles for each group. Other inputs keep their precision.
    product = library.nibble_tiles if x.dtype == torch.bfloat16 else library.nibble_tiles_exact
    by_digits = library.nibble_digits if columns.shape[0] <= DIGITS_BEFORE_TILES else None
    multiply_columns((by_digits, product), weight, columns, bias, output)


def multiply_columns(
    products: tuple[Product | None, Product],
    weight: Blocks,
    columns: Tensor,
    bias: Tensor | None,
    output: Tensor,
) -> None:
    """By the first of `products` if there is one and it takes these values, else by the second."""
    whole = output.dtype == torch.bfloat16  # the library writes the output itself
    target = output if whole else torch.empty(columns.shape[0], output.shape[1])
    added = None if bias is None or not whole else bias.float().contiguous()
    arguments = (
        weight.reference, columns.data_ptr(), columns.shape[0], columns.stride(0),
        address(added), target.data_ptr(), TYPES[target.dtype], output.shape[1],
        threads_for(weight, columns.shape[0]),
    )  # fmt: skip
    first, second = products
    if first is None or not first(*arguments):
        second(*arguments)
    if not whole:
        add_parts(target, bias, output)


def add_parts(sums: Tensor, bias: Tensor | None, output: Tensor) -> None:
    """sums (parts * rows, out_features), float32."""
    total = sums.view(-1, output.shape[0], sums.shape[1]).sum(0) if len(sums) > len(output) else sums
    output.copy_(total if bias is None else total + bias.float())


class NativeKernel:
    """Keeps a weight in blocks."""

    def __init__(self, weight: BlockedWeight, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.blocks = Blocks.of(weight)

    def __deepcopy__(self, memo: dict[int, object]) -> NativeKernel:
        return NativeKernel(copy.deepcopy(self.weight, memo), self.dtype)

    @property
    def packed_bytes(self) -> int:
        return self.weight.packed_bytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.weight
        check_input(x, weight.in_features, self.dtype, weight.codes.device)
        if type(x) is Tensor and not torch.compiler.is_compiling():
            # Not through the dispatcher: with cold caches its way costs a twentieth of a layer of one token.
            return product(self.blocks, x, bias, weight.out_features)
        output: Tensor = torch.ops.nibble.blocked_linear(
            x, weight.codes, weight.scale, weight.zero, bias, weight.bits, weight.group_size,
            weight.out_features,
        )  # fmt: skip
        return output


class NativeBackend:
    name = "amx"

    def can_implement(self, problem: LinearProduct) -> str | None:
        """None, or why the library can't be had. The first call compiles it."""
        try:
            native_library()
        except NotCompiled as fault:
            return str(fault)
        return None

    def prepare(self, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> NativeKernel:
        return NativeKernel(to_blocks(weight.to(device)), dtype)
