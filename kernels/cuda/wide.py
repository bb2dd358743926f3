"""The Hopper kernel for many tokens: its shapes, its choice among them, and its launch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.cuda.decode import Device, format_defines
from kernels.cuda.driver import Function, Launch
from kernels.cuda.layout import TILE_ROWS, Format
from kernels.cuda.library import Library
from kernels.cuda.tensor_map import describe
from kernels.cuda.workspace import Workspace

SOURCE = "wide.cu"
WARPGROUPS = 2
STAGED_STRIDE = 144
ALIGNMENT = 1024


@dataclass(frozen=True)
class Shape:
    """The template parameters of csrc/cuda/wide.cu."""

    row_blocks: int
    tokens: int
    stages: int = 0

    @property
    def records(self) -> int:
        return WARPGROUPS * 4 * self.row_blocks

    @property
    def rows(self) -> int:
        return self.records * TILE_ROWS

    @property
    def threads(self) -> int:
        return WARPGROUPS * 128 + (128 if self.row_blocks * self.tokens > 128 else 32)

    def shared_bytes(self, form: Format) -> int:
        stage = 2 * self.tokens * 128 + self.records * form.record_bytes
        stage = -(-stage // ALIGNMENT) * ALIGNMENT
        staging = WARPGROUPS * min(self.tokens, 32) * STAGED_STRIDE
        return self.stages * stage + staging + self.stages * 16 + 16 + ALIGNMENT

    def defines(self, form: Format, dtype: torch.dtype) -> dict[str, int]:
        return {
            **format_defines(form, dtype),
            "ROW_BLOCKS": self.row_blocks,
            "TOKENS": self.tokens,
            "STAGES": self.stages,
            "EXPECTED_SHARED_BYTES": self.shared_bytes(form),
        }


@dataclass(frozen=True)
class Plan:
    """A shape, and how its tiles are dealt to blocks."""

    shape: Shape
    blocks: int
    split: bool


SHAPES = tuple(Shape(blocks, tokens) for blocks in (1, 2) for tokens in (16, 32, 64, 128)) + (Shape(1, 256),)
MAX_STAGES = 8


def fitted(shape: Shape, form: Format, device: Device) -> Shape | None:
    """`shape` with the most stages that fit in shared memory; None where two don't."""
    for stages in range(MAX_STAGES, 1, -1):
        staged = replace(shape, stages=stages)
        if staged.shared_bytes(form) <= device.shared_bytes:
            return staged
    return None


def tiles_of(tokens: int, rows: int, shape: Shape) -> int:
    return -(-rows // shape.rows) * -(-tokens // shape.tokens)


@dataclass(frozen=True)
class Prepared:
    """A plan with its kernel loaded: what a call needs."""

    function: Function
    launch: Launch
    plan: Plan
    partial_bytes: int
    tiles: int


class WideKernel:
    """y = x W^T + bias for any number of rows of x, on compute capability 9."""

    def __init__(self, library: Library, workspace: Workspace, *, overlap: bool = False) -> None:
        self.library, self.workspace, self.overlap = library, workspace, overlap
        self.prepared: dict[tuple[object, ...], Prepared] = {}

    def prepare(
        self, plan: Plan, sizes: tuple[int, int], form: Format, dtype: torch.dtype, device: int
    ) -> Prepared:
        """`sizes`: tokens and rows."""
        shape = plan.shape
        function = self.library.function(SOURCE, "wide", device, shape.defines(form, dtype))
        launch = Launch((plan.blocks, 1, 1), (shape.threads, 1, 1), shape.shared_bytes(form), overlap=self.overlap)
        partial_bytes = plan.blocks * 2 * shape.rows * shape.tokens * 4 if plan.split else 0
        return Prepared(function, launch, plan, partial_bytes, tiles_of(*sizes, shape))

    def launch(
        self, prepared: Prepared, x: Tensor, records: Tensor, bias: Tensor | None, output: Tensor
    ) -> None:
        partial, arrived = self.workspace.get(x.get_device(), prepared.partial_bytes, prepared.tiles)
        sizes = x.shape[0], x.shape[1], output.shape[1], int(prepared.plan.split)
        tokens = describe(x, prepared.plan.shape.tokens)
        prepared.function(prepared.launch, (tokens, records, bias, output, partial, arrived, *sizes))
