"""PyTorch's own operators on any device: the weight is dequantized on every call. The last resort."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import check_input
from kernels.operators import quantized_linear
from kernels.product import LinearProduct
from kernels.weight import PackedWeight


class TorchKernel:
    """Keeps the canonical tensors."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    @property
    def packed_bytes(self) -> int:
        return self.weight.packed_bytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.weight
        check_input(x, weight.in_features, self.dtype, weight.qweight.device)
        output: Tensor = quantized_linear(
            x, weight.qweight, weight.scale, weight.zero, bias, weight.bits, weight.group_size
        )
        return output


class TorchBackend:
    name = "torch"

    def can_implement(self, problem: LinearProduct) -> str | None:
        """None: there is nothing that it can't."""
        return None

    def prepare(self, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> TorchKernel:
        return TorchKernel(weight.to(device), dtype)
