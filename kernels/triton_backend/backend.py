"""The Triton backend: any GPU that Triton compiles for."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.checks import check_bias, check_input
from kernels.operators import quantized_linear
from kernels.product import LinearProduct
from kernels.weight import PackedWeight

if TYPE_CHECKING:
    from types import ModuleType

MIN_CAPABILITY = (7, 5)
MAX_TOKENS = 256  # above, dequantizing once and a dense product take less (docs/benchmarks.md)


class TritonKernel:
    """Keeps the canonical tensors."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        properties = torch.cuda.get_device_properties(weight.qweight.device)
        self.processors = properties.multi_processor_count

    @property
    def packed_bytes(self) -> int:
        return self.weight.packed_bytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.weight
        check_input(x, weight.in_features, self.dtype, weight.qweight.device)
        check_bias(bias, weight.out_features, x)
        tokens = x.reshape(-1, weight.in_features).contiguous()
        if tokens.shape[0] > MAX_TOKENS:
            dense: Tensor = quantized_linear(
                x, weight.qweight, weight.scale, weight.zero, bias, weight.bits, weight.group_size
            )
            return dense
        upcast = self.dtype == torch.float32
        output: Tensor = linear_module().linear(
            tokens, weight, bias, processors=self.processors, upcast=upcast
        )
        return output.view(*x.shape[:-1], weight.out_features)


class TritonBackend:
    name = "triton"

    def can_implement(self, problem: LinearProduct) -> str | None:
        """Why it can't, or None."""
        if problem.device_type != "cuda":
            return f"it runs on GPUs, not on {problem.device_type}"
        if problem.capability is None or problem.capability < MIN_CAPABILITY:
            return f"compute capability {problem.capability} is below {MIN_CAPABILITY}"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        return None

    def prepare(self, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> TritonKernel:
        return TritonKernel(weight.to(device), dtype)


@functools.cache
def linear_module() -> ModuleType:
    """Imported at first use: a machine without Triton has the other backends."""
    return importlib.import_module("kernels.triton_backend.linear_kernel")
