"""Calls of a linear kernel: a plan is chosen and loaded once for each problem, and then only launched."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cuda.driver import KernelFunction, KernelLaunch
from kernels.cuda.layout import Format
from kernels.cuda.library import Library
from kernels.cuda.workspace import Workspace

Sizes = tuple[int, int, int]  # tokens, channels, rows


@dataclass(frozen=True)
class Prepared:
    """A plan with its kernel loaded, ready for calls."""

    function: KernelFunction
    launch: KernelLaunch
    partial_bytes: int
    counters: int
    token_box: int = 0  # tokens that the copy engine fetches at once, where it gets a description of x
    last: tuple[int, ...] = ()  # arguments after the sizes


class LinearKernel(ABC):
    """y = x W^T + bias."""

    def __init__(self, library: Library, workspace: Workspace) -> None:
        self.library, self.workspace = library, workspace
        self.prepared: dict[tuple[object, ...], Prepared] = {}

    def __call__(self, x: Tensor, records: Tensor, bias: Tensor | None, output: Tensor, form: Format) -> None:
        """Writes `output` (tokens, rows); x (tokens, channels), both contiguous and on 16-byte addresses."""
        tokens, channels = x.shape
        sizes = tokens, channels, output.shape[1]
        self.launch(self.prepared_for(sizes, form, x.dtype, x.get_device()), x, records, bias, output)

    def prepared_for(self, sizes: Sizes, form: Format, dtype: torch.dtype, device: int) -> Prepared:
        """The plan and kernel of a call of these sizes, prepared at the first call."""
        tokens, channels, rows = sizes
        key = (device, self.alike(tokens), channels, rows, form, dtype)
        prepared = self.prepared.get(key)
        if prepared is None:
            prepared = self.prepared[key] = self.prepare(sizes, form, dtype, device)
        return prepared

    def launch(
        self, prepared: Prepared, x: Tensor, records: Tensor, bias: Tensor | None, output: Tensor
    ) -> None:
        partial, arrived = self.workspace.get(x.get_device(), prepared.partial_bytes, prepared.counters)
        first = self.inputs(prepared, x, records)
        sizes = (*x.shape, output.shape[1])
        prepared.function(prepared.launch, (*first, bias, output, partial, arrived, *sizes, *prepared.last))

    @abstractmethod
    def alike(self, tokens: int) -> int:
        """The same number for those numbers of tokens that one plan serves."""

    @abstractmethod
    def prepare(self, sizes: Sizes, form: Format, dtype: torch.dtype, device: int) -> Prepared:
        """Choose, compile and load."""

    @abstractmethod
    def inputs(
        self, prepared: Prepared, x: Tensor, records: Tensor
    ) -> tuple[Tensor | ctypes.Structure, Tensor]:
        """The first two arguments."""
