"""Which shape of the decode kernel computes a product, and its launch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.cuda.calls import LinearKernel, Prepared, Sizes
from kernels.cuda.driver import PROCESSORS, SHARED_BYTES_OF_BLOCK, KernelLaunch, open_driver
from kernels.cuda.layout import TILE_ROWS, UNIT_CHANNELS, Format

SOURCE = "decode.cu"
TOKEN_TILES = (1, 2, 4, 8)
MAX_TOKENS = 8 * TOKEN_TILES[-1]
TYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
TOKEN_STRIDE = UNIT_CHANNELS * 2 + 16
LANE_SUM_BYTES = 32 * 16  # a float4 of each lane
# Variants of csrc/cuda/decode.cu that are compiled in, 0 or 1: tests/benchmarks/decode_sweep.py.
VARIANTS = {"LEAN_FILL": 0}
# Those of a single token: 1 to 7 % faster on an H200, where 16 tokens gained nothing (docs/benchmarks.md).
ONE_TOKEN_VARIANTS = {"LEAN_FILL": 1}
ROUND = 8  # csrc/cuda/decode.cu: sums that go through shared memory at once


@dataclass(frozen=True)
class DecodeShape:
    """The template parameters of csrc/cuda/decode.cu."""

    row_tiles: int
    token_tiles: int
    row_warps: int
    splits: int
    stages: int
    scale_weights: bool = False
    held_tokens: int = 0  # 0: as many as the token tiles

    @property
    def tokens(self) -> int:
        return self.held_tokens or self.token_tiles * 8

    @property
    def strip_tiles(self) -> int:
        return self.row_warps * self.row_tiles

    @property
    def warps(self) -> int:
        return self.row_warps * self.splits

    @property
    def sums(self) -> int:
        """float4 sums of a lane."""
        return self.row_tiles * self.token_tiles

    def shared_bytes(self, form: Format) -> int:
        stage = self.strip_tiles * form.record_bytes + self.tokens * TOKEN_STRIDE
        rings = self.splits * self.stages
        sums = self.warps * min(self.sums, ROUND) * LANE_SUM_BYTES if self.splits > 1 else 0
        return rings * stage + sums + rings * 16 + 16

    def defines(self, form: Format, dtype: torch.dtype) -> dict[str, int]:
        return {
            **format_defines(form, dtype),
            "ROW_TILES": self.row_tiles,
            "TOKEN_TILES": self.token_tiles,
            "ROW_WARPS": self.row_warps,
            "SPLITS": self.splits,
            "STAGES": self.stages,
            "HELD_TOKENS": self.tokens,
            # One row is one copy of the engine; more of them arrive sooner by the threads' own.
            **({} if self.tokens == 1 else {"BULK_TOKENS": 0}),
            **VARIANTS,
            **(ONE_TOKEN_VARIANTS if self.tokens == 1 else {}),
            "SCALE_WEIGHTS": int(self.scale_weights),
            "EXPECTED_SHARED_BYTES": self.shared_bytes(form),
        }


def format_defines(form: Format, dtype: torch.dtype) -> dict[str, int]:
    """The macros that fragments.cuh needs."""
    return {
        "BITS": form.bits,
        "ASYMMETRIC": int(form.asymmetric),
        "GROUP": form.group_size,
        "TYPE": TYPE_CODES[dtype],
        "SCALE_TYPE": TYPE_CODES[form.scale_dtype],
    }


@dataclass(frozen=True)
class Device:
    """The limits of a device that the choice of a shape depends on."""

    processors: int
    shared_bytes: int  # that a block may have


@functools.cache
def device_of(index: int) -> Device:
    driver = open_driver()
    return Device(driver.attribute(PROCESSORS, index), driver.attribute(SHARED_BYTES_OF_BLOCK, index))


@functools.cache
def hopper(index: int) -> bool:
    """Whether the device has Hopper's instructions and overlapping launches."""
    return torch.cuda.get_device_capability(index)[0] == 9


@dataclass(frozen=True)
class DecodePlan:
    """A shape, and how many blocks of it."""

    shape: DecodeShape
    blocks: int


