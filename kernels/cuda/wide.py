"""The Hopper kernel for many tokens: its shapes, its choice among them, and its launch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.cuda.calls import LinearKernel, Prepared, Sizes
from kernels.cuda.decode import Device, device_of, format_defines, lone_block
from kernels.cuda.driver import KernelLaunch
from kernels.cuda.layout import TILE_ROWS, UNIT_CHANNELS, Format
from kernels.cuda.tensor_map import TensorMap, describe

SOURCE = "wide.cu"
WARPGROUPS = 2
STAGED_STRIDE = 144
ALIGNMENT = 1024


@dataclass(frozen=True)
class WideShape:
    """The template parameters of csrc/cuda/wide.cu."""

    row_blocks: int
    tokens: int
    splits: int = 1
    stages: int = 0

    @property
    def records(self) -> int:
        return WARPGROUPS * 4 * self.row_blocks

    @property
    def rows(self) -> int:
        return self.records * TILE_ROWS

    @property
    def threads(self) -> int:
        return self.splits * WARPGROUPS * 128 + (128 if self.row_blocks * self.tokens > 128 else 32)

    def shared_bytes(self, form: Format) -> int:
        stage = 2 * self.tokens * 128 + self.records * form.record_bytes
        stage = -(-stage // ALIGNMENT) * ALIGNMENT
        staging = WARPGROUPS * min(self.tokens, 32) * STAGED_STRIDE
        sums = (self.splits - 1) * self.rows * self.tokens * 4
        return self.stages * stage + staging + sums + self.stages * 16 + 16 + ALIGNMENT

    def defines(self, form: Format, dtype: torch.dtype) -> dict[str, int]:
        return {
            **format_defines(form, dtype),
            "ROW_BLOCKS": self.row_blocks,
            "TOKENS": self.tokens,
            "SPLITS": self.splits,
            "STAGES": self.stages,
            "EXPECTED_SHARED_BYTES": self.shared_bytes(form),
        }


@dataclass(frozen=True)
class WidePlan:
    """A shape, and how its tiles are dealt to blocks."""

    shape: WideShape
    blocks: int
    split: bool


# Microseconds of a block for a unit of 128 channels, by shape, on an H100 (docs/benchmarks.md).
UNIT_TIMES = {
    WideShape(1, 16): 0.47,
    WideShape(1, 32, 2): 0.49,
    WideShape(2, 32): 0.83,
    WideShape(1, 64): 0.58,
    WideShape(2, 64): 1.02,
    WideShape(1, 128): 0.85,
    WideShape(2, 128): 1.34,
    WideShape(1, 256): 1.44,
}
# Of a part of a tile that blocks share, and of each KiB of its sums.
SHARED_PART, SHARED_KIB = 0.5, 0.015
SPLIT_LOSS = 1.1  # blocks that split tiles read less of what others have just read
MAX_STAGES = 8


def fitted(shape: WideShape, form: Format, device: Device) -> WideShape | None:
    """`shape` with the most stages that fit in shared memory; None where two don't."""
    for stages in range(MAX_STAGES, 1, -1):
        staged = replace(shape, stages=stages)
        if staged.shared_bytes(form) <= device.shared_bytes:
            return staged
    return None


def tiles_of(tokens: int, rows: int, shape: WideShape) -> int:
    return -(-rows // shape.rows) * -(-tokens // shape.tokens)


@dataclass(frozen=True)
class Deal:
    """A way to deal tiles to blocks."""

    blocks: int
    split: bool
    busiest: int  # units of the block with most to do
    shared: int  # tiles that a block shares with others
    parts: int  # of a shared tile


def deals(tiles: int, units: int, processors: int) -> Iterator[Deal]:
    yield Deal(min(tiles, processors), False, -(-tiles // processors) * units, 0, 0)
    blocks = min(processors, tiles * units)
    yield Deal(blocks, True, -(-tiles * units // blocks), 2, -(-blocks // tiles) + 1)
    shares = min(processors // tiles, units) if tiles <= processors else 1
    if shares > 1:
        yield Deal(tiles * shares, True, -(-units // shares), 1, shares)


def cost(shape: WideShape, deal: Deal) -> float:
    """Microseconds of the block with most to do."""
    per_part = SHARED_PART + SHARED_KIB * shape.rows * shape.tokens * 4 / 1024
    reading = deal.busiest * UNIT_TIMES[replace(shape, stages=0)] * (SPLIT_LOSS if deal.split else 1.0)
    return reading + deal.shared * deal.parts * per_part


def make_plan(tokens: int, rows: int, channels: int, form: Format, device: Device) -> WidePlan:
    """The shape, and the way to deal, whose busiest block is done first."""
    units = -(-channels // UNIT_CHANNELS)
    plans = [
        (cost(shape, deal), WidePlan(shape, deal.blocks, deal.split))
        for shape in filter(None, (fitted(shape, form, device) for shape in UNIT_TIMES))
        for deal in deals(tiles_of(tokens, rows, shape), units, device.processors)
    ]
    return min(plans, key=lambda plan: plan[0])[1]


class WideKernel(LinearKernel):
    """For any number of rows of x, on compute capability 9."""

    def alike(self, tokens: int) -> int:
        return tokens

    def prepare(self, sizes: Sizes, form: Format, dtype: torch.dtype, device: int) -> Prepared:
        tokens, channels, rows = sizes
        plan = make_plan(tokens, rows, channels, form, device_of(device))
        shape = plan.shape
        function = self.library.function(SOURCE, "wide", device, shape.defines(form, dtype))
        shared = lone_block(shape.shared_bytes(form), device_of(device))
        launch = KernelLaunch((plan.blocks, 1, 1), (shape.threads, 1, 1), shared, overlap=True)
        partial_bytes = plan.blocks * 2 * shape.rows * shape.tokens * 4 if plan.split else 0
        counters = tiles_of(tokens, rows, shape)
        return Prepared(function, launch, partial_bytes, counters, shape.tokens, (int(plan.split),))

    def inputs(self, prepared: Prepared, x: Tensor, records: Tensor) -> tuple[TensorMap, Tensor]:
        return describe(x, prepared.token_box), records
