"""The linear operator on records: which kernel computes how many tokens."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels.checks import (
    BITS,
    DTYPES,
    check_bias,
    check_contiguous,
    check_device,
    check_dtype,
    check_one_of,
    check_shape,
)
from kernels.cuda.decode import MAX_TOKENS, DecodeKernel, format_defines, hopper
from kernels.cuda.driver import KernelLaunch
from kernels.cuda.layout import TILE_ROWS, UNIT_CHANNELS, Format, format_of
from kernels.cuda.library import shared_library
from kernels.cuda.wide import WideKernel
from kernels.cuda.workspace import Workspace
from kernels.weight import PackedWeight

RECORD_SOURCE = "records.cu"
RECORD_THREADS = 128
RECORDS_PER_BLOCK = 4  # of the kernel `dense`, a warp each
ALIGNMENT = 16
CHANNEL_MULTIPLE = 8  # 16 bytes of activations: what one copy moves
# On Hopper the decode kernel is ahead up to this many tokens (docs/benchmarks.md).
DECODE_TOKENS = 16
# Between them these numbers of tokens meet nearly every shape that a rule chooses.
LOADED_TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024)


class Kernels:
    """The kernels with what they share."""

    def __init__(self) -> None:
        workspace = Workspace()
        self.decode = DecodeKernel(shared_library(), workspace)
        self.wide = WideKernel(shared_library(), workspace)


@functools.cache
def kernels() -> Kernels:
    return Kernels()


def load_kernels(weight: PackedWeight, dtype: torch.dtype, device: int) -> None:
    """Compiles and loads the kernels for this weight: requests should not wait, and graphs can't."""
    form, on_hopper = format_of(weight), hopper(device)
    for tokens in LOADED_TOKENS:
        sizes = tokens, weight.in_features, weight.out_features
        if on_hopper and tokens > DECODE_TOKENS:
            kernels().wide.prepared_for(sizes, form, dtype, device)
        elif tokens <= MAX_TOKENS:
            kernels().decode.prepared_for(sizes, form, dtype, device)


def make_records(weight: PackedWeight) -> Tensor:
    """layout.make_records, computed by the GPU that holds the weight."""
    form, device = format_of(weight), weight.qweight.device
    tiles, units = -(-weight.out_features // TILE_ROWS), -(-weight.in_features // UNIT_CHANNELS)
    records = torch.empty(units, tiles, form.record_bytes, dtype=torch.uint8, device=device)
    function = shared_library().function(
        RECORD_SOURCE, "make_records", records.get_device(), format_defines(form, torch.float16)
    )
    sizes = (weight.out_features, weight.in_features, weight.qweight.shape[1], weight.groups)
    function(
        KernelLaunch((tiles, units, 1), (RECORD_THREADS, 1, 1)),
        (weight.qweight, weight.scale, weight.zero, records, *sizes, weight.channels_per_group),
    )
    return records


def dense(records: Tensor, rows: int, channels: int, form: Format, dtype: torch.dtype) -> Tensor:
    """The weight of the records, (rows, channels) in `dtype`."""
    units, tiles, _ = records.shape
    output = torch.empty(rows, channels, dtype=dtype, device=records.device)
    function = shared_library().function(
        RECORD_SOURCE, "dense", records.get_device(), format_defines(form, dtype)
    )
    blocks = -(-tiles // RECORDS_PER_BLOCK)
    function(
        KernelLaunch((blocks, units, 1), (RECORDS_PER_BLOCK * 32, 1, 1)),
        (records, output, rows, channels, tiles),
    )
    return output


def linear(x: Tensor, records: Tensor, bias: Tensor | None, rows: int, form: Format) -> Tensor:
    """x (..., channels) times the records' weight, plus bias: (..., rows)."""
    tokens = aligned(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
    on_hopper = hopper(x.get_device())
    if tokens.shape[0] > MAX_TOKENS and not on_hopper:
        weight = dense(records, rows, x.shape[-1], form, x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
    output = x.new_empty(tokens.shape[0], rows)
    if tokens.shape[0]:
        wide = on_hopper and tokens.shape[0] > DECODE_TOKENS
        (kernels().wide if wide else kernels().decode)(tokens, records, bias, output, form)
    return output if x.dim() == 2 else output.view(*x.shape[:-1], rows)


def aligned(matrix: Tensor) -> Tensor:
    """`matrix`, contiguous and on an address that the copies can take."""
    contiguous = matrix.contiguous()
    return contiguous if contiguous.data_ptr() % ALIGNMENT == 0 else contiguous.clone()


# Not torch.library.custom_op, whose wrapper takes longer than a small product.
LIBRARY = torch.library.Library("nibble", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define(  # type: ignore[no-untyped-call]
    "cuda_linear(Tensor x, Tensor records, Tensor? bias, int out_features, int bits, int group_size, "
    "bool asymmetric, ScalarType scale_dtype) -> Tensor"
)


@torch.library.impl(LIBRARY, "cuda_linear", "CUDA")
def cuda_linear(
    x: Tensor,
    records: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    asymmetric: bool,
    scale_dtype: torch.dtype,
) -> Tensor:
    """`linear`, as the operator nibble::cuda_linear."""
    form = Format(bits, group_size, asymmetric, scale_dtype)
    check_records(x, records, bias, out_features, form)
    return linear(x, records, bias, out_features, form)


@torch.library.register_fake("nibble::cuda_linear", lib=LIBRARY)  # type: ignore[untyped-decorator]
def fake_cuda_linear(
    x: Tensor,
    records: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    asymmetric: bool,
    scale_dtype: torch.dtype,
) -> Tensor:
    check_records(x, records, bias, out_features, Format(bits, group_size, asymmetric, scale_dtype))
    return x.new_empty(*x.shape[:-1], out_features)


def check_records(x: Tensor, records: Tensor, bias: Tensor | None, rows: int, form: Format) -> None:
    """Raises ValueError or TypeError for arguments that the kernels, which check nothing, can't read."""
    check_one_of("bits", form.bits, BITS)
    check_one_of("group_size", form.group_size, (32, 64, 128))
    check_dtype("scale_dtype", form.scale_dtype, DTYPES)
    check_dtype("x", x.dtype, (torch.float16, torch.bfloat16))
    if x.dim() == 0 or x.shape[-1] < 1 or x.shape[-1] % CHANNEL_MULTIPLE:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: (..., multiple of {CHANNEL_MULTIPLE})")
    if rows < 1:
        raise ValueError(f"out_features={rows}; allowed: 1 and more")
    check_dtype("records", records.dtype, (torch.uint8,))
    units, tiles = -(-x.shape[-1] // UNIT_CHANNELS), -(-rows // TILE_ROWS)
    check_shape("records", records, (units, tiles, form.record_bytes))
    check_device("records", records, x.device)
    check_contiguous("records", records)
    check_bias(bias, rows, x)
