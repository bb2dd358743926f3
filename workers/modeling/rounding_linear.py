"""Linears of served models whose inputs are rounded, or whose weights no kernel of ours computes from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.modeling.input_rounding import InputRounder
from workers.modeling.quantized_weight import QuantizedWeight


class RoundingLinear(nn.Linear):
    """An nn.Linear with a scheme's weights in the model's dtype; its input is rounded as the scheme says.

    It takes the memory of the original and gives the numbers of a server's kernel, up to its order of sums.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        rounder: InputRounder | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        bias: Tensor | None = None,
    ) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias=False, device="meta", dtype=dtype)
        self.scheme, self.rounder = weight.scheme, rounder
        self.weight = nn.Parameter(weight.dequantize().to(device, dtype), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)

    @property
    def packed_bytes(self) -> int:
        """Bytes on the device, bias included."""
        return sum(each.numel() * each.element_size() for each in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        return functional.linear(x if self.rounder is None else self.rounder(x), self.weight, self.bias)