def strips_of(rows: int, shape: DecodeShape) -> int:
    tiles = -(-rows // TILE_ROWS)
    return -(-tiles // shape.strip_tiles)


# (row tiles, row warps, splits, stages, cost) by token tiles, 0 for a single token. Cost: the time on an
# H100 over that of the rule in `cost`; those for 32 tokens and more serve Ampere and were not measured there.
SHAPES: dict[int, tuple[tuple[int, int, int, int, float], ...]] = {
    0: ((7, 1, 8, 2, 1.0), (4, 1, 8, 2, 1.0), (2, 1, 16, 2, 0.95), (1, 1, 16, 4, 1.1), (1, 1, 4, 4, 1.5)),
    1: (
        (7, 1, 8, 2, 1.0), (4, 2, 8, 2, 0.88), (4, 1, 8, 2, 0.82), (2, 1, 16, 2, 0.79), (1, 1, 16, 4, 1.0),
        (1, 1, 4, 4, 1.5),
    ),
    2: (
        (2, 4, 4, 2, 0.8), (4, 2, 4, 2, 0.84), (4, 4, 2, 3, 0.85), (7, 1, 8, 2, 1.0), (2, 2, 8, 2, 0.75),
        (4, 1, 8, 2, 0.75), (2, 1, 8, 3, 0.85), (1, 1, 8, 4, 1.2), (1, 1, 4, 4, 1.5),
    ),
    4: ((4, 2, 4, 2, 1.0), (2, 4, 4, 2, 1.0), (2, 4, 2, 4, 1.0), (1, 2, 4, 4, 1.2), (1, 1, 2, 4, 1.5)),
    8: ((4, 4, 2, 2, 1.0), (2, 4, 2, 3, 1.0), (1, 4, 2, 4, 1.2), (1, 1, 2, 4, 1.5)),
}  # fmt: skip
# Costs of a block's steps, in times of reading one record from device memory: reading 1056 bytes of
# activations from the cache; ending a strip; sharing one with other blocks, and adding up the part of each.
# Blocks that share strips read less of what others have just read.
CACHE_READ, STRIP_END, SHARED_STRIP, PART, RECORD = 0.5, 8.0, 30.0, 12.0, 1056
SPLIT_LOSS = 1.08


def fitted(shape: DecodeShape, form: Format, device: Device) -> DecodeShape | None:
    """`shape` with as many of its stages as fit in shared memory, at least two; None if they don't."""
    for stages in range(shape.stages, 1, -1):
        staged = replace(shape, stages=stages)
        if staged.shared_bytes(form) <= device.shared_bytes:
            return staged
    return None


def shapes_for(tokens: int, form: Format, device: Device) -> Iterator[tuple[DecodeShape, float]]:
    tiles = token_tiles(tokens)
    held = int(tokens == 1)
    for row_tiles, row_warps, splits, stages, measured in SHAPES[0 if held else tiles]:
        shape = DecodeShape(row_tiles, tiles, row_warps, splits, stages, tiles > 4, held_tokens=held)
        staged = fitted(shape, form, device)
        if staged is not None:
            yield staged, measured


def deals(strips: int, units: int, processors: int) -> Iterator[tuple[int, float]]:
    """Ways to deal strips to blocks: the number of blocks, and what sharing strips costs each."""
    yield min(processors, strips * units), 2 * (SHARED_STRIP + 2 * PART)
    if strips <= processors:
        shares = min(processors // strips, units)
        yield strips * shares, SHARED_STRIP + shares * PART if shares > 1 else 0.0
    elif strips % -(-strips // processors) == 0:
        yield strips // -(-strips // processors), 0.0


def cost(shape: DecodeShape, blocks: int, sharing: float, strips: int, units: int) -> float:
    """Of the block with most to do, by the rule alone."""
    busiest = -(-strips * units // blocks)
    tokens = shape.tokens * UNIT_CHANNELS * 2 / RECORD * CACHE_READ
    reading = busiest * (shape.strip_tiles + tokens) * (SPLIT_LOSS if sharing else 1.0)
    return reading + -(-busiest // units) * STRIP_END + sharing


def make_plan(tokens: int, rows: int, channels: int, form: Format, device: Device) -> DecodePlan:
    """The shape, and the way to deal, whose busiest block has the least to do."""
    units = -(-channels // UNIT_CHANNELS)
    plans = [
        (cost(shape, blocks, sharing, strips_of(rows, shape), units) * measured, DecodePlan(shape, blocks))
        for shape, measured in shapes_for(tokens, form, device)
        for blocks, sharing in deals(strips_of(rows, shape), units, device.processors)
    ]
    if not plans:
        raise ValueError(f"no shape of the decode kernel fits {device.shared_bytes} bytes of shared memory")
    return min(plans, key=lambda plan: plan[0])[1]


def token_tiles(tokens: int) -> int:
    return next(tiles for tiles in TOKEN_TILES if tokens <= tiles * 8)


def lone_block(shared_bytes: int, device: Device) -> int:
    """Shared memory that leaves no room for a second block: the next kernel's blocks, started early, would
    take places beside this one's, two on some processors and none on others."""
    return max(shared_bytes, device.shared_bytes // 2 + 1024)


class DecodeKernel(LinearKernel):
    """For up to MAX_TOKENS rows of x."""

    def alike(self, tokens: int) -> int:
        return 0 if tokens == 1 else token_tiles(tokens)

    def prepare(self, sizes: Sizes, form: Format, dtype: torch.dtype, device: int) -> Prepared:
        tokens, channels, rows = sizes
        plan = make_plan(tokens, rows, channels, form, device_of(device))
        return self.prepare_plan(plan, rows, form, dtype, device)

    def prepare_plan(
        self, plan: DecodePlan, rows: int, form: Format, dtype: torch.dtype, device: int
    ) -> Prepared:
        shape = plan.shape
        function = self.library.function(SOURCE, "decode", device, shape.defines(form, dtype))
        shared = lone_block(shape.shared_bytes(form), device_of(device))
        launch = KernelLaunch((plan.blocks, 1, 1), (shape.warps * 32, 1, 1), shared, overlap=hopper(device))
        partial_bytes = plan.blocks * 2 * shape.row_warps * shape.sums * LANE_SUM_BYTES
        return Prepared(function, launch, partial_bytes, strips_of(rows, shape))

    def inputs(self, prepared: Prepared, x: Tensor, records: Tensor) -> tuple[Tensor, Tensor]:
        return records, x
