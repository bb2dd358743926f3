"""Which shape of the decode kernel computes a product, and its launch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.cuda.driver import PROCESSORS, SHARED_BYTES_OF_BLOCK, Function, Launch, open_driver
from kernels.cuda.layout import TILE_ROWS, UNIT_CHANNELS, Format
from kernels.cuda.library import Library
from kernels.cuda.workspace import Workspace

SOURCE = "decode.cu"
TOKEN_TILES = (1, 2, 4, 8)
MAX_TOKENS = 8 * TOKEN_TILES[-1]
TYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
TOKEN_STRIDE = UNIT_CHANNELS * 2 + 16
LANE_SUM_BYTES = 32 * 16  # a float4 of each lane
ROUND = 8  # csrc/cuda/decode.cu: sums that go through shared memory at once


@dataclass(frozen=True)
class Shape:
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
            "SCALE_WEIGHTS": int(self.scale_weights),
            "EXPECTED_SHARED_BYTES": self.shared_bytes(form),
        }


def format_defines(form: Format, dtype: torch.dtype) -> dict[str, int]:
    """What fragments.cuh wants to know."""
    return {
        "BITS": form.bits,
        "ASYMMETRIC": int(form.asymmetric),
        "GROUP": form.group_size,
        "TYPE": TYPE_CODES[dtype],
        "SCALE_TYPE": TYPE_CODES[form.scale_dtype],
    }


@dataclass(frozen=True)
class Device:
    """What the choice of a shape depends on."""

    processors: int
    shared_bytes: int  # that a block may have


@functools.cache
def device_of(index: int) -> Device:
    driver = open_driver()
    return Device(driver.attribute(PROCESSORS, index), driver.attribute(SHARED_BYTES_OF_BLOCK, index))


@dataclass(frozen=True)
class Plan:
    """A shape, and how many blocks of it."""

    shape: Shape
    blocks: int


def strips_of(rows: int, shape: Shape) -> int:
    tiles = -(-rows // TILE_ROWS)
    return -(-tiles // shape.strip_tiles)


# By token tiles, the best first by measurement (docs/benchmarks.md): (row tiles, row warps, splits).
SHAPES: dict[int, tuple[tuple[int, int, int], ...]] = {
    1: ((7, 1, 8), (4, 1, 8), (2, 1, 8), (1, 1, 8)),
    2: ((7, 1, 8), (4, 1, 8), (2, 1, 8), (1, 1, 8)),
    4: ((4, 4, 2), (4, 2, 4), (2, 2, 4), (1, 2, 4)),
    8: ((4, 4, 2), (4, 2, 4), (2, 2, 4), (1, 2, 4)),
}


def fitted(shape: Shape, form: Format, device: Device) -> Shape | None:
    """`shape` with the most stages, up to four, that fit in shared memory; None where two don't."""
    for stages in (4, 3, 2):
        staged = replace(shape, stages=stages)
        if staged.shared_bytes(form) <= device.shared_bytes:
            return staged
    return None


def shapes_for(token_tiles: int, form: Format, device: Device) -> Iterator[Shape]:
    for row_tiles, row_warps, splits in SHAPES[token_tiles]:
        shape = Shape(row_tiles, token_tiles, row_warps, splits, 0, scale_weights=token_tiles > 4)
        staged = fitted(shape, form, device)
        if staged is not None:
            yield staged


def units_of_busiest(rows: int, channels: int, shape: Shape, processors: int) -> tuple[float, int]:
    """Records' columns of tiles that the busiest block reads, and the number of blocks."""
    strips, units = strips_of(rows, shape), -(-channels // UNIT_CHANNELS)
    total = strips * units
    blocks = min(processors, total)
    # Where whole strips spread almost as evenly, they spare the addition across blocks.
    if strips <= processors and strips * 10 >= processors * 9:
        blocks = strips
    elif strips > processors:
        rounds = -(-strips // processors)
        even = -(-strips // rounds)
        if strips % even == 0 and even * 10 >= processors * 9:
            blocks = even
    return -(-total // blocks) * shape.strip_tiles, blocks


def make_plan(token_tiles: int, rows: int, channels: int, form: Format, device: Device) -> Plan:
    """The shape whose busiest block has the least to do, counting a strip's sums."""
    best: tuple[float, Plan] | None = None
    for shape in shapes_for(token_tiles, form, device):
        busiest, blocks = units_of_busiest(rows, channels, shape, device.processors)
        units = -(-channels // UNIT_CHANNELS)
        shared = strips_of(rows, shape) * units % blocks != 0 or strips_of(rows, shape) < blocks
        cost = busiest * (1.1 if shared else 1.0)
        if best is None or cost < best[0] * 0.97:
            best = cost, Plan(shape, blocks)
    if best is None:
        raise ValueError(f"no shape of the decode kernel fits {device.shared_bytes} bytes of shared memory")
    return best[1]


@dataclass(frozen=True)
class Prepared:
    """A plan with its kernel loaded: what a call needs."""

    function: Function
    launch: Launch
    partial_bytes: int
    strips: int


class DecodeKernel:
    """y = x W^T + bias for up to MAX_TOKENS rows of x."""

    def __init__(self, library: Library, workspace: Workspace, *, overlap: bool = False) -> None:
        self.library, self.workspace, self.overlap = library, workspace, overlap
        self.prepared: dict[tuple[object, ...], Prepared] = {}

    def __call__(self, x: Tensor, records: Tensor, bias: Tensor | None, output: Tensor, form: Format) -> None:
        """Writes `output` (tokens, rows); x (tokens, channels), both contiguous and on 16-byte addresses."""
        device, tokens, channels, rows = x.get_device(), *x.shape, output.shape[1]
        token_tiles = next(tiles for tiles in TOKEN_TILES if tokens <= tiles * 8)
        key = (device, token_tiles, channels, rows, form, x.dtype)
        prepared = self.prepared.get(key)
        if prepared is None:
            plan = make_plan(token_tiles, rows, channels, form, device_of(device))
            prepared = self.prepared[key] = self.prepare(plan, rows, form, x.dtype, device)
        self.launch(prepared, x, records, bias, output)

    def prepare(self, plan: Plan, rows: int, form: Format, dtype: torch.dtype, device: int) -> Prepared:
        shape = plan.shape
        function = self.library.function(SOURCE, "decode", device, shape.defines(form, dtype))
        launch = Launch(
            (plan.blocks, 1, 1), (shape.warps * 32, 1, 1), shape.shared_bytes(form), overlap=self.overlap
        )
        partial_bytes = plan.blocks * 2 * shape.row_warps * shape.sums * LANE_SUM_BYTES
        return Prepared(function, launch, partial_bytes, strips_of(rows, shape))

    def launch(
        self, prepared: Prepared, x: Tensor, records: Tensor, bias: Tensor | None, output: Tensor
    ) -> None:
        partial, arrived = self.workspace.get(x.get_device(), prepared.partial_bytes, prepared.strips)
        sizes = x.shape[0], x.shape[1], output.shape[1]
        prepared.function(prepared.launch, (records, x, bias, output, partial, arrived, *sizes))
